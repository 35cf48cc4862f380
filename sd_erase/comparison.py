"""Many erasures in one table: methods x concepts x seeds, each trained as `sd-erase train` does and asked the same questions.

Reads a recipe (YAML, see `Recipe`). Writes into its folder: ``scenes/`` (the pocket base's data), ``original/CONCEPTS/GROUP/`` (images
of the original, drawn once), ``runs/CONCEPTS/METHOD-seedN/`` (ordinary runs, each with ``probes/GROUP/`` and ``probes.json``),
``comparison.json``, ``comparison.md`` and ``contact-CONCEPTS.png``. What is there is not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_erase import bases, chain, digests, resources
from sd_erase.attacks import stage as attacks
from sd_erase.comparison_recipe import Recipe as Recipe
from sd_erase.comparison_recipe import check, config_of
from sd_erase.comparison_recipe import folder_name as _name
from sd_erase.comparison_recipe import read_recipe as read_recipe
from sd_erase.comparison_table import REDRAWN, method_row
from sd_erase.comparison_table import render as render
from sd_erase.concepts import Concept, read_concepts
from sd_erase.config import RunConfig, to_dict
from sd_erase.detection import Detector
from sd_erase.drawing import Settings, base_stamp
from sd_erase.erasure.sd import anchored
from sd_erase.evaluation import decides, detect_files
from sd_erase.folders import Busy, Hold, claim, locked, working_in
from sd_erase.images import draw, files_of, sheet
from sd_erase.judging import calibrate, calibrations, judge_of, labelled, refuse_erased_of
from sd_erase.probes import Coherence, answers, probes, psnr, quantile
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import Prompt
from sd_erase.rundir import RunDir, fingerprint, read_json, write_json_atomic, write_text_atomic
from sd_erase.stages import run_stage, write_config, writing

EARLIER = ("runs/*/*/config.yaml", "scenes/*.token")  # what tells the folder of a version that left no mark


def compare(recipe: Recipe, folder: Path, progress: Progress | None = None, done: list[str] | None = None) -> dict[str, Any]:
    """Train, draw and measure every row of `recipe`, and write the table.

    Args:
        recipe: what to compare.
        folder: where everything goes; an interrupted comparison goes on from there.
        progress: told of each stage.
        done: gets what was trained, drawn, counted or written; nothing where all of it was there.

    Returns:
        What ``comparison.json`` holds: ``rows`` (one a method: pooled counts, spreads over seeds), ``cells`` (one a method, concept
        and seed) and ``original`` (one a concept).

    Raises:
        UserError: a cell whose settings cannot be used here, before any of them is trained.
    """
    check(recipe, folder)
    done = [] if done is None else done
    with contextlib.ExitStack() as alone:
        claim(folder, "comparison", EARLIER)
        with contextlib.suppress(Busy), working_in(folder, "comparison", EARLIER):
            pass  # removes what killed processes left; another one may be at work on other concepts
        for concepts in recipe.concepts:
            alone.enter_context(_concept_lock(folder, concepts))
        return _compare(recipe, folder, progress or NoProgress(), done)


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


def _compare(recipe: Recipe, folder: Path, progress: Progress, done: list[str]) -> dict[str, Any]:
    bench = _Bench(recipe, folder, progress, done)
    cells = [
        bench.measure(method, concepts, seed)
        for concepts in recipe.concepts
        for method in recipe.methods
        for seed in recipe.seeds
    ]
    result = {
        "title": recipe.title,
        "recipe": dataclasses.asdict(recipe),
        "rows": [method_row(method, [cell for cell in cells if cell["method"] == method]) for method in recipe.methods],
        "cells": cells,
        "original": bench.originals,
    }
    with locked(folder, wait=True):
        if done or not _is_written(result, folder):
            done.append("tables")
            write_json_atomic(folder / "comparison.json", result)
            write_text_atomic(folder / "comparison.md", render(result))
            for concepts in recipe.concepts:
                bench.contact_sheet(concepts)
    return result


def _is_written(result: dict[str, Any], folder: Path) -> bool:
    """Whether the folder holds the tables and sheets of `result`."""
    table, sheets = folder / "comparison.md", [folder / _sheet(concepts) for concepts in result["recipe"]["concepts"]]
    try:
        known = read_json(folder / "comparison.json")
        text = table.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return bool(known == json.loads(json.dumps(result))) and text == render(result) and all(map(Path.is_file, sheets))


def _sheet(concepts: str) -> str:
    return f"contact-{_name(concepts)}.png"


class _Bench:
    """The models, judge and original images that all cells share."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress, done: list[str]):
        self.recipe, self.folder, self.progress, self.done = recipe, folder, progress, done
        self.originals: dict[str, dict[str, Any]] = {}  # concepts -> the original beside the first method
        self._models: dict[str, Any] = {}
        self._base_stamp = self._stamp = ""  # of the base; of what it is drawn with
        self._judges: dict[tuple[str, str], Detector] = {}  # by concepts and anchors: a CLIP is asked for words
        self._first: dict[tuple[str, str], list[str]] = {}
        # by concepts and what the groups of prompts are: methods may choose other anchors
        self._measured: dict[tuple[str, str], dict[str, Any]] = {}
        self.paths: dict[tuple[tuple[str, str], str], list[Path]] = {}
        self.features: dict[tuple[str, str], Any] = {}
        self.attacked: dict[tuple[str, str], tuple[list[str], Any, dict[str, Any]]] = {}  # prompts, latents, the control's shares

    def config(self, method: str, concepts: str, seed: int) -> RunConfig:
        """The settings of one cell."""
        return config_of(self.recipe, self.folder, method, concepts, seed)

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
            judge = self._judge(config, run, concepts, found, trained["anchor"])
            found = labelled(found, judge)
            groups = probes(found, trained["anchor"], bases.resolve(config.base), config.generate.prompts, self.recipe.prompts)
            inputs = self._inputs(config, run, groups, judge)
            pictures = self._pictures(config, run, concepts, groups)
            cell = self._known(path, inputs, pictures)
            if cell is None:
                answered = self._answers(config, run, concepts, trained, found, groups, judge)
                cell = {"method": method, "concepts": concepts, "seed": seed, "inputs": inputs, **answered}
                cell["pictures"] = digests.of_images(pictures)
                cell = json.loads(json.dumps(cell))  # as it will be read: the seal is of that
                write_json_atomic(path, {**cell, "seal": fingerprint(cell)})
                run.done.append("probes")
        if run.done:
            self.done.append(str(run))
        self.originals.setdefault(concepts, cell["original"])
        return cell

    def _judge(self, config: RunConfig, run: RunDir, concepts: str, found: list[Concept], anchors: dict[str, str]) -> Detector:
        """The judge of a set of concepts and their anchors; that it is not this run's erased encoder is looked at each time."""
        base, key = bases.resolve(config.base), (concepts, fingerprint(anchors))
        if key not in self._judges:
            self._judges = {key: judge_of(config, base, found, anchors)}  # one CLIP in memory
        refuse_erased_of(self._judges[key], base, run)
        return self._judges[key]

    def _detected(self, judge: Detector) -> str:
        """Of the judge and the base."""
        return fingerprint(decides(judge), self._base_stamp)

    def _inputs(self, config: RunConfig, run: RunDir, groups: dict[str, list[str]], judge: Detector) -> str:
        """All that the answers of a cell depend on, by content."""
        self._base_stamp = self._base_stamp or base_stamp(bases.resolve(config.base), self.progress)
        encoder = chain.Chain(run, config).now("encoder")
        code = digests.of_sources("comparison", "probes", "attacks")
        asked = (self.recipe.images, groups, self.recipe.attacked, config.seed)
        return fingerprint(to_dict(config), asked, encoder, self._detected(judge), code)

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
        detector: Detector,
    ) -> dict[str, Any]:
        """Draw with one cell's encoder and answer the questions."""
        pipeline, coherence = self._shared(config)
        calibrate(
            detector,
            config,
            bases.resolve(config.base),
            self.folder / "original" / _name(concepts),
            self.progress,
            lambda: pipeline,
        )
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
            cell["groups"][group] = self._counted(group, captions, paths, found, detector)
            if group == "untouched":
                told = psnr(self.paths[key, group], paths)
                cell["groups"][group]["psnr"] = statistics.median(told)
                cell["groups"][group]["psnr_tenth"] = quantile(told, 0.1)
            if group == "named" and "anchor" in groups:
                features = coherence.features(paths)
                anchors = [caption for caption in groups["anchor"] for _ in range(self._images("anchor"))]
                cell["groups"][group]["clip_score"] = coherence.clip_score(features, anchors)
                cell["groups"][group]["frechet"] = coherence.frechet(self.features[key], features)
        cell["original"] = dict(original)
        if self.recipe.attacked:
            cell["attacked"] = self.recipe.attacked
            cell["attack"], cell["original"]["attack"] = self._attack(
                config, concepts, erased, found, trained["anchor"], groups, run, stamp, detector
            )
        cell["judge"] = {key: detector.card[key] for key in ("name", "weights", "weights_sha256")}
        cell["calibrations"] = calibrations(detector)
        cell["seconds"] = trained["seconds"]
        cell["peak_memory_mb"] = trained["peak_memory_mb"]
        cell["clip_similarity"] = _similarity(run)
        return cell

    def _counted(
        self, group: str, prompts: Sequence[str], paths: Sequence[Path], concepts: list[Concept], detector: Detector
    ) -> dict[str, Any]:
        seen, pictures = detect_files(detector, paths, f"{group} detections", self.progress)
        return answers(group, prompts, seen, pictures, concepts, detector)

    def _shared(self, config: RunConfig) -> tuple[Any, Coherence]:
        if not self._models:
            import torch

            from sd_erase.pipeline import load_original

            base, device = bases.resolve(config.base), resources.device(config.device)
            self._models = {"pipeline": load_original(base, device, torch.float32), "coherence": Coherence(base, device)}
            self._stamp = fingerprint(base_stamp(base), device.type)  # only now does a hub's model surely lie here
        return self._models["pipeline"], self._models["coherence"]

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
            result[group] = self._counted(group, asked, paths, found, detector)
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
        detector: Detector,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prefix search against one cell's encoder, and against the original with the anchor in the concept's place."""
        import torch

        original, _ = self._shared(config)
        settings, key = self._settings(config, "named"), (concepts, fingerprint(groups))
        labels = frozenset(label for concept in found for label in concept.labels) & detector.labels
        if key not in self.attacked:
            prompts = groups["named"][:: max(1, len(groups["named"]) // self.recipe.attacked)][: self.recipe.attacked]
            folder, known = self._original_folder(concepts, "attack", groups["anchor"]), self._stamp
            latents = attacks.references(original, prompts, folder / "shown", settings, detector, labels, stamp=known)
            plain = [anchored(prompt, found, anchors) for prompt in latents]
            shown = torch.stack(list(latents.values()))
            searched = attacks.measure(
                original, plain, shown, folder, config.attack, settings, detector, labels, stamp=known, shown=self._detected(detector),
                arms=("search",), progress=self.progress,
            )  # fmt: skip
            self.attacked[key] = list(latents), shown, attacks.shares(searched)
        prompts, shown, control = self.attacked[key]
        rows = attacks.measure(
            erased, prompts, shown, run.path / "probes" / "attack", config.attack, settings, detector, labels, stamp=stamp,
            shown=self._detected(detector), arms=("random", "search"), progress=self.progress,
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
        sheet(captions, rows, self.folder / _sheet(concepts))


def _similarity(run: RunDir) -> dict[str, float] | None:
    """CLIP's mean cosine of the held-out forget pairs before and after (the paper's forgetting term), where images exist."""
    from sd_erase.rundir import read_jsonl

    best = (run.read_manifest("train") or {}).get("best_step")
    terms = {row["step"]: row["terms"] for row in read_jsonl(run.metrics, finite=False) if row["split"] == "validation"}
    if "forgetting" not in terms.get(0, {}):
        return None
    return {"before": terms[0]["forgetting"], "after": terms[best]["forgetting"]}
