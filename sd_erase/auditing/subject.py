"""What is audited, and of which base: a run, a file that `export` wrote, or anybody's erased diffusers folder, its denoiser included."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import bases, chain, digests, formats
from sd_erase.bases import Base
from sd_erase.clip import choose_anchor, load_towers
from sd_erase.concepts import Concept, all_cards, load_concepts, read_concepts
from sd_erase.config import RunConfig, load
from sd_erase.errors import UserError, no_file
from sd_erase.modelfiles import INDEX
from sd_erase.pipeline import ENCODERS, load_erased
from sd_erase.rundir import RunDir, fingerprint

KINDS = {
    "run": "a run",
    "file": "an exported file",
    "encoder": "a folder with an erased text encoder",
    "pipeline": "a whole pipeline, its denoiser included",
}
# relative L2 distance of two models' weights above which one is no edit of the other: edits are far below a tenth, models that were
# trained apart near the square root of two
OTHER = 0.5


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        kind: a key of `KINDS`.
        concept: whose return is looked for.
        erased: all concepts that were erased with it, `concept` among them.
        anchors: concept -> what stands in its place.
        stamp: a fingerprint of its weights.
    """

    source: Path
    kind: str
    base: Base
    concept: Concept
    erased: tuple[Concept, ...]
    anchors: dict[str, str]
    stamp: str

    @property
    def anchor(self) -> str:
        return self.anchors[self.concept.name]

    def alike(self, text: str) -> bool:
        """Whether `text` names another thing that a detector cannot tell from the concept (one label), or that was erased with it."""
        others = [each for each in self.erased if each.name != self.concept.name]
        labels, names = set(self.concept.labels), {each.name for each in self.erased}
        twins = [card for card in all_cards().values() if card.name not in names and labels & set(card.labels)]
        return any(card.find(text) for card in (*others, *twins))


@dataclass(frozen=True)
class _Stated:
    """What a source says of itself."""

    base: str = ""
    concepts: tuple[str, ...] = ()
    anchors: dict[str, str] | None = None


def read_subject(source: Path, asked: RunConfig, base_given: bool) -> Subject:
    """The subject at `source`.

    Args:
        source: a run's folder, a ``.safetensors`` file, or a diffusers folder.
        asked: ``concepts`` and ``concept_file`` choose among, or stand in for, what the source says; ``base`` likewise.
        base_given: whether the base was asked for, rather than the default.

    Raises:
        UserError: it is none of these, does not say of which base or concept it is (and nothing was asked for), or contradicts what
            was asked for.
    """
    if not source.exists():
        raise UserError(f"{source} {no_file(source)}: pass a run, a file that `sd-erase export` wrote, or a diffusers folder.")
    run = RunDir(source)
    if source.is_dir() and run.is_ours():
        return _of_run(run, asked, base_given)
    kind = "file" if source.is_file() else "pipeline" if (source / INDEX).is_file() else "encoder"
    weights = _weight_file(source, kind)
    stated = _stated(weights)
    if base_given and stated.base in bases.ROWS and asked.base in bases.ROWS and stated.base != asked.base:
        raise UserError(f"{source} was erased from {stated.base}, not from {asked.base}: pass --base {stated.base}.")
    name = asked.base if base_given else stated.base
    if not name:
        raise UserError(f"{source} does not say of which base it is: pass --base with the model that it was erased from.")
    base = _resolved(name, source, base_given)
    if kind == "pipeline" and (own := bases.resolve(str(source))).family != base.family:
        raise UserError(
            f"{source} is of another kind of model ({own.family}) than base {base.name} ({base.family}): pass its own --base."
        )
    concept, erased = _concepts(source, asked, stated)
    anchors = dict(stated.anchors or {})
    stamp = fingerprint(digests.of_base(bases.resolve(str(source))) if kind == "pipeline" else digests.of_file(weights))
    return _completed(Subject(source, kind, base, concept, erased, anchors, stamp), asked)


def _of_run(run: RunDir, asked: RunConfig, base_given: bool) -> Subject:
    run.require("train", "train")
    config = load(run.config)
    if base_given and asked.base != config.base:
        raise UserError(f"Run {run} was erased from {config.base}, not from {asked.base}: leave --base out.")
    links = chain.Chain(run, config)
    links.require("train")
    erased = tuple(read_concepts(run))
    names = [concept.name for concept in erased]
    concept = _chosen(erased, asked, f"Run {run}")
    base = bases.resolve(config.base)
    return Subject(run.path, "run", base, concept, erased, run.anchors(names), fingerprint(links.now("encoder")))


def _weight_file(source: Path, kind: str) -> Path:
    """The file that holds the text encoder, or all."""
    if kind == "file":
        if source.suffix in formats.PICKLES:
            raise formats.pickle_error("Audited file", source)
        formats.read_header(source)
        return source
    found = [source / name / "model.safetensors" for name in ENCODERS]
    file = next((path for path in found if path.is_file()), None)
    if file is None and kind == "pipeline":
        return source / INDEX  # weights under another name (fp16, shards), which whoever loads them finds
    if file is None:
        raise UserError(
            f"Folder {source} is no run, no diffusers pipeline ({INDEX}) and holds no text_encoder/model.safetensors: pass one of these."
        )
    return file


def _stated(file: Path) -> _Stated:
    """What the header of a file says of an erasure; a stranger's says nothing."""
    if file.suffix != ".safetensors":
        return _Stated()
    metadata = formats.read_header(file).metadata
    try:
        anchors = json.loads(metadata.get("sd_erase.anchor", "null"))
    except ValueError:
        anchors = None
    names = tuple(name.strip() for name in metadata.get("sd_erase.concept", "").split(",") if name.strip())
    is_map = isinstance(anchors, dict) and all(isinstance(text, str) for text in anchors.values())
    return _Stated(metadata.get("sd_erase.base", ""), names, anchors if is_map else None)


def _resolved(name: str, source: Path, given: bool) -> Base:
    try:
        base = bases.resolve(name)
    except UserError:
        if given:
            raise
        raise UserError(
            f"{source} was erased from {name!r}, which is not at hand under that name: pass --base with its path."
        ) from None
    bases.check_draws(base)
    return base


def _concepts(source: Path, asked: RunConfig, stated: _Stated) -> tuple[Concept, tuple[Concept, ...]]:
    if not stated.concepts and not asked.concepts and not asked.concept_file:
        raise UserError(
            f"{source} does not say which concept was erased from it: pass --concept, or --concept-file with its card."
        )
    if asked.concept_file or not stated.concepts:
        erased = tuple(load_concepts(asked))
        return _chosen(erased, dataclasses.replace(asked, concepts=()), str(source)), erased
    erased = tuple(load_concepts(dataclasses.replace(asked, concepts=stated.concepts, exact=True)))
    return _chosen(erased, asked, str(source)), erased


def _chosen(erased: tuple[Concept, ...], asked: RunConfig, what: str) -> Concept:
    """The one concept to audit of those that were erased."""
    names = ", ".join(concept.name for concept in erased)
    if not asked.concepts:
        if len(erased) > 1:
            raise UserError(f"{what} has erased {names}: pass --concept with one of them, an audit is of one.")
        return erased[0]
    (wanted,) = load_concepts(asked)[:1]
    found = next((concept for concept in erased if concept.name == wanted.name), None)
    if found is None or len(asked.concepts) > 1:
        raise UserError(f"{what} has erased {names}: pass --concept with one of them, an audit is of one.")
    return found


def _completed(subject: Subject, asked: RunConfig) -> Subject:
    """With an anchor for each concept: the one asked for, the one stated, the card's, or CLIP's choice as `train` makes it."""
    anchors = {}
    for concept in subject.erased:
        stated = subject.anchors.get(concept.name) if asked.anchor is None else asked.anchor
        if stated is None and concept.anchor is None:
            stated = choose_anchor(load_towers(subject.base, "cpu", need_images=False), concept)
        anchors[concept.name] = str(concept.anchor if stated is None else stated)
    return dataclasses.replace(subject, anchors=anchors)


def load_pair(subject: Subject, device: Any) -> tuple[Any, Any]:
    """The original's pipeline and the audited one, in float32 on `device`; they share what the audited one did not change.

    Raises:
        UserError: the audited weights do not fit the base, or are no edit of it.
    """
    import torch

    from sd_erase.components import load_pipeline

    original = load_pipeline(subject.base, torch.float32).to(device)
    if subject.kind != "pipeline":
        erased = load_erased(original, subject.source)
        # a run knows its base, so that what a comparator changed of the denoiser, twice the keys' and values' norm at times, is no other model's
        parts = [name for name in ENCODERS if getattr(original, name, None) is not None]
    else:
        erased = load_pipeline(bases.resolve(str(subject.source)), torch.float32).to(device)
        parts = [*(name for name in ENCODERS if getattr(original, name, None) is not None), "unet"]
    for name in parts:
        apart = distance(getattr(original, name).state_dict(), getattr(erased, name).state_dict())
        if apart > OTHER:
            shown = "shapes" if apart == float("inf") else f"{100 * apart:.0f} % of its weights' norm"
            raise UserError(
                f"{subject.source} is of another base: its {name} differs from that of {subject.base.name} in {shown}; pass --base with the "
                "model that it was erased from."
            )
    return original, erased


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """L2 distance of two state dicts relative to the first's norm; infinite where their names or shapes differ."""
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return float("inf")
    floats = [key for key, value in first.items() if value.is_floating_point()]
    apart = sum(float((second[key] - first[key]).double().square().sum()) for key in floats)
    norm = sum(float(first[key].double().square().sum()) for key in floats)
    return float((apart / norm) ** 0.5) if norm else 0.0
