"""What a comparison is asked: a recipe into cells, each of which is looked at before the first is trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import bases, preflight, resources, schema, yamlfile
from sd_erase.concepts import load_concepts
from sd_erase.config import RunConfig, check_methods, check_seeds, from_dict, override, refuse_consent
from sd_erase.errors import UserError, shortened
from sd_erase.judging import judge_of
from sd_erase.probes import unlisted_words
from sd_erase.rundir import fingerprint
from sd_erase.schema import Rule, SettingsError

GROUPS = {"named", "unlisted", "untouched", "senses"}  # of `probes`, that have a number of images of their own
COUNT = Rule(low=0, high=100_000)  # of images a prompt, and of prompts
DECIDED = {
    "seed": "write `seeds: [0]` beside settings",
    "concepts": "write them under concepts",
    "generate.images_per_prompt": "write `images: {named: 8}` beside settings",
    "attack.prompts": "write `attacked: 5` beside settings, how many of each concept's prompts are attacked",
}  # what settings cannot say, because the recipe says it elsewhere


@dataclass(frozen=True)
class Recipe:
    """What to compare.

    Attributes:
        concepts: each entry is one erasure: a concept, or several joined by " + ".
        methods: name of a row -> settings that differ from the defaults, by dotted name (``{"train.objective": "paper"}``).
        seeds: of training; images are drawn from the same noise for all.
        images: images a prompt, for each group of prompts (see `probes`); a group with 0 is left out.
        prompts: of each concept, at most, and as many untouched ones; 0 takes all.
        attacked: prompts of each concept before which words are searched that bring it back (see `attacks`); 0 for none.
        settings: what all rows share, by dotted name.
        title: of the table.
    """

    concepts: tuple[str, ...]
    methods: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (0,)
    images: dict[str, int] = field(default_factory=lambda: {"named": 8, "unlisted": 4, "untouched": 2, "senses": 4})
    prompts: int = 0
    attacked: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    title: str = "Erasures compared"


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file or of a bundled name.

    Raises:
        UserError: no such file, not YAML, an unknown key or setting.
    """
    path = resources.find("recipes", path)
    values = yamlfile.read(path, "Recipe")
    fields = {item.name: item.default for item in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or not {"concepts", "methods"} <= values.keys() <= fields.keys():
        raise UserError(
            f"Recipe {path} must be a mapping with concepts and methods, and at most {', '.join(sorted(fields))}: write `concepts: [apple]` "
            "and `methods: {robust: {}}`, as the bundled recipes do."
        )
    given: dict[str, Any] = {
        key: [value] if key in ("concepts", "seeds") and isinstance(value, (str, int)) else value for key, value in values.items()
    }
    methods = _mapping(path, given, "methods", (dict, type(None)))
    given["methods"] = {str(name): settings or {} for name, settings in methods.items()}
    _mapping(path, given, "images", (int,))
    _mapping(path, given, "settings", (object,))
    if not isinstance(given.get("title", ""), str):
        raise UserError(f"Recipe {path}: title must be a text, not {shortened(given['title'])}: write it in quotes.")
    _check_lists(path, given)
    given |= {key: tuple(given[key]) for key in ("concepts", "seeds") if key in given}
    recipe = Recipe(**given)
    if not recipe.methods:
        raise UserError(f"Recipe {path}: methods names none: write one, such as `robust: {{}}`.")
    if recipe.images.keys() - GROUPS or recipe.images.get("named", 0) < 1:
        raise UserError(f"Recipe {path}: images must give a number for named, and for none but {', '.join(sorted(GROUPS))}.")
    check_methods(path, recipe.settings, recipe.methods)
    for what, names in (("method", list(recipe.methods)), ("concept", list(recipe.concepts))):
        _check_names(path, what, names)
    _check_places(path, recipe)
    return recipe


def _check_lists(path: Path, given: dict[str, Any]) -> None:
    """Refuse concepts, seeds and numbers that no flag would take, and what stands twice: it would count twice in every figure."""
    concepts = given["concepts"]
    if not (isinstance(concepts, list) and concepts and all(isinstance(item, str) for item in concepts)):
        raise UserError(f"Recipe {path}: concepts must be a list of names, not {shortened(concepts)}: write `concepts: [apple]`.")
    if "seeds" in given:
        check_seeds(path, given["seeds"])
    for key in ("concepts", "seeds"):
        listed = given.get(key, ())
        if twice := [item for item in listed if listed.count(item) > 1]:
            raise UserError(f"Recipe {path}: {key} names {shortened(twice[0])} twice, which would count it twice: remove one.")
    numbers = [(f"images of {group}", number) for group, number in given.get("images", {}).items()]
    for name, value in [*numbers, *((key, given[key]) for key in ("prompts", "attacked") if key in given)]:
        if type(value) is not int or not COUNT.accepts(value):
            raise UserError(
                f"Recipe {path}: {name} must be {COUNT.describe(int)}, not {schema.shown(value)}: write a number there."
            )


def _check_places(path: Path, recipe: Recipe) -> None:
    """Refuse what stands where it would be ignored, or where methods would be compared on other terms."""
    for where, settings in {
        "settings": recipe.settings,
        **{f"method {name!r}": own for name, own in recipe.methods.items()},
    }.items():
        refuse_consent(path, settings.get("evaluate.trust_pickle"))
        for name in settings:
            if name in DECIDED:
                raise UserError(f"Recipe {path}: {where} sets {name}, which the recipe itself decides: {DECIDED[name]}.")
            if name.startswith("export."):
                raise UserError(f"Recipe {path}: {where} sets {name}, and a comparison exports nothing: remove it.")
            if where != "settings" and (name in ("base", "device") or name.startswith(("generate.", "evaluate.", "attack."))):
                raise UserError(
                    f"Recipe {path}: {where} sets {name}, but all methods are compared on the same images' terms: put it under settings."
                )


def config_of(recipe: Recipe, folder: Path, method: str, concepts: str, seed: int) -> RunConfig:
    """The settings of one cell of the comparison in `folder`."""
    values = {"harvest.dataset": f"pocket:{folder / 'scenes'}", **recipe.settings, **recipe.methods[method]}
    values["concepts"] = [name.strip() for name in concepts.split(" + ")]  # of a concept file's too: each row erases its own
    config = override(from_dict({"base": "pocket", "seed": seed}), values)
    # what is asked about words that nobody listed must not have been seen in training
    words = [word for concept in load_concepts(config) for word in unlisted_words(concept)]
    return override(config, {"harvest.exclude": list(dict.fromkeys((*config.harvest.exclude, *words)))})


def check(recipe: Recipe, folder: Path) -> None:
    """Refuse a comparison one of whose cells could not be trained, drawn or counted here, before any work.

    Raises:
        UserError: which method and concept, and what to write instead.
    """
    stages = ("harvest", "train", "generate", *(["attack"] if recipe.attacked else []))
    for concepts in recipe.concepts:
        for method in recipe.methods:
            try:
                configs = [config_of(recipe, folder, method, concepts, seed) for seed in recipe.seeds]
                preflight.check(configs[0], stages)
            except SettingsError as error:
                raise UserError(f"Method {method!r} on {concepts!r}: {error}") from error
    for concepts in recipe.concepts:
        config = config_of(recipe, folder, next(iter(recipe.methods)), concepts, recipe.seeds[0])
        try:
            judge_of(config, bases.resolve(config.base), load_concepts(config))
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}; in a recipe evaluate.judge stands under settings.") from error


def _check_names(path: Path, what: str, names: Sequence[str]) -> None:
    """Refuse two names that would share a folder, where one's figures would stand for the other's."""
    seen: dict[str, str] = {}
    for name in dict.fromkeys(map(str, names)):
        if (other := seen.setdefault(folder_name(name), name)) != name:
            raise UserError(f"Recipe {path}: {what}s {shortened(other)} and {shortened(name)} would have one folder: rename one.")


def _mapping(path: Path, values: dict[str, Any], key: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    """The mapping under `key` of a recipe, with values of `kinds`."""
    found = values.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(item, kinds) for item in found.values()):
        raise UserError(
            f"Recipe {path}: {key} must be a mapping, not {shortened(found)}: write `{key}: {{NAME: VALUE}}` as the bundled recipes do."
        )
    return found


MAX_NAME = 60  # characters of a folder's name


def folder_name(text: str) -> str:
    """`text` as a folder's name: one folder, never one above it; what it cannot say of other scripts stands as a hash."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if name and len(name) <= MAX_NAME and text.isascii():
        return name
    return f"{name[: MAX_NAME - 9]}-{fingerprint(text)[:8]}".strip("-.")
