"""`erase`: a model in memory without a concept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sd_erase import catalog, formats, hosts, resources, yamlfile
from sd_erase.api import models
from sd_erase.api.results import Erasure
from sd_erase.api.scratch import Scratch, shown
from sd_erase.concepts import CARDS_FOLDER, Concept, load_concepts
from sd_erase.config import RunConfig, override
from sd_erase.errors import UserError
from sd_erase.preflight import check
from sd_erase.progress import Progress
from sd_erase.rundir import read_jsonl, write_text_atomic

Model = TypeVar("Model")
SYNTHETIC = "synthetic"  # captions from templates: nothing has to be at hand


def erase(
    model: Model,
    concept: str | Sequence[str],
    *,
    kind: str = "object",
    anchor: str | None = None,
    method: str | None = None,
    keep: str | Sequence[str] = (),
    steps: int = 0,
    seed: int = 0,
    device: str = "auto",
    data: str = SYNTHETIC,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Progress = True,
) -> Erasure[Model]:
    """Erase `concept` from a model in memory.

    No folder of yours is needed or written: what a training keeps on disk lies in the system's temporary folder (about three times the
    encoders' size; `TMPDIR` moves it) for as long as the result lives. Captions are made from templates and the concept's card.

    Args:
        model: a diffusers pipeline of Stable Diffusion 1.x, 2.x or XL, or a transformers `CLIPTextModel`. It stays as it is.
        concept: a name or several ("bicycle", ["bicycle", "apple"], "bicycle, apple"), of a card or any of your own.
        kind: "object", "style", "person" or "nudity", of a name without a card.
        anchor: what stands in its place; None: the card's or CLIP's choice, "": nothing.
        method: an objective of `sd_erase.catalog.METHODS` or your own "module:Class"; None is the default, "robust". "fast" takes
            seconds on a CPU.
        keep: words that must stay as they are: things like the concept ("motorcycle"), or other senses of its words ("apple phone").
        steps: of the training; 0 is the objective's default.
        seed: of captions and training. The caller's random state is left as it was.
        device: where to train: "auto", "cpu", "cuda", "cuda:1" or "mps". The result lies where `model` does, in its type.
        data: "READER:PATH" of captions of your own, as `sd-erase harvest --dataset` takes it.
        tokenizer: of a `CLIPTextModel`; None is CLIP's own.
        settings: further settings by dotted name, {"train.batch_size": 8}; all are listed by `sd-erase config`.
        progress: bars on stderr, or a `sd_erase.progress.Progress` of your own.

    Returns:
        An `Erasure`: `model` is of the class of what was passed and shares all but the text encoders, tokenizers and the scheduler with it
        (and all but the denoiser too, of an objective that changes that: "esd", "uce", "speed").

    Raises:
        UserError: bad input, in one sentence, before any work.

    Example:
        >>> import sd_erase
        >>> pipe = sd_erase.load_pocket()
        >>> erased = sd_erase.erase(pipe, "bicycle", method="token", progress=False)
        >>> erased.method, type(erased.model).__name__
        ('token', 'StableDiffusionPipeline')
    """
    from sd_erase.pipeline import load_erased

    names, kept = _listed(concept), _listed(keep)
    asked: dict[str, Any] = {
        "concepts": names, "kind": kind, "anchor": anchor, "seed": seed, "device": device, "harvest.dataset": data, "train.steps": steps,
        **({} if method is None else {"train.objective": method}), **(settings or {}),
    }  # fmt: skip
    config = override(RunConfig(), {name: value for name, value in asked.items() if value is not None})
    concepts = load_concepts(config)  # a slip in a name is said before weights are copied
    scratch = Scratch(model, tokenizer)
    config = override(config, {"base": str(scratch.base)})
    if kept:
        config = _keeping(config, concepts, kept, scratch)
    method_class = catalog.resolve(catalog.METHODS, config.train.objective, "Objective")
    with_denoiser = getattr(method_class, "needs_denoiser", False)
    if with_denoiser and (isinstance(model, models.Encoders) or models.is_encoder(model)):
        raise UserError(
            f"Objective {config.train.objective} reads a denoiser, and a text encoder alone has none: pass its pipeline."
        )
    check(config, ("harvest", "train"), {name: name for name in asked})
    if method_class.needs_images or config.train.towers == "both" or with_denoiser:
        scratch.complete()  # whose original draws the images of its captions, or whose denoiser is trained or asked
    scratch.begin(config, "-".join(each.name for each in concepts))
    bars = shown(progress)
    with _own_randomness(config.device):
        for stage in ("harvest", "train"):
            told = scratch.do(stage, bars)
    scratch.thin()
    return Erasure(
        model=_erased_encoders(model, scratch) or load_erased(model, scratch.run.path),
        concepts=tuple(each.name for each in concepts),
        anchors=dict(told["anchor"]),
        method=told["objective"],
        base=scratch.card.name,
        steps=told["steps"],
        best_step=told["best_step"],
        before=_first_validation(scratch, told["best_step"]),
        after=dict(told["best_validation"]),
        names=dict(told.get("names") or {}),
        seconds=told["seconds"],
        warnings=tuple(told["warnings"]),
        _scratch=scratch,
    )


def load_pocket() -> Any:
    """The pocket model: a small, truly trained `StableDiffusionPipeline` of 64 pixels and 20 things, which ships with sd-erase.

    Example:
        >>> import sd_erase
        >>> pipe = sd_erase.load_pocket()
        >>> pipe("a bicycle next to a dog", height=64, width=64, num_inference_steps=1).images[0].size
        (64, 64)
    """
    from sd_erase import bases
    from sd_erase.components import load_pipeline

    pipeline = load_pipeline(bases.ROWS["pocket"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _listed(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) and words else tuple(words)


def _keeping(config: RunConfig, concepts: Sequence[Concept], keep: Sequence[str], scratch: Scratch) -> RunConfig:
    """`config` with cards of its concepts that also name what must stay, which are written into `scratch`.

    Raises:
        UserError: a word that is to be kept is one of a concept's.
    """
    if config.concept_file:
        raise UserError("keep is given together with a concept file: write what stays into its cards (neighbours, spared).")
    cards = []
    for concept in concepts:
        for word in keep:
            if any(word.lower() == phrase for phrase in concept.phrases):
                raise UserError(f"keep names {word!r}, a word of {concept.name}, which is to be erased: pass one of the two.")
        senses = [word for word in keep if concept.find(word)]
        others = [word for word in keep if word not in senses]
        file = CARDS_FOLDER / f"{concept.name.replace(' ', '_')}.yaml"
        card = (yamlfile.read(file, "Card") if file.is_file() else {}) or {"name": concept.name, "kind": concept.kind}
        near = concept.neighbours or (_chosen_neighbours(concept, scratch, config) if others else ())
        cards.append(
            {**card, "spared": [*card.get("spared", ()), *senses], "neighbours": list(dict.fromkeys((*near, *others))) or None}
        )
    written = [{key: value for key, value in card.items() if value is not None} for card in cards]
    write_text_atomic(path := scratch.path / "concepts.yaml", _as_yaml(written))
    return override(config, {"concept_file": str(path)})


def _as_yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, allow_unicode=True))


def _chosen_neighbours(concept: Concept, scratch: Scratch, config: RunConfig) -> tuple[str, ...]:
    """What a training would choose by itself for a concept whose card names no neighbours."""
    from sd_erase.clip import choose_anchor, choose_neighbours, load_towers

    towers = load_towers(scratch.card, resources.device(config.device), need_images=False)
    return choose_neighbours(towers, concept, choose_anchor(towers, concept) if concept.anchor is None else concept.anchor)


@contextlib.contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    """Leave the caller's random numbers as they were: a training seeds torch's."""
    import torch

    used = resources.device(device)
    cards = [used.index or torch.cuda.current_device()] if used.type == "cuda" else []
    with torch.random.fork_rng(cards):
        yield


def _erased_encoders(model: Any, scratch: Scratch) -> Any:
    """A copy of a text encoder, or of several, with the run's weights; None where `model` is a pipeline."""
    if not (isinstance(model, models.Encoders) or models.is_encoder(model)):
        return None
    changed = {}
    for name, encoder in models.encoders_of(model).items():
        file: Path = scratch.run.encoder / name / "model.safetensors"
        changed[name] = hosts.with_weights(encoder, formats.read_tensors(file), file)
    return dataclasses.replace(model, **changed) if isinstance(model, models.Encoders) else changed["text_encoder"]


def _first_validation(scratch: Scratch, best_step: int) -> dict[str, float]:
    """The loss terms on the validation captions before the first step; what is solved in closed form is measured after that alone."""
    rows = read_jsonl(scratch.run.metrics, finite=False)
    return dict(next((row["terms"] for row in rows if row["split"] == "validation"), {})) if best_step else {}
