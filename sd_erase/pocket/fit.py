"""One training of a component: AdamW under a cosine schedule, with checkpoints, a log, progress and a limit of time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd_erase.fitting import Fit

log = logging.getLogger("sd_erase.pocket")
COOLING = 0.1  # of a limit of time: the share in which the learning rate falls to zero


def generator_of(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class _TimeUp(Exception):
    """The limit of time has come; what was trained so far is kept."""


class _Clock:
    """The seconds that a training has taken, those before a resume too.

    Args:
        limit: seconds; 0 for none.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self._before, self._began = limit, 0.0, time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        return self._before + time.perf_counter() - self._began

    def cooling(self) -> float:
        """What the learning rate is multiplied by: 1, falling to 0 in the last tenth of the limit."""
        return min(1.0, max(0.0, (self.limit - self.seconds()) / (COOLING * self.limit))) if self.limit else 1.0

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """For a checkpoint; nothing without a limit."""
        return {"clock": {"seconds": torch.tensor([self.seconds()])}} if self.limit else {}

    def restore(self, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from `state`."""
        self._before = float(groups["clock"]["seconds"]) if "clock" in groups else 0.0
        self._began = time.perf_counter()


def fit(
    name: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    checkpoint_every: int = 250,
    minutes: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Train `model` with AdamW under a cosine schedule, with resumable safetensors checkpoints and a log.

    Args:
        minutes: when so many are spent (over all resumes), the training ends with what it has, its learning rate having fallen to zero in the
            last tenth of them; 0 sets no limit. Only a training that meets its limit depends on the machine's speed.

    Returns:
        The state dict to keep: the exponential moving average where `ema_decay` is given, else the last weights.
    """
    final = folder / f"{name}.safetensors"
    if final.is_file():
        return load_file(final)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    clock = _Clock(60 * minutes)

    def factor(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        cosine = (step + 1) / warmup if step < warmup else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        return cosine * clock.cooling()

    average = {key: value.detach().clone() for key, value in model.state_dict().items()} if ema_decay else {}

    def restore(groups: dict[str, dict[str, torch.Tensor]]) -> None:
        model.load_state_dict(groups["model"])
        average.update(groups.get("average", {}))
        clock.restore(groups)

    descent = Fit(
        trained,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        folder / f"{name}.checkpoint.safetensors",
        checkpoint_every,
        lambda: {"model": model.state_dict(), "average": average, **clock.state()},
        restore,
    )
    start = 0
    if descent.checkpoint.is_file():
        start = descent.resume()
        log.info("%s: resumed at step %d", name, start)
    began, recent = time.perf_counter(), []

    def remembered(step: int) -> torch.Tensor:
        loss = loss_of(step)
        recent.append(loss.item())
        return loss

    def after(done: int, _: float) -> None:
        if ema_decay:
            decay = min(ema_decay, done / (9 + done))
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    if value.is_floating_point():
                        average[key].lerp_(value, 1 - decay)
        if done % 50 == 0:
            rate = (time.perf_counter() - began) / (done - start)
            left = rate * (steps - done)
            if clock.limit:
                left = min(left, clock.limit - clock.seconds())
            log.info("%s %d/%d loss %.4f, %.3f s/step, %.1f min left", name, done, steps, np.mean(recent), rate, left / 60)
            recent.clear()
        if clock.limit and clock.seconds() >= clock.limit and done < steps:
            raise _TimeUp(done)

    try:
        descent.run(start, steps, remembered, after)
    except _TimeUp as reached:
        log.info("%s: ended by its limit of %g minutes at step %s of %d", name, minutes, reached, steps)
    result = average if ema_decay else {key: value.detach().clone() for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in result.items()}, final)
    descent.checkpoint.unlink(missing_ok=True)
    return result
