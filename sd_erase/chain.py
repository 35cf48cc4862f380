"""What each figure belongs to: base weights, pairs, encoder, images, detections, figures, each bound to the next by content.

A stage's manifest keeps the digests of what the stage read (``from``) and of what it wrote (``made``). A link holds where both are
still the same; no time of a file is looked at. Whoever shows a figure asks here first, and where a link is broken shows the sentence
that names the command that mends it in place of the figure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sd_erase import bases, digests, resources
from sd_erase.bases import Base, TextEncoder
from sd_erase.config import RunConfig
from sd_erase.digests import Contents, difference
from sd_erase.errors import UserError
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir, fingerprint, read_jsonl

OK, BROKEN, MISSING = "ok", "broken", "missing"
GONE = "gone"  # in place of the digest of a file that should be there
NOT_RECORDED = "not recorded"  # by the version that ran the stage
NOT_CHECKED = "not checked"  # what it was made from is not at hand


@dataclass(frozen=True)
class Stage:
    """What a stage reads and writes, and how to say what it did."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    did: str
    not_yet: str


STAGES = {
    "harvest": Stage((), ("pairs", "concepts"), "the captions were harvested", "no captions were harvested yet"),
    "train": Stage(
        ("text", "clip", "pairs", "concepts", "pictures"),
        ("encoder", "record"),
        "the encoder was trained",
        "no encoder was trained yet",
    ),
    "generate": Stage(("base", "encoder", "prompts"), ("images",), "the images were drawn", "no images were drawn yet"),
    "evaluate": Stage(
        ("images", "concepts"), ("detections", "figures"), "the figures were counted", "the images were not evaluated yet"
    ),
    "attack": Stage(
        ("base", "encoder", "concepts"), ("attacks", "attack"), "the encoder was attacked", "the encoder was not attacked yet"
    ),
    "report": Stage(("encoder", "images", "figures"), ("page",), "the page was written", "no page was written yet"),
}
TITLES = {
    "text": "the base model's text encoder",
    "clip": "the CLIP model beside it",
    "base": "the base model",
    "pairs": "the run's pairs",
    "concepts": "the run's concepts",
    "pictures": "an image of the pairs",
    "encoder": "the erased encoder",
    "record": "the record of the training",
    "prompts": "a list of prompts",
    "attack prompts": "a list of prompts",
    "images": "a drawn image or their index",
    "detections": "a list of detections",
    "figures": "the evaluation",
    "attacks": "what the attack drew and found",
    "attack": "the attack's figures",
    "page": "the page",
}
ABOVE = {  # the stages on whose work a stage rests, the first first
    "harvest": ("harvest",),
    "train": ("harvest", "train"),
    "generate": ("harvest", "train", "generate"),
    "evaluate": ("harvest", "train", "generate", "evaluate"),
    "attack": ("harvest", "train", "attack"),
    "report": ("harvest", "train", "generate", "evaluate", "report"),
}


@dataclass(frozen=True)
class Link:
    """Whether what a stage made is still what it made, of what it was made from."""

    stage: str
    state: str  # OK, BROKEN, MISSING, NOT_RECORDED or NOT_CHECKED
    reason: str = ""  # a clause without a full stop; "" where the link holds


class Chain:
    """The links of one run. Contents are read once by each `Chain`.

    Args:
        run: the run.
        config: its settings, of which the base and ``train.clip`` are read.
        progress: told of large files that are read.
    """

    def __init__(self, run: RunDir, config: RunConfig, progress: Progress | None = None):
        self.run, self._config, self._progress = run, config, progress
        self._now: dict[str, Contents | None] = {}

    @cached_property
    def base(self) -> Base | None:
        """The base with the CLIP partner that the settings name, or None where there is no such base here."""
        try:
            base = bases.resolve(self._config.base)
        except UserError:
            return None
        own = self._config.train.clip
        return dataclasses.replace(base, clip_partner=str(Path(own).expanduser())) if own else base

    def now(self, name: str) -> Contents | None:
        """What `name` of `TITLES` is now; None where it is not at hand and nothing can be said."""
        if name not in self._now:
            self._now[name] = self._read(name)
        return self._now[name]

    def _read(self, name: str) -> Contents | None:
        run, base = self.run, self.base
        if name in ("base", "text", "clip"):
            if base is None:
                return None
            if name == "clip":
                return digests.of_clip(base, self._progress)
            return digests.of_base(base, self._progress, text_only=name == "text")
        if name == "pictures":
            try:
                return digests.of_images(_pictures(run))
            except (ValueError, AttributeError):  # damaged pairs, which a link of their own tells of
                return None
        if name in ("prompts", "attack prompts"):
            stage = "generate" if name == "prompts" else "attack"
            recorded = ((run.read_manifest(stage) or {}).get("from") or {}).get(name) or {}
            return prompts(list(recorded))
        if name == "images":
            return _images(run)
        if name == "attacks":
            images = sorted(run.attacks.rglob("*.png"))
            drawn = [[path.relative_to(run.attacks).as_posix(), digests.of_file(path)] for path in images]
            return {**self._files(name), "images": fingerprint(drawn)} if images else self._files(name)
        return self._files(name)

    def _files(self, name: str) -> Contents:
        """The digests of the run's own files that make up `name`."""
        run = self.run
        files = {
            "pairs": [run.pairs],
            "concepts": [run.concepts],
            "encoder": [path for path in run.encoder.rglob("*") if path.suffix in (".safetensors", ".json")] + [run.clip],
            "record": list(run.path.glob("metrics*.jsonl")),
            "detections": list(run.detections.glob("*.jsonl")),
            "figures": [run.report / "evaluation.json", run.report / "evaluation.md"],
            "attacks": [run.attacks / "prefix.jsonl", run.attacks / "control" / "prefix.jsonl"],
            "attack": [run.report / "attack.json", run.report / "attack.md"],
            "page": [run.report / "report.html", run.report / "report.json"],
        }[name]
        return digests.of_files(run.path, filter(Path.is_file, files), self._progress)

    def reads(self, stage: str) -> dict[str, Contents | None]:
        """What `stage` reads, as it is now, for the stage's manifest (``from``)."""
        return {name: self.now(name) for name in STAGES[stage].reads}

    def makes(self, stage: str) -> dict[str, Contents | None]:
        """What `stage` has just written, for its manifest (``made``)."""
        for name in STAGES[stage].makes:
            self._now.pop(name, None)
        return {name: self.now(name) for name in STAGES[stage].makes}

    def link(self, stage: str) -> Link:
        """Whether the files of `stage` are what it wrote, and what it read is what it was then."""
        manifest = self.run.read_manifest(stage)
        if manifest is None:
            return Link(stage, MISSING, STAGES[stage].not_yet)
        if not isinstance(manifest.get("made"), dict):
            return Link(stage, NOT_RECORDED, f"an earlier version of sd-erase did not record what {STAGES[stage].did} from")
        unchecked = ""
        for name, recorded in (manifest.get("from") or {}).items():
            found = self.now(name) if name in TITLES else None
            if recorded is None or found is None or self._is_partly_cached(name, recorded, found):
                unchecked = unchecked or f"{TITLES.get(name, name)} is not at hand and could not be checked"
            elif where := difference(recorded, found):
                return Link(stage, BROKEN, _changed(name, where, found, stage))
        for name, recorded in manifest["made"].items():
            found = self.now(name) if name in TITLES else None
            if found is not None and (where := difference(recorded or {}, found)):
                return Link(stage, BROKEN, _changed(name, where, found, stage))
        return Link(stage, NOT_CHECKED, unchecked) if unchecked else Link(stage, OK)

    def _is_partly_cached(self, name: str, recorded: Contents, found: Contents) -> bool:
        """Whether a hub's model lies in the cache in part, as after a clean-up."""
        base = self.base
        if base is None or name not in ("base", "text", "clip"):
            return False
        source = base.clip_partner if name == "clip" else base.source
        return not digests.is_local(source) and bool(recorded.keys() - found.keys())

    def holds(self, stage: str) -> bool:
        """Whether the link of one stage may be relied on: it holds, or nothing is known against it."""
        return self.link(stage).state in (OK, NOT_CHECKED)

    def fault(self, stage: str) -> Link | None:
        """The first link up to that of `stage` on which no figure may be shown.

        That an earlier version did not record how an encoder was trained is none: figures belong to the encoder itself.
        """
        for name in ABOVE[stage]:
            link = self.link(name)
            if link.state == BROKEN:
                return link
            if link.state in (MISSING, NOT_RECORDED) and not self._tolerated(link, stage):
                return link
        return None

    def _tolerated(self, link: Link, stage: str) -> bool:
        """Whether the work of `stage` may be relied on although a link before it says nothing."""
        if link.stage == "harvest":  # what the training read of it is in the training's own link
            return True
        if link.stage != "train":
            return False
        # images of the original alone need no training
        return link.state == NOT_RECORDED or (stage != "train" and not any(self.run.encoder.rglob("*.safetensors")))

    def require(self, stage: str) -> None:
        """Refuse to build on a broken link.

        Raises:
            UserError: what is wrong up to `stage`, and the command that mends it.
        """
        if (link := self.fault(stage)) is not None:
            raise UserError(f"Run {self.run}: {self.sentence(link, stage)}")

    def sentence(self, link: Link, last: str) -> str:
        """What is wrong, and the commands that mend it up to those of the stage `last`."""
        return f"{link.reason}: {self.mend(link.stage, last)}."

    def shown(self, link: Link, last: str) -> str:
        """`sentence` as it stands where the figures would."""
        text = self.sentence(link, last)
        return f"{text[0].upper()}{text[1:]}" if link.state == MISSING else f"No figures are shown, because {text}"

    def mend(self, stage: str, last: str, *, named: bool = True) -> str:
        """The commands, in order, that do `stage` and all after it up to `last` again; each does only what is to be done.

        Args:
            named: whether the commands name the run; a shared file tells nothing of its maker's disk.
        """
        merged = (self.run.read_manifest("train") or {}).get("merged")
        stages = [name for name in ABOVE[last] if name != "harvest"]
        left = stages[stages.index(stage) :] if stage in stages else stages
        where = f" --run {shlex.quote(str(self.run))}" if named else ""
        verbs = {"train": " ".join(["merge", *map(shlex.quote, merged if named else ())])} if merged else {}
        first, *others = (f"`sd-erase {verbs.get(name, name)}{where}`" for name in left)
        return f"run {first}" + (f", then {' and '.join(others)}" if others else "")

    def notes(self, stage: str) -> list[str]:
        """What could not be checked up to `stage`, a sentence each."""
        links = [self.link(name) for name in ABOVE[stage]]
        return [
            f"Run {self.run.name}: {link.reason}."
            for link in links
            if link.state == NOT_CHECKED or (link.state == NOT_RECORDED and link.stage == "train")
        ]


def check(run: RunDir, config: RunConfig, progress: Progress | None = None) -> list[Link]:
    """The links of a run, in order."""
    chain = Chain(run, config, progress)
    return [chain.link(stage) for stage in STAGES]


def prompts(names: list[str] | tuple[str, ...]) -> Contents | None:
    """The contents of prompt files, or None where one is not at hand."""
    try:
        return {name: digests.of_file(resources.find("prompts", name)) for name in names}
    except (UserError, OSError):
        return None


def card(base: Base) -> dict[str, Any]:
    """A base's card for a manifest, as JSON reads it back: what a page says of a base that is no longer at hand."""
    kept: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(base)))
    return kept


def base_of(run: RunDir, config: RunConfig) -> Base:
    """The base of a run; where it was moved or cannot be asked for, by the card that the training left.

    Raises:
        UserError: no such base, and no training that knew it.
    """
    try:
        return bases.resolve(config.base)
    except UserError:
        kept = (run.read_manifest("train") or {}).get("card")
        if not isinstance(kept, dict) or kept.get("named") != config.base:
            raise
        known = {field.name for field in dataclasses.fields(Base)}
        encoders = tuple(
            TextEncoder(each["name"], each["tokenizer"], tuple(each["layers"]), each.get("pooled", False))
            for each in kept["encoders"]
        )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in kept.items() if key in known
        }
        return Base(**{**values, "encoders": encoders})


def retire(run: RunDir, config: RunConfig) -> None:
    """Move the pages whose figures no longer belong to what lies in the run into ``report/earlier/``: a file cannot check itself."""
    chain = Chain(run, config)
    for stage in ("evaluate", "attack", "report"):
        names = {"evaluate": "figures", "attack": "attack", "report": "page"}
        files = [run.path / name for name in chain.now(names[stage]) or ()]
        if not files or chain.fault(stage) is None:
            continue
        inputs = str((run.read_manifest(stage) or {}).get("inputs", "unknown"))[:8]
        for file in files:
            target = run.report / "earlier" / f"{stage}-{inputs}" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)


def _changed(name: str, where: str, found: Contents, stage: str) -> str:
    verb = "is gone" if found.get(where, GONE) == GONE else "changed"
    return f"{TITLES[name]} {verb} since {STAGES[stage].did} ({where})"


def _pictures(run: RunDir) -> Iterator[str]:
    for row in read_jsonl(run.pairs) if run.pairs.is_file() else ():
        if (path := run.image(row.get("image"))) is not None:
            yield path


def _images(run: RunDir) -> Contents:
    """The digest of the images' index, and by name every image that is not what the index says."""
    index = run.images / "index.jsonl"
    if not index.is_file():
        return {}
    found = {"index.jsonl": digests.of_file(index)}
    try:
        stated = {row[side]: digest for row in run.drawn() for side, digest in row.get("sha256", {}).items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        return found  # another digest than what was recorded
    for name, digest in stated.items():
        if not isinstance(name, str):
            continue  # likewise
        path = run.images / name
        if not os.path.isfile(path):  # False for a text that can be no path, where pathlib raises
            found[name] = GONE
        elif (now := digests.of_file(path)) != digest:
            found[name] = now
    return found
