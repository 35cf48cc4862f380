"""The training of one text encoder: loss terms, validation, the best state and the record."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from sd_erase import parallel, sharding
from sd_erase.checkpoint import load_checkpoint, save_checkpoint
from sd_erase.clip import Towers
from sd_erase.config import TrainConfig
from sd_erase.erasure.batches import Batches
from sd_erase.erasure.method import Method
from sd_erase.erasure.muon import StackedMuon
from sd_erase.errors import UserError
from sd_erase.fitting import Fit, Groups
from sd_erase.progress import Progress
from sd_erase.rundir import read_jsonl, write_jsonl_atomic, write_text_atomic

VALIDATION_BATCHES = 4
WARMUP_SHARE = 0.05
GRADIENT_NORM = 1.0
DRIFT = 1e-3  # relative difference of the losses that several processes may have, whose weights are the same


@dataclass
class Trainer:
    """Steps, validation, checkpoints and the record of one training."""

    accelerator: Any
    towers: Towers
    method: Method
    trained: list[Any]
    settings: TrainConfig
    data: Batches
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
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of `metrics`
    _waiting: list[tuple[dict[str, Any], list[torch.Tensor]]] = dataclasses.field(
        default_factory=list
    )  # rows without numbers yet

    @property
    def keeps_last(self) -> bool:
        """Whether the last state is kept in place of the one that validates best, as a method's paper may have it."""
        return bool(getattr(self.method, "keeps_last", False))

    def _is_kept(self, row: dict[str, Any]) -> bool:
        """Whether the state behind this validation is kept so far; the original itself never is."""
        return bool(row["step"] or self.solved) and (self.keeps_last or row["loss"] < self.best_loss)

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
        with torch.no_grad():
            for index, parameter in enumerate(self.trained):
                parameter.copy_(state[str(index)])

    def _groups(self) -> Groups:
        return {"trained": self._state(), "method": self.method.state()}

    def _restore(self, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        self._load_state(groups["trained"])
        self.method.load_state(groups.get("method", {}))

    def _optimizer(self) -> Any:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        if self.method.only_matrices:
            # orthogonalised steps (Jordan et al. 2024) of the size of AdamW's: on the pocket model (apple, one seed) two thirds of
            # AdamW's redirect error after as many steps, with one moment to keep in place of two
            return StackedMuon(self.trained, lr=rate, weight_decay=decay)
        return torch.optim.AdamW(self.trained, lr=rate, weight_decay=decay)

    def fit(self, progress: Progress) -> None:
        """Train to the end, from the last checkpoint of the same inputs where there is one.

        Raises:
            UserError: a loss term is not finite.
        """
        settings, optimizer = self.settings, self._optimizer()
        warmup = max(1, round(WARMUP_SHARE * settings.steps))
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, max(1, settings.steps))
        fit = Fit(
            self.trained,
            optimizer,
            schedule,
            self._last,
            settings.validate_every,
            self._groups,
            self._restore,
            GRADIENT_NORM,
            self.accelerator,
        )
        start = self._resume(fit)
        began = time.perf_counter()
        with progress(f"training ({settings.objective})", settings.steps) as task:
            task.advance(start)
            if not start:
                with sharding.sharing():
                    self._validated(0)
            self.first_loss = self.rows[0]["loss"]

            def loss_of(step: int) -> torch.Tensor:
                batch = self.data.batch("train", step)
                with self.accelerator.autocast():
                    terms = self.method.losses(self.towers, batch)
                loss: torch.Tensor = self._total(terms)
                seconds = (time.perf_counter() - began) / (step + 1 - start)
                self.samples_per_second = (len(batch.forget) + len(batch.retain)) / seconds
                # the numbers are asked for where something waits for the device anyway
                row = self._row(step + 1, "train", dict.fromkeys(terms, math.nan), math.nan, 0.0)
                self._waiting.append((row, [torch.as_tensor(term).detach() for term in (*terms.values(), loss)]))
                return loss

            def after(done: int, rate: float) -> None:
                self._waiting[-1][0]["learning_rate"] = rate
                if self.accelerator.device.type == "cpu":  # which nothing waits for: a loss that is not finite is told at once
                    self._settle()
                task.advance()

            with sharding.sharing():
                fit.run(start, settings.steps, loss_of, after, self._validated)

    def _row(self, step: int, split: str, terms: dict[str, float], loss: float, rate: float) -> dict[str, Any]:
        return {
            "step": step,
            "split": split,
            "loss": loss,
            "terms": terms,
            "learning_rate": rate,
            "samples_per_second": round(self.samples_per_second, 1),
        }

    def _total(self, terms: dict[str, Any]) -> Any:
        """The weighted sum of the terms."""
        return sum(self.settings.weights[name] * term for name, term in terms.items())

    def _settle(self) -> None:
        """Give the rows of the last steps their numbers.

        Raises:
            UserError: one is not finite.
        """
        for row, numbers in self._waiting:
            *terms, loss = torch.stack([number.float() for number in numbers]).tolist()
            row["loss"], row["terms"] = loss, dict(zip(row["terms"], terms, strict=True))
            self._check_finite(row)
            self.rows.append(row)
        self._waiting.clear()

    def _check_finite(self, row: dict[str, Any]) -> None:
        for name, term in row["terms"].items():
            if not math.isfinite(term):
                kept = f"the last good checkpoint is {self._best}" if self._best.is_file() else "no checkpoint was reached"
                raise UserError(
                    f"Loss term {name!r} is not finite at step {row['step']}: pass a smaller --learning-rate (now "
                    f"{self.settings.learning_rate:g}) or --precision no; {kept}."
                )

    def _validated(self, done: int) -> None:
        """The record of the steps so far with a validation behind it, written."""
        self._settle()
        self.rows.append(self._validate(done))
        losses = parallel.gathered(self.rows[-1]["loss"])
        if max(losses) - min(losses) > DRIFT * abs(max(losses)):
            raise UserError(
                f"After {done} steps the processes no longer compute the same losses ({min(losses):.6g} to {max(losses):.6g}): use devices "
                "of one kind, or train with one process."
            )
        if parallel.is_main():
            write_jsonl_atomic(self.metrics, self.rows)

    def _validate(self, step: int) -> dict[str, Any]:
        """Mean terms over fixed validation batches; keeps the best state. The original itself is never kept."""
        sums: dict[str, Any] = {}
        count = VALIDATION_BATCHES if self.settings.steps else 1  # a solution without steps has no rival
        with torch.no_grad(), self.accelerator.autocast():
            for number in range(count):
                for name, term in self.method.losses(self.towers, self.data.batch("validation", number)).items():
                    sums[name] = sums.get(name, 0.0) + term / count
        means = {name: float(total) for name, total in sums.items()}
        row = self._row(step, "validation", means, float(self._total(means)), 0.0)
        self._check_finite(row)
        if self._is_kept(row):
            self.best_loss, self.best_step, self.best_terms = row["loss"], step, means
            save_checkpoint(self._best, {"trained": self._state()}, torch.optim.SGD(self.trained), step)
        return row

    def _resume(self, fit: Fit) -> int:
        """The step to go on from, with the record so far; files of other inputs, or damaged ones, are dropped."""
        stamp = self.checkpoints / "inputs.txt"
        files = (self._last, self._best, stamp, self.metrics)
        if parallel.agreed(lambda: all(path.is_file() for path in files) and stamp.read_text(encoding="utf-8") == self.inputs):
            with contextlib.suppress(KeyError, ValueError, RuntimeError):
                start = fit.resume()
                parallel.refuse_differences({"the steps of the last checkpoint": start})
                self.rows = [row for row in read_jsonl(self.metrics, finite=False) if row["step"] <= start]
                for row in self.rows:
                    if row["split"] == "validation" and self._is_kept(row):
                        self.best_loss, self.best_step, self.best_terms = row["loss"], row["step"], row["terms"]
                return start
        self.best_loss, self.best_step, self.best_terms = math.inf, 0, {}
        parallel.barrier()  # a damaged file is one in every process, and gone only when all have seen it
        if parallel.is_main():
            self._last.unlink(missing_ok=True)
            self._best.unlink(missing_ok=True)
            write_text_atomic(stamp, self.inputs)
        return 0

    def restore_best(self) -> None:
        """Load the state that validated best."""
        parallel.barrier()
        _, groups = load_checkpoint(self._best, torch.optim.SGD(self.trained))
        self._load_state(groups["trained"])
