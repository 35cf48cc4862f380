"""What all experiments share: a base, its data with a test split, and trained runs that are found again.

In its folder: ``bench/data/{classes,captions}/`` (the pocket base's own data), ``bench/pairs/``, ``bench/embeddings/`` (the
original's, of the images of the pairs) and ``bench/runs/`` (ordinary runs; the name ends in a hash of the settings, so that two tables that ask for the same run get the same one).
"""

from __future__ import annotations

import contextlib
import gc
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, chain, digests, resources
from sd_erase.captions import cifar100, digest, open_dataset
from sd_erase.concepts import Concept, load_concepts
from sd_erase.config import RunConfig, from_dict, override, to_dict
from sd_erase.errors import UserError, unknown_choice
from sd_erase.folders import locked, working_in
from sd_erase.pairs import Pair, is_harvested, read_pairs
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import RunDir, fingerprint, read_json, replacing, write_json_atomic, write_jsonl_atomic
from sd_erase.stages import run_stage, write_config, writing

if TYPE_CHECKING:
    from sd_erase.clip import Towers

SIDES = ("classes", "captions")
CLASS_SCENES = {"train": 100, "validation": 40, "test": 50}  # of each class
CAPTION_SCENES = {"train": 2000, "validation": 400, "test": 1000}
FIRST_SEED = 8_000_000  # scenes that no component of the pocket model was trained on, and that `--dataset pocket` does not hold


class Bench:
    """A base, two data sets and the runs trained on them.

    Args:
        folder: where everything goes; what is there is not made again.
        base: name or path of the base (see `bases.resolve`).
        datasets: ``READER:PATH`` of a user's data; one of cifar100 takes the place of the classes, others that of the captions.
            Without any, the pocket base's own scenes.
        device: where to compute.
        progress: told of each stage.
        exact: take names of concepts as they are written, even where one is near a card's.
    """

    def __init__(
        self,
        folder: Path,
        base: str = "pocket",
        datasets: Sequence[str] = (),
        device: str = "auto",
        progress: Progress | None = None,
        exact: bool = False,
    ):
        self.folder, self.base_name, self.base = Path(folder), base, bases.resolve(base)
        self.device, self.progress, self.exact = device, progress or NoProgress(), exact
        self.used: dict[str, RunDir] = {}  # what the experiment under way was measured on, by path
        self.finished: list[str] = []  # the experiments that were found finished, and not done again
        self.experiment_folder = self.folder  # where the experiment under way puts its figures
        self.specs = dict.fromkeys(SIDES, "pocket")
        for spec in datasets:
            self.specs["classes" if spec.partition(":")[0] == "cifar100" else "captions"] = spec
        self._towers: dict[str, Towers] = {}
        self._contents: dict[str, str] = {}

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Be the one process that works in the folder; it is marked as ours.

        Raises:
            UserError: it holds what is not ours, or another process works in it.
        """
        return working_in(self.folder, "bench", earlier=["bench"])

    def is_pocket(self) -> bool:
        """Whether base and data are the pocket's own, on which the recipes' settings were chosen."""
        return self.base.source == str(bases.POCKET_FOLDER) and set(self.specs.values()) == {"pocket"}

    # data

    def dataset(self, side: str) -> str:
        """``READER:PATH`` of "classes" or "captions"; the pocket's scenes are rendered on first use.

        Raises:
            UserError: an unknown side.
        """
        if side not in SIDES:
            raise unknown_choice("Data of a recipe", side, SIDES)
        if self.specs[side] != "pocket":
            return self.specs[side]
        folder = self.folder / "bench" / "data" / side
        listing = folder / "metadata.jsonl"
        if not listing.is_file():
            write_jsonl_atomic(listing, render_scenes(side, folder, self.progress))
        return f"jsonl:{listing}"

    def stamp(self, side: str) -> str:
        """What tells the data of a side apart: the captions' contents, of a user's own data."""
        return self.specs[side] if self.specs[side] == "pocket" else fingerprint(self.specs[side], digest(self.specs[side]))

    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as they stand in the captions."""
        found = {cifar100.label_of(caption.text) for caption in self._captions("classes")}
        names = sorted(name for name in found if name is not None)
        if len(names) < len(found):
            raise UserError(f"Data set {self.dataset('classes')} is no set of classes: pass --dataset cifar100:PATH.")
        return tuple(names)

    def _captions(self, side: str) -> Any:
        return open_dataset(self.dataset(side), self.base, self.folder / "bench" / "data" / side)

    def concepts(self, concepts: str) -> list[Concept]:
        """The cards of ``"woman + man"``."""
        return load_concepts(from_dict({"concepts": _split(concepts), "exact": self.exact}))

    def harvested(self, concepts: str, side: str = "classes", seed: int = 0, settings: dict[str, Any] | None = None) -> RunDir:
        """The folder of the pairs of these settings, for what trains on none: the original.

        Args:
            concepts: a concept, or several joined by " + ".
            settings: by dotted name.
        """
        config = self.config(concepts, side, seed, settings or {})
        run = RunDir(
            self.folder / "bench" / "pairs" / f"{side}-{_name(concepts)}-{fingerprint(to_dict(config.harvest), seed)[:8]}"
        )
        if not is_harvested(config, run):
            self._stage("harvest", config, run)
        return self._use(run)

    def pairs(self, run: RunDir, concepts: str, side: str = "classes") -> dict[tuple[str, str], list[Pair]]:
        """The pairs to measure `run` on, by (set, split): ("forget" or "retain", "train", "validation" or "test").

        Training and validation pairs are the run's own. The test pairs are the data set's own test split, or else all images; without
        those that the run's training or validation pairs show. An image belongs to the forget set where any of its captions names a
        concept.

        Args:
            run: one that is harvested: a trained one, or `harvested`.
            concepts: a concept, or several joined by " + ".
        """
        found: dict[tuple[str, str], list[Pair]] = {
            (name, split): [] for name in ("forget", "retain") for split in ("train", "validation", "test")
        }
        used: set[str | None] = set()
        for pair in read_pairs(run):
            found[pair.set, pair.split].append(pair)
            used |= {pair.key.rpartition("#")[0] or pair.key, pair.image}
        captions = [caption for caption in self._captions(side) if caption.image]
        own = [caption for caption in captions if caption.split == "test"] or captions
        own = [caption for caption in own if not {caption.image_key, caption.image} & used]
        selected = self.concepts(concepts)
        hits = {caption.key: tuple(match for concept in selected for match in concept.find(caption.text)) for caption in own}
        forgotten = {caption.image_key for caption in own if hits[caption.key]}
        for caption in own:
            name = "forget" if caption.image_key in forgotten else "retain"
            spans = tuple((match.start, match.end) for match in hits[caption.key])
            found[name, "test"].append(Pair(caption.key, caption.image, caption.text, name, "test", None, spans, "test"))
        return found

    def check_pairs(self, found: dict[tuple[str, str], list[Pair]], split: str, concepts: str, side: str) -> None:
        """Refuse to measure on a forget or retain set that is empty.

        Raises:
            UserError: which one, and how it gets images.
        """
        for name in ("forget", "retain"):
            if not found[name, split]:
                raise UserError(
                    f"Data set {self.dataset(side)} leaves no {split} image of the {name} set of {concepts!r} beside those that are trained "
                    "on: pass data with a test split, or a smaller --set harvest.max_forget or harvest.max_retain."
                )

    # runs

    def config(self, concepts: str, side: str, seed: int, settings: dict[str, Any]) -> RunConfig:
        """The settings of a run."""
        base = {"base": self.base_name, "seed": seed, "device": self.device, "concepts": _split(concepts), "exact": self.exact}
        # as many pairs as all that docs/reproduce shows was measured with
        pairs = {"harvest.max_forget": 300, "harvest.max_retain": 900}
        return override(from_dict(base), {"harvest.dataset": self.dataset(side), **pairs, **settings})

    def run(self, settings: dict[str, Any], concepts: str, seed: int = 0, side: str = "classes") -> RunDir:
        """The trained run of these settings: harvested and trained by the ordinary stages, or found.

        Args:
            settings: by dotted name, such as ``{"train.objective": "paper", "train.towers": "both"}``.
            concepts: a concept, or several joined by " + ".
        """
        config = self.config(concepts, side, seed, settings)
        run = RunDir(self.folder / "bench" / "runs" / self._run_name(config, concepts, side))
        # finished stages are done again only where their data, their base or their own files are not what they were
        self._use(run)
        if not (is_harvested(config, run) and self._is_trained(config, run)):
            self._stage("harvest", config, run)
            shared = self._embeddings(run, side)
            if run.read_manifest("train") is None and shared.is_dir() and not run.cache.is_dir():
                with replacing(run.cache) as copy:
                    shutil.copytree(shared, copy)
            self._stage("train", config, run)
            gc.collect()  # accelerate's objects refer to each other, and would keep the trained model beside the next one
        # a process that was killed behind its training has left this to do
        if run.cache.is_dir() and not (shared := self._embeddings(run, side)).is_dir():
            shared.parent.mkdir(parents=True, exist_ok=True)
            run.cache.replace(shared)
        for over in (run.cache, run.checkpoints):
            shutil.rmtree(over, ignore_errors=True)
        return run

    def _embeddings(self, run: RunDir, side: str) -> Path:
        """Where the original's image embeddings lie, the same for every method on these pairs; they know by content what they are of."""
        return self.folder / "bench" / "embeddings" / f"{side}-{fingerprint(run.pairs, self.base.source)[:8]}"

    def _is_trained(self, config: RunConfig, run: RunDir) -> bool:
        """Whether a finished training is of the base and pairs of now, and its encoder and pairs are what it left."""
        links = chain.Chain(run, config, self.progress)
        return links.holds("train") and links.holds("harvest")

    def run_alone(self, settings: dict[str, Any], concepts: str, seed: int = 0, side: str = "classes") -> RunDir:
        """As `run`, by ``sd-erase train`` in a process of its own and in a folder of its own: its time and memory are its own."""
        config = self.config(concepts, side, seed, settings)
        run = RunDir(self.folder / "bench" / "alone" / self._run_name(config, concepts, side))
        if not self._is_trained(config, run):
            with locked(run.path, wait=True) if run.is_ours() else writing(config, run):  # a killed one's child may still train
                write_config(config, run)
            command = [sys.executable, "-m", "sd_erase", "train", "--run", str(run.path)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"Training in {run} ended with: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return self._use(run)

    def _use(self, run: RunDir) -> RunDir:
        self.used[str(run.path)] = run
        return run

    def _run_name(self, config: RunConfig, concepts: str, side: str) -> str:
        key = {**to_dict(config), "device": None, "generate": None, "evaluate": None, "attack": None, "export": None}
        key["harvest"] = {**key["harvest"], "dataset": self.stamp(side)}
        stamp = fingerprint(key, self.base.source)[:8]
        return f"{side}-{_name(concepts)}-{_name(config.train.objective)}-seed{config.seed}-{stamp}"

    def _stage(self, stage: str, config: RunConfig, run: RunDir) -> None:
        with writing(config, run):
            write_config(config, run)
            run_stage(stage, config, run, self.progress)

    def original(self) -> Towers:
        """The base's own CLIP."""
        if "original" not in self._towers:
            from sd_erase.clip import load_towers

            self._towers["original"] = load_towers(self.base, resources.device(self.device), need_images=True)
        return self._towers["original"]

    def towers(self, run: RunDir) -> Towers:
        """The erased CLIP of a run, both towers; the frozen copies beside it are the original."""
        from sd_erase.clip import load_erased_towers

        return load_erased_towers(self.base, run, resources.device(self.device))

    def measured(self, run: RunDir | None, name: str, inputs: Any, measure: Callable[[Towers], Any]) -> Any:
        """``measure(towers of run)``, kept beside the run and not computed again for the same inputs; None is the original.

        The contents of the models, of the data and of the code that measures count among the inputs.

        Args:
            inputs: what else the measurement depends on; the side of the data first.
        """
        folder = run.path if run is not None else self.folder / "bench" / "original"
        encoder = None if run is None else chain.Chain(run, from_dict({"base": self.base_name})).now("encoder")
        models = [digests.of_base(self.base, self.progress, text_only=True), digests.of_clip(self.base, self.progress), encoder]
        code = digests.of_sources("metrics", "reproduce/tables", "clip", "concepts")
        key = fingerprint(inputs, self.base.source, models, self.content(inputs[0]), code)
        path = folder / "measures" / f"{name}-{key[:8]}.json"
        kept = read_json(path) if path.is_file() else {}
        if kept.get("key") != key or kept.get("seal") != fingerprint(kept.get("value")):
            value = measure(self.towers(run) if run is not None else self.original())
            kept = {"key": key, "value": value, "seal": fingerprint(value)}
            write_json_atomic(path, kept)
        return kept["value"]

    def content(self, side: str) -> str:
        """A digest of one side's captions and images, read once."""
        if side not in self._contents:
            rows = (
                (caption.key, caption.text, caption.split, digests.of_file(Path(caption.image)))
                for caption in self._captions(side)
                if caption.image and Path(caption.image).is_file()
            )
            self._contents[side] = fingerprint(list(rows))
        return self._contents[side]


def render_scenes(side: str, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Draw the pocket's data of one side into ``folder/images`` and return its lines for the jsonl reader.

    "classes": one object an image, its class name in one of CIFAR-100's templates. "captions": scenes of up to three objects
    with five captions each. The scenes of one cast (see `world.sample_scene`) share a split.
    """
    from sd_erase.captions.pocket import CAPTIONS
    from sd_erase.pocket import world

    (folder / "images").mkdir(parents=True, exist_ok=True)
    plan: list[tuple[str, Any, list[str]]] = []
    number = FIRST_SEED
    if side == "classes":
        for label in world.CLASSES:
            for split, count in CLASS_SCENES.items():
                for _ in range(count):
                    caption = cifar100.caption_of(label, number)
                    plan.append((split, world.scene_of([label], number), [caption]))
                    number += 1
    else:
        for split, count in CAPTION_SCENES.items():
            for _ in range(count):
                scene = world.sample_scene(number, noise=False)
                plan.append((split, scene, [scene.caption, *world.captions_of(scene, CAPTIONS - 1)]))
                number += 1
    rows = []
    with progress("rendering scenes", len(plan)) as task:
        for split, scene, captions in plan:
            name = f"images/{scene.seed:08d}.jpg"
            with replacing(folder / name) as temporary:
                world.render(scene)[0].save(temporary, quality=95, subsampling=0)
            rows.append({"image": name, "captions": captions, "split": split})
            task.advance()
    return rows


def _split(concepts: str) -> list[str]:
    return [name.strip() for name in concepts.split(" + ") if name.strip()]


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60]
