"""The only training loop: pairs and a method into an erased text encoder.

Reads ``pairs.jsonl`` and ``concepts.json``. Writes ``metrics.jsonl`` (one line a step and one a validation),
``checkpoints/last.safetensors`` (resumable), ``checkpoints/best.safetensors`` and ``encoder/text_encoder/``; of a second text
encoder (SDXL) ``metrics-text_encoder_2.jsonl``, ``checkpoints/text_encoder_2/`` and ``encoder/text_encoder_2/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, catalog, chain, formats, resources
from sd_erase.checkpoint import load_checkpoint, save_checkpoint
from sd_erase.clip import (
    Towers,
    cached_image_embeddings,
    choose_anchor,
    choose_neighbours,
    load_towers,
    read_pixels,
    save_clip,
    save_text_encoder,
)
from sd_erase.concepts import Concept, read_concepts
from sd_erase.config import RunConfig, TrainConfig, to_dict
from sd_erase.erasure.method import Batch, Method
from sd_erase.errors import UserError, unknown_choice
from sd_erase.pairs import Pair, read_pairs
from sd_erase.progress import NoProgress, Progress
from sd_erase.provenance import peak_memory_mb
from sd_erase.rundir import RunDir, fingerprint, read_jsonl, replacing, write_jsonl_atomic, write_text_atomic

if TYPE_CHECKING:
    import torch

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
VALIDATION_BATCHES = 4
WARMUP_SHARE = 0.05
GRADIENT_NORM = 1.0
OTHER_CAPTIONS = 25  # of a step beside the pairs' own: what is protected, the empty prompt, and those under attack
KEPT = 16  # numbers that a layer keeps for the backward pass, for each of a position's hidden state


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
    accelerator = _accelerator(config)
    read: dict[str, Any] = {}
    anchors: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    warnings: dict[str, None] = {}  # in order, each once
    for encoder in base.encoders:  # one after the other: they share nothing but the captions, and memory holds one
        towers = load_towers(
            base,
            accelerator.device,
            need_images=with_images or bool(settings.clip),
            encoder=encoder,
            share_vision=settings.towers != "both",
        )
        if not read:  # of a hub's model it is known only now what it is
            read = chain.Chain(run, config, progress).reads("train")
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
        stamp = fingerprint(inputs, read)
        trainer = _train_encoder(config, settings, run, stamp, accelerator, towers, concepts, anchors, pairs, progress)
        warnings |= dict.fromkeys(trainer.data.warnings)
        metadata = {
            "sd_erase.concept": ", ".join(concept.name for concept in concepts),
            "sd_erase.anchor": json.dumps(anchors, ensure_ascii=False),
            "sd_erase.base": base.name,
            "sd_erase.config": json.dumps(to_dict(config), ensure_ascii=False),
        }
        save_text_encoder(towers.text, run.encoder / encoder.name, metadata, towers.projection)
        if encoder == base.encoders[0]:
            run.clip.unlink(missing_ok=True)  # an earlier training's
            inside = {id(parameter) for parameter in towers.text.parameters()}
            if towers.clip is not None and not settings.lora_rank and any(id(one) not in inside for one in trainer.trained):
                save_clip(towers.clip, run.clip)
        parts[encoder.name] = {
            "best_step": trainer.best_step,
            "best_validation": trainer.best_terms,
            "trained_numbers": sum(parameter.numel() for parameter in trainer.trained),
            "gradient_checkpointing": trainer.checkpointing,
            "samples_per_second": round(trainer.samples_per_second, 1),
        }
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
            "device": str(accelerator.device),
            "precision": settings.precision,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": _peak_memory(accelerator),
            "warnings": list(warnings),
            **({"model": base.about} if base.about else {}),
            "card": {**chain.card(base), "named": config.base},
            "from": read,
            "made": links.makes("train"),
        },
    )
    chain.retire(run, config)
    return manifest


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


def _train_encoder(
    config: RunConfig,
    settings: TrainConfig,
    run: RunDir,
    inputs: str,
    accelerator: Any,
    towers: Towers,
    concepts: list[Concept],
    anchors: dict[str, str],
    pairs: list[Pair],
    progress: Progress,
) -> _Trainer:
    """Train one text encoder, in place, and return the trainer, which knows how it went; goes on from its last checkpoint."""
    name = towers.encoder.name
    method: Method = catalog.resolve(catalog.METHODS, settings.objective, "Objective")()
    trained = method.prepare(towers, concepts, anchors, settings.towers == "both")
    if settings.lora_rank:
        trained = _with_lora(towers, settings, config.seed)
    if settings.lora_rank and not settings.steps:
        raise UserError(f"Objective {settings.objective} does not train, so it makes no LoRA: pass --steps, or --objective sd.")
    if not trained:
        raise UserError(f"Objective {settings.objective} trains no parameter of {towers.base.name}: pass another --objective.")
    data = _Data(pairs, towers, settings, config.seed, run, progress)
    run.reopen("train")  # not before the input is known to be right: an encoder that is done must not be lost to a wrong flag
    solves = method.solves and not settings.lora_rank  # a LoRA must hold the whole change
    if solves:
        method.solve(towers, data.sets["forget", "train"], data.sets["retain", "train"], config.seed, progress)
    # the other half is for gradients, the optimiser's moments, and what no layer keeps
    is_tight = bool(settings.steps) and _activations(towers, settings) > resources.free_memory(accelerator.device) / 2
    checkpointing = is_tight and _checkpoint_gradients(towers.clip if settings.towers == "both" else towers.text)
    trainer = _Trainer(accelerator, towers, method, trained, settings, data, *run.training(name), inputs, solves, checkpointing)
    trainer.fit(progress)
    trainer.restore_best()
    if trainer.best_loss > trainer.first_loss:
        of = f" of {name}" if len(towers.base.encoders) > 1 else ""
        data.warnings.append(
            f"No step{of} validated better than the start ({trainer.best_loss:.3g} against {trainer.first_loss:.3g}): the training "
            f"diverged or was too short; pass a smaller --learning-rate (now {settings.learning_rate:g}) or more --steps."
        )
    run.lora(name).unlink(missing_ok=True)  # an earlier training's
    if settings.lora_rank:
        _save_lora_and_merge(towers, run.lora(name), settings.lora_rank)
    return trainer


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
        learning_rate=settings.learning_rate or method.default_learning_rate * base.learning_rate_scale,
        weights={**method.default_weights, **settings.weights},
    )


def _accelerator(config: RunConfig) -> Any:
    import torch
    from accelerate import Accelerator

    device = resources.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=config.train.precision)
    except ValueError as error:
        raise UserError(
            f"Precision {config.train.precision} cannot be used on {device} ({error}): pass --precision no."
        ) from error


def _with_lora(towers: Towers, settings: TrainConfig, seed: int) -> list[Any]:
    """Low-rank additions beside every linear layer of the text encoder (Hu et al. 2021, arXiv:2106.09685) as what trains."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if settings.towers == "both":
        raise UserError("A LoRA holds the text tower only: pass --towers text with --lora-rank.")
    for module in (towers.clip, towers.text):
        if module is not None:
            module.requires_grad_(False)
    torch.manual_seed(seed)
    # alpha = rank: every program that loads the file then scales it by one
    inject_adapter_in_model(
        LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=list(LINEAR_LAYERS)), towers.text
    )
    return [parameter for parameter in towers.text.parameters() if parameter.requires_grad]


def _save_lora_and_merge(towers: Towers, path: Path, rank: int) -> None:
    """Keep the factors in `path` and add them to the linear weights, so that a plain encoder remains."""
    from peft.tuners.lora import LoraLayer

    factors = {}
    layers = [(name, module) for name, module in towers.text.named_modules() if isinstance(module, LoraLayer)]
    for name, module in layers:
        factors[f"{name}.down.weight"] = module.lora_A["default"].weight.detach().cpu().contiguous()  # [rank, in]
        factors[f"{name}.up.weight"] = module.lora_B["default"].weight.detach().cpu().contiguous()  # [out, rank]
        module.merge()
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        setattr(towers.text.get_submodule(parent), child, module.get_base_layer())
    with replacing(path) as temporary:
        formats.save_tensors(temporary, factors, {"format": "pt", "rank": str(rank), "alpha": str(rank)})


def _activations(towers: Towers, settings: TrainConfig) -> int:
    """About how many bytes the layers of a training step keep for its backward pass.

    A forget and a retain caption make a pair, and others come beside the pairs, some of them attacked; where both towers train, their
    images too. With 32 pairs this says 4.0 GB of CLIP-L, 10.3 of OpenCLIP-H, 18.0 of OpenCLIP-bigG; on an H200 the default's peak
    was 3.6, 7.6 and 13.3 GB lower without what is kept.
    """
    text = towers.text.config
    numbers = (
        (2 * settings.batch_size + OTHER_CAPTIONS) * text.max_position_embeddings * text.hidden_size * text.num_hidden_layers
    )
    if settings.towers == "both":
        vision = towers.clip.config.vision_config
        positions = (vision.image_size // vision.patch_size) ** 2 + 1
        numbers += 2 * settings.batch_size * positions * vision.hidden_size * vision.num_hidden_layers
    return 4 * KEPT * numbers


def _checkpoint_gradients(model: Any) -> bool:
    """Compute the layers twice in place of keeping what they computed (Chen et al. 2016, arXiv:1604.06174): the same weights result.

    The layers are put into training mode, in which alone transformers does so; what is inside them is not, because a
    fine-tune's configuration may drop out attention.

    Returns:
        Whether the model can.
    """
    if not hasattr(model, "gradient_checkpointing_enable"):  # SDXL's second encoder in transformers 4
        return False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    return bool(layers)


def _peak_memory(accelerator: Any) -> float | None:
    """The most memory used in MB: the device's where there is one, else the process's."""
    import torch

    if accelerator.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak_memory_mb()


class _Data:
    """Batches of pairs, each a function of the seed and the step alone, so that a resumed run sees the same ones.

    Raises:
        UserError: a set without a training or validation pair, or images that are needed and missing.
    """

    def __init__(self, pairs: list[Pair], towers: Towers, settings: TrainConfig, seed: int, run: RunDir, progress: Progress):
        self.settings, self.seed, self.towers = settings, seed, towers
        self.warnings: list[str] = [*towers.notes]
        with_images = towers.clip is not None and all(pair.image for pair in pairs)
        if not with_images and catalog.resolve(catalog.METHODS, settings.objective, "Objective").needs_images:
            raise UserError(
                f"Objective {settings.objective} needs an image for every caption, and the data set is text alone: "
                "pass a --dataset with images, or --objective sd."
            )
        self.with_pixels = settings.towers == "both"
        self.embeddings: dict[str, torch.Tensor] | None = None
        if with_images:
            paths = sorted({str(pair.image) for pair in pairs})
            with progress("image embeddings", len(paths)) as task:
                self.embeddings = cached_image_embeddings(towers, paths, run.cache / "image_embeddings.safetensors", task.advance)
        self.sets = {
            (name, split): [pair for pair in pairs if pair.set == name and pair.split == split]
            for name in ("forget", "retain")
            for split in ("train", "validation")
        }
        for (name, split), group in self.sets.items():
            if not group:
                raise UserError(f"The {name} set has no {split} pair: harvest more captions, or change --train-share.")
        count = len(self.sets["forget", "train"])
        if count < settings.batch_size:
            self.warnings.append(
                f"The forget set has {count} training pairs, fewer than a batch of {settings.batch_size}: every step uses all of "
                "them; more captions (or --data synthetic) generalise better."
            )

    def batch(self, split: str, number: int) -> Batch:
        """Batch `number` of a split."""
        rng = random.Random(f"{self.seed}-{split}-{number}")
        size = self.settings.batch_size
        chosen = {
            name: rng.sample(group, min(size, len(group))) for name in ("forget", "retain") for group in [self.sets[name, split]]
        }
        forget, retain = chosen["forget"], chosen["retain"]
        return Batch(
            forget,
            retain,
            self._embeddings(forget),
            self._embeddings(retain),
            self._pixels(forget),
            self._pixels(retain),
            rng,
            split,
        )

    def _embeddings(self, pairs: list[Pair]) -> torch.Tensor | None:
        import torch

        if self.embeddings is None:
            return None
        return torch.stack([self.embeddings[str(pair.image)] for pair in pairs]).to(self.towers.text.device)

    def _pixels(self, pairs: list[Pair]) -> torch.Tensor | None:
        if not self.with_pixels:
            return None
        return read_pixels(self.towers.image_processor, [str(pair.image) for pair in pairs]).to(self.towers.text.device)


@dataclass
class _Trainer:
    """Steps, validation, checkpoints and the record of one training."""

    accelerator: Any
    towers: Towers
    method: Method
    trained: list[Any]
    settings: TrainConfig
    data: _Data
    checkpoints: Path  # a folder
    metrics: Path
    inputs: str
    solved: bool  # whether the closed form changed the weights before the first step
    checkpointing: bool  # whether a backward pass computes the layers again in place of keeping what they computed
    best_step: int = 0
    best_loss: float = math.inf
    best_terms: dict[str, float] = dataclasses.field(default_factory=dict)
    first_loss: float = math.inf  # validation before the first step
    samples_per_second: float = 0.0

    @property
    def _last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    @property
    def _best(self) -> Path:
        return self.checkpoints / "best.safetensors"

    def _state(self) -> dict[str, torch.Tensor]:
        """What trains, by its place in `trained`."""
        return {str(index): parameter.detach() for index, parameter in enumerate(self.trained)}

    def _load_state(self, state: dict[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for index, parameter in enumerate(self.trained):
                parameter.copy_(state[str(index)])

    def fit(self, progress: Progress) -> None:
        """Train to the end, from the last checkpoint of the same inputs where there is one."""
        import torch
        from transformers import get_cosine_schedule_with_warmup

        settings = self.settings
        rate, decay = settings.learning_rate, settings.weight_decay
        if self.method.only_matrices:
            # orthogonalised steps (Jordan et al. 2024) of the size of AdamW's: on the pocket model (apple, one seed) two thirds of
            # AdamW's redirect error after as many steps, with one moment to keep in place of two
            optimizer: Any = torch.optim.Muon(self.trained, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        else:
            optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=decay)
        schedule = get_cosine_schedule_with_warmup(
            optimizer, max(1, round(WARMUP_SHARE * settings.steps)), max(1, settings.steps)
        )
        rows, start = self._resume(optimizer)
        for _ in range(start):
            optimizer.step()  # gradients are None: only tells the schedule that steps were taken
            schedule.step()
        optimizer = self.accelerator.prepare(optimizer)
        began = time.perf_counter()
        with progress(f"training ({settings.objective})", settings.steps) as task:
            task.advance(start)
            if not start:
                rows.append(self._validate(0))
                write_jsonl_atomic(self.metrics, rows)
            self.first_loss = rows[0]["loss"]
            for step in range(start, settings.steps):
                rate = schedule.get_last_lr()[0]
                batch = self.data.batch("train", step)
                with self.accelerator.autocast():
                    terms = self.method.losses(self.towers, batch)
                loss = self._total(terms, step + 1)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.trained, GRADIENT_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                seconds = (time.perf_counter() - began) / (step + 1 - start)
                self.samples_per_second = (len(batch.forget) + len(batch.retain)) / seconds
                rows.append(self._row(step + 1, "train", {name: term.item() for name, term in terms.items()}, loss.item(), rate))
                task.advance()
                if (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps:
                    rows.append(self._validate(step + 1))
                    write_jsonl_atomic(self.metrics, rows)
                    groups = {"trained": self._state(), "method": self.method.state()}
                    save_checkpoint(self._last, groups, optimizer, step + 1)

    def _row(self, step: int, split: str, terms: dict[str, float], loss: float, rate: float) -> dict[str, Any]:
        return {
            "step": step,
            "split": split,
            "loss": loss,
            "terms": terms,
            "learning_rate": rate,
            "samples_per_second": round(self.samples_per_second, 1),
        }

    def _total(self, terms: dict[str, Any], step: int) -> Any:
        """The weighted sum of the terms.

        Raises:
            UserError: a term is not finite.
        """
        import torch

        for name, term in terms.items():
            if not torch.isfinite(torch.as_tensor(term)).all():
                kept = f"the last good checkpoint is {self._best}" if self._best.is_file() else "no checkpoint was reached"
                raise UserError(
                    f"Loss term {name!r} is not finite at step {step}: pass a smaller --learning-rate (now "
                    f"{self.settings.learning_rate:g}) or --precision no; {kept}."
                )
        return sum(self.settings.weights[name] * term for name, term in terms.items())

    def _validate(self, step: int) -> dict[str, Any]:
        """Mean terms over fixed validation batches; keeps the best state. The original itself is never kept."""
        import torch

        batches = [self.data.batch("validation", number) for number in range(VALIDATION_BATCHES)]
        sums: dict[str, float] = {}
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches:
                for name, term in self.method.losses(self.towers, batch).items():
                    sums[name] = sums.get(name, 0.0) + float(term) / len(batches)
        loss = float(self._total(sums, step))
        if (step or self.solved) and loss < self.best_loss:
            self.best_loss, self.best_step, self.best_terms = loss, step, sums
            save_checkpoint(self._best, {"trained": self._state()}, torch.optim.SGD(self.trained), step)
        return self._row(step, "validation", sums, loss, 0.0)

    def _resume(self, optimizer: Any) -> tuple[list[dict[str, Any]], int]:
        """The metrics so far and the step to go on from; files of other inputs, or damaged ones, are dropped."""
        stamp = self.checkpoints / "inputs.txt"
        files = (self._last, self._best, stamp, self.metrics)
        if all(path.is_file() for path in files) and stamp.read_text(encoding="utf-8") == self.inputs:
            with contextlib.suppress(KeyError, ValueError, RuntimeError):
                start, groups = load_checkpoint(self._last, optimizer)
                self._load_state(groups["trained"])
                self.method.load_state(groups.get("method", {}))
                rows = [row for row in read_jsonl(self.metrics, finite=False) if row["step"] <= start]
                for row in rows:
                    if row["split"] == "validation" and (row["step"] or self.solved) and row["loss"] < self.best_loss:
                        self.best_loss, self.best_step, self.best_terms = row["loss"], row["step"], row["terms"]
                return rows, start
        self.best_loss, self.best_step, self.best_terms = math.inf, 0, {}
        self._last.unlink(missing_ok=True)
        self._best.unlink(missing_ok=True)
        write_text_atomic(stamp, self.inputs)
        return [], 0

    def restore_best(self) -> None:
        """Load the state that validated best."""
        import torch

        _, groups = load_checkpoint(self._best, torch.optim.SGD(self.trained))
        self._load_state(groups["trained"])
