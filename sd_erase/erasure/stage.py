"""The stage "train": pairs and a method into an erased text encoder.

Reads ``pairs.jsonl`` and ``concepts.json``. Writes ``metrics.jsonl`` (one line a step and one a validation),
``checkpoints/last.safetensors`` (resumable), ``checkpoints/best.safetensors`` and ``encoder/text_encoder/``; of a second text
encoder (SDXL) ``metrics-text_encoder_2.jsonl``, ``checkpoints/text_encoder_2/`` and ``encoder/text_encoder_2/``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sd_erase import bases, catalog, chain, denoiser, parallel, resources
from sd_erase.clip import Towers, choose_anchor, choose_neighbours, load_towers, save_clip, save_text_encoder
from sd_erase.concepts import Concept, read_concepts
from sd_erase.concepts.matching import Matcher
from sd_erase.config import RunConfig, TrainConfig, to_dict
from sd_erase.erasure import low_rank, memory, names
from sd_erase.erasure.batches import Batches
from sd_erase.erasure.method import Method
from sd_erase.erasure.trainer import Trainer
from sd_erase.erasure.words import Words
from sd_erase.errors import UserError, unknown_choice
from sd_erase.pairs import Pair, read_pairs
from sd_erase.progress import NoProgress, Progress
from sd_erase.provenance import forget_peak_memory, peak_memory_mb
from sd_erase.rundir import RunDir, fingerprint


def train(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Unlearn the run's concepts from the base's text encoder and keep the checkpoint that validates best.

    Args:
        config: the run's configuration; section ``train``.
        run: a harvested run.
        progress: told of each step.

    Returns:
        The manifest "train": objective, anchors, weights, steps, the best step with its validation terms, seconds, samples a
        second, peak memory in MB, numbers trained, warnings. What belongs to one text encoder is the first one's; ``encoders``
        has that of each.

    Raises:
        UserError: no pairs, an unknown objective or weight, a base that cannot be loaded, a loss that is not finite.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    run.require("harvest", "harvest")
    base, concepts, pairs = bases.resolve(config.base), read_concepts(run), read_pairs(run)
    if config.train.clip:
        base = dataclasses.replace(base, clip_partner=str(Path(config.train.clip).expanduser()))
    method: Method = catalog.resolve(catalog.METHODS, config.train.objective, "Objective")()
    settings = _resolved(config.train, method, base)
    inputs = _inputs(config, settings, base, concepts, run)
    links = chain.Chain(run, config, progress)
    if run.is_complete("train", inputs) and links.holds("train"):
        return run.read_manifest("train") or {}
    if _is_earlier(config, settings, base, concepts, run):
        return run.read_manifest("train") or {}
    with_images = method.needs_images or settings.towers == "both"
    if with_images and len(base.encoders) > 1:
        raise UserError(
            f"Objective {settings.objective} needs a CLIP with a vision tower for every text encoder, and {base.title}'s second "
            "has none here: pass --objective sd or fast, and --towers text."
        )
    device = _device(config)
    forget_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = _Training(config, settings, run, pairs, progress)
    read: dict[str, Any] = {}
    anchors: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    warnings: dict[str, None] = {}  # in order, each once
    for encoder in base.encoders:  # one after the other: they share nothing but the captions, and memory holds one
        towers = load_towers(
            base,
            device,
            need_images=with_images or bool(settings.clip),
            encoder=encoder,
            share_vision=settings.towers != "both",
        )
        if not read:  # of a hub's model it is known only now what it is
            links = chain.Chain(run, config, progress)
            read = links.reads("train")
            if getattr(method, "needs_denoiser", False):
                read["base"] = links.now("base")  # what is changed, or trained against, is the denoiser's
        if not anchors:  # what stands in a concept's place is the same for all of them
            anchors = {
                concept.name: choose_anchor(towers, concept) if concept.anchor is None else concept.anchor for concept in concepts
            }
            concepts = [
                concept
                if concept.neighbours
                else dataclasses.replace(concept, neighbours=choose_neighbours(towers, concept, anchors[concept.name]))
                for concept in concepts
            ]
        # least squares alone is solved, and judged, in float32
        precision = resources.precision(settings.precision, device, towers.text.config.hidden_size) if settings.steps else "no"
        accelerator = _accelerator(precision, device)
        stamp = fingerprint(inputs, read, accelerator.mixed_precision)
        trainer = training.of(towers, accelerator, concepts, anchors, stamp)
        warnings |= dict.fromkeys(trainer.data.warnings)
        if not parallel.is_main():
            continue
        metadata = {
            "sd_erase.concept": ", ".join(concept.name for concept in concepts),
            "sd_erase.anchor": json.dumps(anchors, ensure_ascii=False),
            "sd_erase.base": base.name,
            "sd_erase.config": json.dumps(to_dict(config), ensure_ascii=False),
        }
        save_text_encoder(towers.text, run.encoder / encoder.name, metadata, towers.projection)
        if encoder == base.encoders[0]:
            run.clip.unlink(missing_ok=True)  # an earlier training's
            run.denoiser.unlink(missing_ok=True)
            if of_denoiser := _of_denoiser(trainer.method):
                denoiser.save(of_denoiser, run, metadata)
            inside = {id(parameter) for parameter in (*towers.text.parameters(), *of_denoiser.values())}
            if towers.clip is not None and not settings.lora_rank and any(id(one) not in inside for one in trainer.trained):
                save_clip(towers.clip, run.clip)
        parts[encoder.name] = {
            "best_step": trainer.best_step,
            "best_validation": trainer.best_terms,
            "trained_numbers": sum(parameter.numel() for parameter in trainer.trained),
            "gradient_checkpointing": trainer.checkpointing,
            "precision": accelerator.mixed_precision,
            "samples_per_second": round(trainer.samples_per_second, 1),
            "names": {name: ", ".join(told["found"]) for name, told in training.told[encoder.name].items() if told["found"]},
            "read": training.told[encoder.name],
        }
    if not parallel.is_main():
        return {}
    _drop_others(run, base)
    manifest = run.complete(
        "train",
        inputs,
        {
            "objective": settings.objective,
            "towers": settings.towers,
            "anchor": anchors,
            "neighbours": {concept.name: ", ".join(concept.neighbours) for concept in concepts},
            "weights": settings.weights,
            "lora_rank": settings.lora_rank,
            "steps": settings.steps,
            **parts[base.encoders[0].name],
            "encoders": parts,
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "device": str(device),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": _peak_memory(device),
            "warnings": list(warnings),
            **({"model": base.about} if base.about else {}),
            "card": {**chain.card(base), "named": config.base},
            "from": read,
            "made": links.makes("train"),
        },
    )
    chain.retire(run, config)
    return manifest


def _of_denoiser(method: Method) -> dict[str, Any]:
    """Name -> tensor of what a comparator changes of the denoiser; no method of sd-erase's own does."""
    return dict(getattr(method, "of_denoiser", {}))


def _inputs(config: RunConfig, settings: TrainConfig, base: bases.Base, concepts: list[Concept], run: RunDir) -> str:
    """What a training depends on beside the contents of its base, which the manifest keeps as digests."""
    card = [dataclasses.asdict(encoder) for encoder in base.encoders], base.anchors
    cards = [concept.to_dict() for concept in concepts]
    return fingerprint(dataclasses.asdict(settings), config.seed, config.device, card, cards, run.pairs)


def _is_earlier(config: RunConfig, settings: TrainConfig, base: bases.Base, concepts: list[Concept], run: RunDir) -> bool:
    """Whether a version that recorded no contents finished this very training: it is not done again for that."""
    cards = [concept.to_dict() for concept in concepts]
    inputs = fingerprint(dataclasses.asdict(settings), config.seed, config.device, base.source, cards, run.pairs)
    is_there = all((run.encoder / encoder.name / "model.safetensors").is_file() for encoder in base.encoders)
    return is_there and run.is_complete("train", inputs) and "made" not in (run.read_manifest("train") or {})


def _drop_others(run: RunDir, base: bases.Base) -> None:
    """Remove what an earlier training of a base with more text encoders left beside this base's."""
    names = {encoder.name for encoder in base.encoders}
    for name in {path.name for path in run.encoder.iterdir() if path.is_dir()} - names:
        shutil.rmtree(run.encoder / name)
        run.lora(name).unlink(missing_ok=True)
        run.training(name)[1].unlink(missing_ok=True)


@dataclass
class _Training:
    """What the trainings of a run's text encoders share."""

    config: RunConfig
    settings: TrainConfig
    run: RunDir
    pairs: list[Pair]
    progress: Progress
    told: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # encoder -> concept -> how it is read (`_told`)

    def of(
        self, towers: Towers, accelerator: Accelerator, concepts: list[Concept], anchors: dict[str, str], inputs: str
    ) -> Trainer:
        """Train one text encoder, in place, and return the trainer, which knows how it went; goes on from its last checkpoint.

        Args:
            inputs: what the training depends on, as a fingerprint.

        Raises:
            UserError: the objective trains nothing here, or the pairs do not suffice.
        """
        settings, run, name, seed = self.settings, self.run, towers.encoder.name, self.config.seed
        method: Method = catalog.resolve(catalog.METHODS, settings.objective, "Objective")()
        if getattr(method, "asks_names", False):
            for concept in concepts:  # once, with progress: the objective asks again
                names.find(towers, concept, anchors[concept.name], cheap=method.solves, progress=self.progress)
        trained = method.prepare(towers, concepts, anchors, settings.towers == "both")
        if settings.lora_rank:
            if not getattr(method, "takes_lora", True):
                raise UserError(f"Objective {settings.objective} says itself which weights change: leave --lora-rank out.")
            if settings.towers == "both":
                raise UserError("A LoRA holds the text tower only: pass --towers text with --lora-rank.")
            trained = low_rank.add(towers, settings.lora_rank, seed)
        if settings.lora_rank and not settings.steps:
            raise UserError(
                f"Objective {settings.objective} does not train, so it makes no LoRA: pass --steps, or --objective sd."
            )
        if not trained:
            raise UserError(
                f"Objective {settings.objective} trains no parameter of {towers.base.name}: pass another --objective."
            )
        cache = run.cache / "image_embeddings.safetensors"
        pairs = without_names(self.pairs, [names.named(concept, found) for concept, found in _found(method, concepts)])
        with parallel.main_first():  # which fills the cache
            data = Batches(
                pairs,
                towers,
                settings,
                seed,
                cache,
                self.progress,
                needs_images=method.needs_images,
                reads_images=getattr(method, "reads_images", True),
            )
        run.reopen("train")  # not before the input is known to be right: an encoder that is done must not be lost to a wrong flag
        solves = method.solves and not settings.lora_rank  # a LoRA must hold the whole change
        if solves:
            method.solve(towers, data.sets["forget", "train"], data.sets["retain", "train"], seed, self.progress)
        tight = memory.is_tight(towers, settings, accelerator.device)
        checkpointing = tight and memory.checkpoint_gradients(towers.clip if settings.towers == "both" else towers.text)
        trainer = Trainer(
            accelerator, towers, method, trained, settings, data, *run.training(name), inputs, solves, checkpointing
        )
        trainer.fit(self.progress)
        trainer.restore_best()
        if trainer.best_loss > trainer.first_loss and not trainer.keeps_last:
            of = f" of {name}" if len(towers.base.encoders) > 1 else ""
            data.warnings.append(
                f"No step{of} validated better than the start ({trainer.best_loss:.3g} against {trainer.first_loss:.3g}): the training "
                f"diverged or was too short; pass a smaller --learning-rate (now {settings.learning_rate:g}) or more --steps."
            )
        self.told[name] = {}
        for concept, found in _found(method, concepts):
            told, warning = _told(towers, concept, anchors[concept.name], found)
            self.told[name][concept.name] = told
            data.warnings += warning
        if parallel.is_main():
            run.lora(name).unlink(missing_ok=True)  # an earlier training's
        if settings.lora_rank:
            low_rank.save_and_merge(towers, run.lora(name), settings.lora_rank)
        return trainer


def _found(method: Method, concepts: list[Concept]) -> list[tuple[Concept, names.Names]]:
    """What the base calls each concept, of an objective that asked for it."""
    found: dict[str, names.Names] = getattr(method, "names", {})
    return [(concept, found[concept.name]) for concept in concepts if found.get(concept.name, names.NONE) is not names.NONE]


def without_names(pairs: list[Pair], concepts: list[Concept]) -> list[Pair]:
    """`pairs` without retain captions that use a word of `concepts`: what the base calls the concept cannot be kept while it goes."""
    matcher = Matcher(concepts)
    return [pair for pair in pairs if pair.set == "forget" or not any(matches for _, matches, _ in matcher.scan(pair.caption))]


def _told(towers: Towers, concept: Concept, anchor: str, found: names.Names) -> tuple[dict[str, Any], list[str]]:
    """What the manifest says of a concept's names, and a warning where the erased encoder still reads some as it."""
    held_out = Words.of(found, concept).held_out
    asked = list(dict.fromkeys((*found.known, *found.of("vocabulary"), *held_out)))
    left = names.still_read(towers, concept, anchor, asked)
    told = {
        "found": list(found.of("vocabulary")),
        "held_out": list(held_out),
        "still_read": {name.text: round(name.along, 2) for name in left},
    }
    if not left:
        return told, []
    worst = ", ".join(f"{name.text} ({100 * name.along:.0f} %)" for name in left[:5])
    return told, [
        f"The erased encoder still reads {len(left)} of {len(asked)} words as {concept.name}: {worst} of the way from {anchor or 'nothing'}; "
        "train with more --steps, or add such words to the card."
    ]


def _resolved(settings: TrainConfig, method: Method, base: bases.Base) -> TrainConfig:
    """`settings` with the method's and the base's defaults in place of zeros and for every loss term without a weight.

    Raises:
        UserError: a weight for a term that the method does not have, or a negative one.
    """
    for name, weight in settings.weights.items():
        if name not in method.default_weights:
            raise unknown_choice(f"Loss term of objective {settings.objective}", name, method.default_weights)
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"Weight {name}={weight} is negative or no number: pass 0 or more.")
    return dataclasses.replace(
        settings,
        steps=settings.steps or method.default_steps,
        learning_rate=settings.learning_rate or _rate(method, base),
        weights={**method.default_weights, **settings.weights},
    )


def _rate(method: Method, base: bases.Base) -> float:
    """The learning rate where none is asked for: a comparator's own on the models that its paper is about."""
    published: float = getattr(method, "published_learning_rate", 0.0)
    return published if published and not base.pocket else method.default_learning_rate * base.learning_rate_scale


def _device(config: RunConfig) -> torch.device:
    """The device that trains, with the seed set."""
    device: torch.device = resources.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    return device


def _accelerator(precision: str, device: torch.device) -> Accelerator:
    # what it keeps for a process is of the training before: a comparison's methods may differ in precision
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"Precision {precision} cannot be used on {device} ({error}): pass --precision no.") from error


def _peak_memory(device: torch.device) -> float | None:
    """The most memory used in MB: the device's where there is one, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak_memory_mb()
