"""What is asked of `reproduce` and `sweep`, looked at before anything is made: what no experiment reads is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sd_erase import bases, preflight
from sd_erase.bases import Base
from sd_erase.captions import digest
from sd_erase.config import RunConfig, from_dict, override, to_dict
from sd_erase.errors import UserError, unknown_choice
from sd_erase.reproduce import Recipe, check_read, read_recipe

ZERO_SHOT = ("test", "templates")
GRID = ("prompts", "across")
# the sizes that each experiment reads
SIZES = {
    "table3": ("test",), "table5": (*ZERO_SHOT, "model", "training_steps"), "table6": ("prompts", "images"),
    "table8": (*ZERO_SHOT, "models", "training_steps"), "figure1": GRID, "figure4": GRID, "figure5": ("images", "shown"),
    "figure6": ("classes", "images", "templates"), "figure7": GRID, "cost": ("steps",),
}  # fmt: skip
ONE_METHOD = ("table7", "figure5", "figure6")
OWN_PROMPTS = ("figure1", "figure4", "figure7")
ONE_CONCEPT = ("figure5", "figure6", "cost")
OTHER_MODEL = ("table5", "table8")  # their runs are not on the base
DETECTS = ("table6", "figure5")
DRAWS = ("table6", *OWN_PROMPTS)
WORDS = {"templates": str, "model": str, "models": Mapping}


def check_experiments(
    asked: Sequence[str], base_name: str, datasets: Sequence[str], device: str, changes: Mapping[str, Any],
    objectives: Sequence[str], concepts: Sequence[str], exact: bool = False,
) -> None:  # fmt: skip
    """Refuse what the experiments would ignore, and what this machine or the disk does not have.

    Raises:
        UserError: which flag, and what to pass instead.
    """
    if objectives:
        _refuse(asked, ONE_METHOD, "--method", "shows one method only")
    if concepts:
        _refuse(asked, OWN_PROMPTS, "--concept", "draws the prompts of its own concepts")
    if len(concepts) > 1:
        _refuse(asked, ONE_CONCEPT, "A second --concept", "shows one erasure only")
    for objective in objectives:
        _named("--method", {"train.objective": objective})
    for concept in concepts:
        _named("--concept", {"concepts": [concept]})
    _named("--set", {name: value for name, value in changes.items() if not name.startswith("sizes.")})
    base = bases.resolve(base_name)
    recipes = {name: read_recipe(name, dict(changes), objectives, concepts) for name in asked}
    for dotted, value in changes.items():
        if dotted.startswith("sizes."):
            _check_size(asked, dotted.removeprefix("sizes."), value)
    for name, recipe in recipes.items():
        _check_rows_differ(name, recipe, read_recipe(name, None, objectives, concepts))
    _check_datasets(datasets, {side for recipe in recipes.values() for side in recipe.concepts}, ", ".join(asked))
    for name, recipe in recipes.items():
        settings = [{**recipe.settings, **own} for own in recipe.methods.values()]
        erasures = [one for each in recipe.concepts.values() for one in each]
        check_machine([] if name in OTHER_MODEL else settings, erasures, base_name, device, exact=exact)
        if name in DRAWS:
            bases.check_draws(base)
        if name in DETECTS:
            _check_detector(base)


def check_sweep(
    points: Sequence[Mapping[str, Any]], concepts: str, side: str, base_name: str, datasets: Sequence[str], device: str, seed: int,
    swept: Collection[str] = (), exact: bool = False,
) -> None:  # fmt: skip
    """The same of a sweep's points, each with the settings that all share; `swept` are the settings that differ.

    Raises:
        UserError: which flag, and what to pass instead.
    """
    for dotted in {dotted for point in points for dotted in point}:
        flag = "--over" if dotted in swept else "--set"
        if dotted.startswith("sizes."):
            raise UserError(f"{flag} {dotted} has no effect on a sweep: pass train.* or harvest.*.")
        if dotted == "seed":
            raise UserError(f"{flag} seed is not how that is set here: pass --seed.")
        if dotted != "train.objective":  # here it is a setting like others
            check_read(dotted, flag)
        for point in points:
            _named(flag, {dotted: point[dotted]})
    _check_datasets(datasets, {side}, f"a sweep with --data {side}")
    check_machine(points, [concepts], base_name, device, seed, exact)


def check_machine(
    settings: Sequence[Mapping[str, Any]],
    erasures: Sequence[str],
    base_name: str,
    device: str,
    seed: int = 0,
    exact: bool = False,
) -> None:
    """Refuse what could not be trained here (see `preflight.check`)."""
    for concepts in erasures:
        names = [name.strip() for name in concepts.split(" + ") if name.strip()]
        base = from_dict({"base": base_name, "seed": seed, "device": device, "concepts": names, "exact": exact})
        preflight.check(base, ("harvest",))
        for each in settings:
            preflight.check(override(base, each), ("harvest", "train"))


def _named(flag: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that no run could have, under the name of the flag that gave them."""
    override(RunConfig(), settings, {name: f"{flag} {name}" if flag in ("--set", "--over") else flag for name in settings})


def _refuse(asked: Sequence[str], among: Sequence[str], flag: str, why: str) -> None:
    if ignoring := [name for name in asked if name in among]:
        raise UserError(
            f"{flag} has no effect on {', '.join(ignoring)}, which {why}: leave it out, or ask for other experiments."
        )


def _check_size(asked: Sequence[str], name: str, value: Any) -> None:
    name = name.partition(".")[0]
    reading = [each for each in asked if name in SIZES.get(each, ZERO_SHOT)]
    if not reading:
        known = sorted({size for each in asked for size in SIZES.get(each, ZERO_SHOT)})
        raise unknown_choice(f"Size of {', '.join(asked)}", name, known)
    for each in reading:
        kind = Mapping if name == "prompts" and each in OWN_PROMPTS else WORDS.get(name, int)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 1):
            wanted = {int: "a whole number of 1 or more", str: "a name or a folder"}.get(kind, "a mapping")
            raise UserError(f"--set sizes.{name} is {value!r}, which {each} cannot read: pass {wanted}.")


def _resolved(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {name: to_dict(override(RunConfig(), {**recipe.settings, **own})) for name, own in recipe.methods.items()}


def _check_rows_differ(name: str, changed: Recipe, recipe: Recipe) -> None:
    """Refuse a `--set` that gives two rows the same settings: one figure would stand under two names."""
    after, before = _resolved(changed), _resolved(recipe)
    for first in after:
        for second in after:
            if first < second and after[first] == after[second] and before[first] != before[second]:
                raise UserError(
                    f"--set makes the rows {first!r} and {second!r} of {name} the same: leave out what they differ in (train.weights, "
                    "train.learning_rate)."
                )


def _check_datasets(datasets: Sequence[str], read: set[str], who: str) -> None:
    for spec in datasets:
        side = "classes" if spec.partition(":")[0] == "cifar100" else "captions"
        if side not in read:
            wanted = "cifar100:PATH" if "classes" in read else "captions, such as flickr30k:PATH"
            raise UserError(f"--dataset {spec} has no effect: {who} reads no {side}; leave it out, or pass {wanted}.")
        digest(spec)  # opened by name: it must be there


def _check_detector(base: Base) -> None:
    from sd_erase.detection import read_card

    read_card(base.detector)
