"""Many erasures in one table: methods x concepts x seeds, each trained as `sd-erase train` does and asked the same questions.

Reads a recipe (YAML, see `Recipe`). Writes into its folder: ``scenes/`` (the pocket base's data), ``original/CONCEPTS/GROUP/`` (images
of the original, drawn once), ``runs/CONCEPTS/METHOD-seedN/`` (ordinary runs, each with ``probes/GROUP/`` and ``probes.json``),
``comparison.json``, ``comparison.md`` and ``contact-CONCEPTS.png``. What is there is not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import bases, chain, digests, markdown, resources, yamlfile
from sd_erase.attacks import stage as attacks
from sd_erase.concepts import Concept, load_concepts, read_concepts
from sd_erase.config import RunConfig, check_methods, from_dict, override, to_dict
from sd_erase.detection import Detector
from sd_erase.drawing import Settings, base_stamp
from sd_erase.erasure.sd import anchored
from sd_erase.errors import UserError, shortened
from sd_erase.evaluation import decides, detect_files, detector_of
from sd_erase.folders import Busy, Hold, claim, locked, working_in
from sd_erase.images import draw, files_of, sheet
from sd_erase.metrics.rates import wilson
from sd_erase.probes import Coherence, answers, probes, psnr, unlisted_words
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import Prompt
from sd_erase.rundir import RunDir, fingerprint, read_json, write_json_atomic, write_text_atomic
from sd_erase.stages import run_stage, write_config, writing

GROUPS = {"named", "unlisted", "untouched", "senses"}  # of `probes`, that have a number of images of their own
EARLIER = ("runs/*/*/config.yaml", "scenes/*.token")  # what tells the folder of a version that left no mark
REDRAWN = "anchor, other seeds"  # the floor of the Fréchet distance: the original on the same captions, from other noise


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
        raise UserError(f"Recipe {path} must be a mapping with concepts and methods, and at most {', '.join(sorted(fields))}.")
    given: dict[str, Any] = {
        key: [value] if key in ("concepts", "seeds") and isinstance(value, (str, int)) else value for key, value in values.items()
    }
    given["methods"] = {name: settings or {} for name, settings in _mapping(path, given, "methods", (dict, type(None))).items()}
    _mapping(path, given, "images", (int,))
    _mapping(path, given, "settings", (object,))
    for key, kind in (("concepts", str), ("seeds", int)):
        if key in given and not (
            isinstance(given[key], list) and given[key] and all(isinstance(item, kind) for item in given[key])
        ):
            raise UserError(f"Recipe {path}: {key} must be a list, not {given[key]!r}.")
    for key in ("prompts", "attacked"):
        if not isinstance(given.get(key, 0), int) or given.get(key, 0) < 0:
            raise UserError(f"Recipe {path}: {key} must be a whole number, not {given[key]!r}.")
    given |= {key: tuple(given[key]) for key in ("concepts", "seeds") if key in given}
    recipe = Recipe(**given)
    if recipe.images.keys() - GROUPS or recipe.images.get("named", 0) < 1:
        raise UserError(f"Recipe {path}: images must give a number for named, and for none but {', '.join(sorted(GROUPS))}.")
    check_methods(path, recipe.settings, recipe.methods)
    for what, names in (("method", list(recipe.methods)), ("concept", list(recipe.concepts))):
        _check_names(path, what, names)
    for method, settings in recipe.methods.items():
        for name in settings:
            if name in ("base", "device", "seed") or name.startswith(("generate.", "evaluate.", "attack.")):
                raise UserError(
                    f"Recipe {path}: method {method!r} sets {name}, but all methods are compared on the same images' terms: put it "
                    "under settings."
                )
    return recipe


def _check_names(path: Path, what: str, names: Sequence[str]) -> None:
    """Refuse two names that would share a folder, where one's figures would stand for the other's."""
    seen: dict[str, str] = {}
    for name in dict.fromkeys(map(str, names)):
        if (other := seen.setdefault(_name(name), name)) != name:
            raise UserError(f"Recipe {path}: {what}s {shortened(other)} and {shortened(name)} would have one folder: rename one.")


def _mapping(path: Path, values: dict[str, Any], key: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    """The mapping under `key` of a recipe, with values of `kinds`."""
    found = values.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(item, kinds) for item in found.values()):
        raise UserError(f"Recipe {path}: {key} must be a mapping, not {found!r}: see the bundled recipes.")
    return found


def compare(recipe: Recipe, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train, draw and measure every row of `recipe`, and write the table.

    Args:
        recipe: what to compare.
        folder: where everything goes; an interrupted comparison goes on from there.
        progress: told of each stage.

    Returns:
        What ``comparison.json`` holds: ``rows`` (one a method: pooled counts, spreads over seeds), ``cells`` (one a method, concept
        and seed) and ``original`` (one a concept).
    """
    with contextlib.ExitStack() as alone:
        claim(folder, "comparison", EARLIER)
        with contextlib.suppress(Busy), working_in(folder, "comparison", EARLIER):
            pass  # removes what killed processes left; another one may be at work on other concepts
        for concepts in recipe.concepts:
            alone.enter_context(_concept_lock(folder, concepts))
        return _compare(recipe, folder, progress or NoProgress())


@contextlib.contextmanager
def _concept_lock(folder: Path, concepts: str) -> Iterator[None]:
    """Be the one process at work on `concepts` in the folder of a comparison."""
    place = folder / "original" / _name(concepts)
    place.mkdir(parents=True, exist_ok=True)
    try:
        hold = Hold.take(place)
    except Busy:
        raise Busy(
            f"Concept {concepts!r} of {folder} is being worked on by another sd-erase process: wait until that has ended, leave the "
            "concept out of the recipe, or pass another folder with --output."
        ) from None
    try:
        yield
    finally:
        hold.release()


def _compare(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    bench = _Bench(recipe, folder, progress)
    cells = [
        bench.measure(method, concepts, seed)
        for concepts in recipe.concepts
        for method in recipe.methods
        for seed in recipe.seeds
    ]
    result = {
        "title": recipe.title,
        "recipe": dataclasses.asdict(recipe),
        "rows": [_row(method, [cell for cell in cells if cell["method"] == method]) for method in recipe.methods],
        "cells": cells,
        "original": bench.originals,
    }
    with locked(folder, wait=True):
        write_json_atomic(folder / "comparison.json", result)
        write_text_atomic(folder / "comparison.md", render(result))
        for concepts in recipe.concepts:
            bench.contact_sheet(concepts)
    return result


class _Bench:
    """The models, detector and original images that all cells share."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.originals: dict[str, dict[str, Any]] = {}  # concepts -> the original beside the first method
        self._models: dict[str, Any] = {}
        self._detected = self._base_stamp = self._stamp = ""  # of the detector and base; of the base; of what it is drawn with
        self._first: dict[tuple[str, str], list[str]] = {}
        # by concepts and what the groups of prompts are: methods may choose other anchors
        self._measured: dict[tuple[str, str], dict[str, Any]] = {}
        self.paths: dict[tuple[tuple[str, str], str], list[Path]] = {}
        self.features: dict[tuple[str, str], Any] = {}
        self.attacked: dict[tuple[str, str], tuple[list[str], Any, dict[str, Any]]] = {}  # prompts, latents, the control's shares

    def config(self, method: str, concepts: str, seed: int) -> RunConfig:
        """The settings of one cell."""
        values = {
            "harvest.dataset": f"pocket:{self.folder / 'scenes'}",
            **self.recipe.settings,
            **self.recipe.methods[method],
        }
        names = [name.strip() for name in concepts.split(" + ")]
        if not values.get("concept_file"):
            values["concepts"] = names
        config = override(from_dict({"base": "pocket", "seed": seed}), values)
        # what is asked about words that nobody listed must not have been seen in training
        words = [word for concept in load_concepts(config) for word in unlisted_words(concept)]
        return override(config, {"harvest.exclude": words})

    def _run(self, method: str, concepts: str, seed: int) -> RunDir:
        return RunDir(self.folder / "runs" / _name(concepts) / f"{_name(method)}-seed{seed}")

    def measure(self, method: str, concepts: str, seed: int) -> dict[str, Any]:
        """Train one cell and answer the questions, or read the answers where they are of what lies here now."""
        config = self.config(method, concepts, seed)
        run = self._run(method, concepts, seed)
        path = run.path / "probes.json"
        with writing(config, run):
            write_config(config, run)
            run_stage("harvest", config, run, self.progress)
            trained = run_stage("train", config, run, self.progress)
            found = read_concepts(run)
            groups = probes(found, trained["anchor"], bases.resolve(config.base), config.generate.prompts, self.recipe.prompts)
            inputs = self._inputs(config, run, groups)
            pictures = self._pictures(config, run, concepts, groups)
            cell = self._known(path, inputs, pictures)
            if cell is None:
                answered = self._answers(config, run, concepts, trained, found, groups)
                cell = {"method": method, "concepts": concepts, "seed": seed, "inputs": inputs, **answered}
                cell["pictures"] = digests.of_images(pictures)
                cell = json.loads(json.dumps(cell))  # as it will be read: the seal is of that
                write_json_atomic(path, {**cell, "seal": fingerprint(cell)})
        self.originals.setdefault(concepts, cell["original"])
        return cell

    def _inputs(self, config: RunConfig, run: RunDir, groups: dict[str, list[str]]) -> str:
        """All that the answers of a cell depend on, by content."""
        if not self._detected:
            self._detector = detector_of(config, run)
            self._base_stamp = base_stamp(bases.resolve(config.base), self.progress)
            self._detected = fingerprint(decides(self._detector), self._base_stamp)
        encoder = chain.Chain(run, config).now("encoder")
        code = digests.of_sources("comparison", "probes", "attacks")
        asked = (self.recipe.images, groups, self.recipe.attacked, config.seed)
        return fingerprint(to_dict(config), asked, encoder, self._detected, code)

    def _pictures(self, config: RunConfig, run: RunDir, concepts: str, groups: dict[str, list[str]]) -> list[str]:
        """The images from which the answers of a cell are counted."""
        found: list[Path] = []
        for group, prompts in {**groups, REDRAWN: groups["anchor"]}.items():
            if not self._images(group):
                continue
            folders = [self._original_folder(concepts, group, prompts)]
            folders += [run.path / "probes" / group] if group not in ("anchor", REDRAWN) else []
            wanted = self._settings(config, group)
            found += [path for folder in folders for path in files_of([Prompt(text) for text in prompts], folder, wanted)]
        return [str(path) for path in found]

    def _known(self, path: Path, inputs: str, pictures: list[str]) -> dict[str, Any] | None:
        """The answers that are kept in `path`, if nobody changed them and they are of these inputs and images."""
        try:
            known = read_json(path)
            seal = known.pop("seal", None)
        except (FileNotFoundError, ValueError, AttributeError):
            return None
        if known.get("inputs") != inputs or seal != fingerprint(known):
            return None
        return known if known.get("pictures") == digests.of_images(pictures) else None

    def _answers(
        self,
        config: RunConfig,
        run: RunDir,
        concepts: str,
        trained: dict[str, Any],
        found: list[Concept],
        groups: dict[str, list[str]],
    ) -> dict[str, Any]:
        """Draw with one cell's encoder and answer the questions."""
        pipeline, detector, coherence = self._shared(config)
        original = self._original(config, concepts, groups, found, pipeline, detector, coherence)
        from sd_erase.pipeline import erased_pipeline

        erased = erased_pipeline(pipeline, run)
        stamp = fingerprint(self._stamp, chain.Chain(run, config).now("encoder"))
        cell: dict[str, Any] = {"groups": {}}
        key = concepts, fingerprint(groups)
        for group, prompts in groups.items():
            if group == "anchor" or not self._images(group):
                continue
            paths, captions = self._draw(config, erased, prompts, run.path / "probes" / group, group, stamp)
            cell["groups"][group] = answers(
                group, captions, detect_files(detector, paths, f"{group} detections", self.progress)[0], found, detector
            )
            if group == "untouched":
                cell["groups"][group]["psnr"] = statistics.median(psnr(self.paths[key, group], paths))
            if group == "named" and "anchor" in groups:
                features = coherence.features(paths)
                anchors = [caption for caption in groups["anchor"] for _ in range(self._images("anchor"))]
                cell["groups"][group]["clip_score"] = coherence.clip_score(features, anchors)
                cell["groups"][group]["frechet"] = coherence.frechet(self.features[key], features)
        cell["original"] = dict(original)
        if self.recipe.attacked:
            cell["attacked"] = self.recipe.attacked
            cell["attack"], cell["original"]["attack"] = self._attack(
                config, concepts, erased, found, trained["anchor"], groups, run, stamp
            )
        cell["seconds"] = trained["seconds"]
        cell["peak_memory_mb"] = trained["peak_memory_mb"]
        cell["clip_similarity"] = _similarity(run)
        return cell

    def _shared(self, config: RunConfig) -> tuple[Any, Detector, Coherence]:
        if not self._models:
            import torch

            from sd_erase.pipeline import load_original

            base, device = bases.resolve(config.base), resources.device(config.device)
            self._models = {"pipeline": load_original(base, device, torch.float32), "coherence": Coherence(base, device)}
            self._stamp = fingerprint(base_stamp(base), device.type)  # only now does a hub's model surely lie here
        return self._models["pipeline"], self._detector, self._models["coherence"]

    def _settings(self, config: RunConfig, group: str) -> Settings:
        """How the images of a group are drawn."""
        settings = Settings.of(dataclasses.replace(config, seed=0), bases.resolve(config.base))
        return dataclasses.replace(settings, images_per_prompt=self._images(group), seed=1000 if group == REDRAWN else 0)

    def _original_folder(self, concepts: str, group: str, prompts: list[str]) -> Path:
        """Where the original's images of a group lie; methods that choose another anchor ask for other images."""
        first = self._first.setdefault((concepts, group), prompts)
        name = _name(group) if prompts == first else f"{_name(group)}-{fingerprint(prompts)[:8]}"
        return self.folder / "original" / _name(concepts) / name

    def _images(self, group: str) -> int:
        return self.recipe.images.get("named" if group in ("anchor", REDRAWN) else group, 0)

    def _draw(
        self, config: RunConfig, pipeline: Any, prompts: Sequence[str], folder: Path, group: str, stamp: str
    ) -> tuple[list[Path], list[str]]:
        """The images of a group and the prompt of each."""
        wanted = self._settings(config, group)
        paths = draw(pipeline, [Prompt(prompt) for prompt in prompts], folder, wanted, stamp=stamp, progress=self.progress)
        return paths, [prompt for prompt in prompts for _ in range(wanted.images_per_prompt)]

    def _original(
        self,
        config: RunConfig,
        concepts: str,
        groups: dict[str, list[str]],
        found: list[Concept],
        pipeline: Any,
        detector: Detector,
        coherence: Coherence,
    ) -> dict[str, Any]:
        """The answers of the original model, drawn and measured once for a set of concepts and their anchors."""
        key = concepts, fingerprint(groups)
        if key in self._measured:
            return self._measured[key]
        result: dict[str, Any] = {}
        for group, prompts in {**groups, REDRAWN: groups["anchor"]}.items():
            if not self._images(group):
                continue
            folder = self._original_folder(concepts, group, prompts)
            paths, captions = self._draw(config, pipeline, prompts, folder, group, self._stamp)
            self.paths[key, group] = paths
            on_anchor = group in ("anchor", REDRAWN)
            # what stands beside the concept is the prompt's own matter: "an apple laptop" asks for no apple, "an apple thing" would
            asked = [prompt for prompt in groups["named"] for _ in range(self._images("named"))] if on_anchor else captions
            result[group] = answers(
                group, asked, detect_files(detector, paths, f"{group} detections", self.progress)[0], found, detector
            )
            if on_anchor:
                features = coherence.features(paths)
                result[group]["clip_score"] = coherence.clip_score(features, captions)
                if group == "anchor":
                    self.features[key] = features
                else:
                    result[group]["frechet"] = coherence.frechet(self.features[key], features)
        self._measured[key] = result
        return result

    def _attack(
        self,
        config: RunConfig,
        concepts: str,
        erased: Any,
        found: list[Concept],
        anchors: dict[str, str],
        groups: dict[str, list[str]],
        run: RunDir,
        stamp: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prefix search against one cell's encoder, and against the original with the anchor in the concept's place."""
        import torch

        original, detector, _ = self._shared(config)
        settings, key = self._settings(config, "named"), (concepts, fingerprint(groups))
        labels = frozenset(label for concept in found for label in concept.labels) & detector.labels
        if key not in self.attacked:
            prompts = groups["named"][:: max(1, len(groups["named"]) // self.recipe.attacked)][: self.recipe.attacked]
            folder, known = self._original_folder(concepts, "attack", groups["anchor"]), self._stamp
            latents = attacks.references(original, prompts, folder / "shown", settings, detector, labels, stamp=known)
            plain = [anchored(prompt, found, anchors) for prompt in latents]
            shown = torch.stack(list(latents.values()))
            searched = attacks.measure(
                original, plain, shown, folder, config.attack, settings, detector, labels, stamp=known, shown=self._detected,
                arms=("search",), progress=self.progress,
            )  # fmt: skip
            self.attacked[key] = list(latents), shown, attacks.shares(searched)
        prompts, shown, control = self.attacked[key]
        rows = attacks.measure(
            erased, prompts, shown, run.path / "probes" / "attack", config.attack, settings, detector, labels, stamp=stamp,
            shown=self._detected, arms=("random", "search"), progress=self.progress,
        )  # fmt: skip
        return attacks.shares(rows), control

    def contact_sheet(self, concepts: str, prompts: int = 6) -> None:
        """The first image of some prompts: the original on the prompt and on the anchor's, then each method's first seed."""
        from PIL import Image

        first = self.folder / "original" / _name(concepts)
        folders = {"original": first / "named", "anchor": first / "anchor"} | {
            method: self._run(method, concepts, self.recipe.seeds[0]).path / "probes" / "named" for method in self.recipe.methods
        }
        # a recipe that asked for more images than it does now leaves some that not every method has
        common = set.intersection(*({path.name for path in folder.glob("*.png")} for folder in folders.values()))
        first_of = {name.partition("-")[0]: name for name in sorted(common, reverse=True)}  # of a prompt the lowest name
        shown = [first_of[prompt] for prompt in sorted(first_of)][::8][:prompts]
        captions = []
        for name in shown:
            with Image.open(folders["original"] / name) as image:
                captions.append(image.info["prompt"])
        rows: dict[str, Sequence[Path]] = {row: [folder / name for name in shown] for row, folder in folders.items()}
        sheet(captions, rows, self.folder / f"contact-{_name(concepts)}.png")


MAX_NAME = 60  # characters of a folder's name


def _name(text: str) -> str:
    """`text` as a folder's name: one folder, never one above it; what it cannot say of other scripts stands as a hash."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if name and len(name) <= MAX_NAME and text.isascii():
        return name
    return f"{name[: MAX_NAME - 9]}-{fingerprint(text)[:8]}".strip("-.")


def _similarity(run: RunDir) -> dict[str, float] | None:
    """CLIP's mean cosine of the held-out forget pairs before and after (the paper's forgetting term), where images exist."""
    from sd_erase.rundir import read_jsonl

    best = (run.read_manifest("train") or {}).get("best_step")
    terms = {row["step"]: row["terms"] for row in read_jsonl(run.metrics, finite=False) if row["split"] == "validation"}
    if "forgetting" not in terms.get(0, {}):
        return None
    return {"before": terms[0]["forgetting"], "after": terms[best]["forgetting"]}


def _row(method: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """One method over all its concepts and seeds: pooled counts, and the spread of each rate over the seeds."""
    return {
        "method": method,
        "cells": len(cells),
        **{
            name: _pooled(cells, *where)
            for name, where in {
                "named": ("named", "target"),
                "unlisted": ("unlisted", "target"),
                "companions": ("named", "companions"),
                "doubled": ("named", "doubled"),
                "unnamed": ("named", "unnamed"),
                "untouched": ("untouched", "companions"),
                "senses": ("senses", "companions"),
                "senses_target": ("senses", "target"),
            }.items()
        },
        **{
            name: _mean([cell["groups"][group].get(name) for cell in cells if group in cell["groups"]])
            for group, name in (("untouched", "psnr"), ("named", "clip_score"), ("named", "frechet"))
        },
        **{f"attack_{arm}": _pooled_attack(cells, arm) for arm in ("random", "search")},
        "companions_of_anchor": _ratio(cells, "named", "companions", "anchor"),
        "untouched_of_original": _ratio(cells, "untouched", "companions", "untouched"),
        "clip_similarity": _mean([(cell["clip_similarity"] or {}).get("after") for cell in cells]),
        "seconds": _mean([cell["seconds"] for cell in cells]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _pooled(cells: Sequence[dict[str, Any]], group: str, name: str) -> dict[str, Any] | None:
    """Count, number, rate and Wilson's interval over all cells, and the lowest and highest rate of one seed."""
    counts = [(cell["seed"], cell["groups"][group][name]) for cell in cells if group in cell["groups"]]
    n = sum(each["n"] for _, each in counts)
    if not n:
        return None
    by_seed: dict[int, list[int]] = {}
    for seed, each in counts:
        so_far = by_seed.setdefault(seed, [0, 0])
        so_far[0], so_far[1] = so_far[0] + each["count"], so_far[1] + each["n"]
    rates = [count / number for count, number in by_seed.values()]
    count = sum(each["count"] for _, each in counts)
    low, high = wilson(count, n)
    return {"count": count, "n": n, "rate": count / n, "low": low, "high": high, "seeds": [min(rates), max(rates)]}


def _pooled_attack(cells: Sequence[dict[str, Any]], arm: str) -> dict[str, Any] | None:
    """As `_pooled`, of the images that an attack drew."""
    under = [{"seed": cell["seed"], "groups": {"attack": cell["attack"][arm]}} for cell in cells if "attack" in cell]
    return _pooled(under, "attack", "images") if under else None


def _ratio(cells: Sequence[dict[str, Any]], group: str, name: str, against: str) -> float | None:
    """Of what the original draws in group `against`, how much the erased model draws in `group`."""
    pairs = [(cell["groups"][group][name], cell["original"][against][name]) for cell in cells if group in cell["groups"]]
    before = sum(original["count"] for _, original in pairs)
    return sum(erased["count"] for erased, _ in pairs) / before if before else None


COLUMNS = (
    ("concept, listed words", "named"),
    ("concept, unlisted words", "unlisted"),
    ("companions, of the original's on the anchor", "companions_of_anchor"),
    ("drawn twice", "doubled"),
    ("unnamed objects", "unnamed"),
    ("untouched prompts, of the original's", "untouched_of_original"),
    ("PSNR, dB", "psnr"),
    ("spared senses", "senses"),
    ("random words before it", "attack_random"),
    ("found words before it", "attack_search"),
    ("CLIPScore", "clip_score"),
    ("Fréchet", "frechet"),
    ("CLIP similarity", "clip_similarity"),
    ("s", "seconds"),
)


def render(result: dict[str, Any]) -> str:
    """The table as Markdown: the original, then one line a method."""
    recipe = result["recipe"]
    original = list(result["original"].values())

    def total(group: str, *names: str) -> str:
        counts = [one[group] for one in original if group in one]
        for name in names:
            counts = [each[name] for each in counts]
        n = sum(each["n"] for each in counts)
        return _percent(sum(each["count"] for each in counts) / n) if n else "–"

    first = {
        "named": total("named", "target"), "unlisted": total("unlisted", "target"), "companions_of_anchor": "100 %",
        "doubled": f"{total('named', 'doubled')}; anchor {total('anchor', 'doubled')}",
        "unnamed": f"{total('named', 'unnamed')}; anchor {total('anchor', 'unnamed')}",
        "attack_random": "–",
        "attack_search": f"anchor {total('attack', 'search', 'images')}",
        "untouched_of_original": "100 %", "psnr": "–", "senses": total("senses", "companions"),
        "clip_score": _number(_mean([one["anchor"].get("clip_score") for one in original if "anchor" in one])),
        "frechet": _number(_mean([one[REDRAWN].get("frechet") for one in original if REDRAWN in one])),
        "clip_similarity": _number(_mean([(cell["clip_similarity"] or {}).get("before") for cell in result["cells"]]), 2),
        "seconds": "",
    }  # fmt: skip
    lines = [
        f"# {markdown.text(result['title'])}",
        "",
        f"Concepts: {markdown.text(', '.join(recipe['concepts']))}. Training seeds: {', '.join(map(str, recipe['seeds']))}. Images a prompt: "
        + ", ".join(f"{name} {number}" for name, number in recipe["images"].items())
        + ". Wilson 95 % intervals over all images; in brackets the lowest and highest seed.",
        "",
        *markdown.table(
            ["method", *(title for title, _ in COLUMNS)],
            [
                ["original", *(first[key] for _, key in COLUMNS)],
                *([row["method"], *(_cell(row[key], key) for _, key in COLUMNS)] for row in result["rows"]),
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(value: Any, key: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        low, high = value["seeds"]
        spread = f" ({100 * low:.1f}–{100 * high:.1f})" if high > low else ""
        return f"{_percent(value['rate'])} [{100 * value['low']:.0f}–{100 * value['high']:.0f}]{spread}"
    if key.endswith(("_of_anchor", "_of_original")):
        return _percent(value)
    return _number(value, 2 if key == "clip_similarity" else 0 if key == "seconds" else 1)
