"""The one loop of training steps: an erasure's, and those of the pocket model's components.

What a step computes is a function of its number alone, so that a training that goes on from a checkpoint sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_erase import sharding
from sd_erase.checkpoint import load_checkpoint, save_checkpoint

Groups = Mapping[str, Mapping[str, torch.Tensor]]  # of a checkpoint's tensors, by what they belong to


@dataclass
class Fit:
    """Gradient descent with a clipped norm, a schedule and a checkpoint to go on from."""

    trained: Sequence[torch.nn.Parameter]
    optimizer: Any
    schedule: Any  # a learning rate scheduler of torch, of `optimizer`
    checkpoint: Path
    every: int  # steps between checkpoints
    state: Callable[[], Groups]  # what a checkpoint keeps beside the optimizer's moments and the number of steps
    restore: Callable[[dict[str, dict[str, torch.Tensor]]], None]  # the inverse
    norm: float = 1.0  # that all gradients together may have
    accelerator: Any = None  # of Accelerate, where precision or several processes want one

    def resume(self) -> int:
        """How many steps the checkpoint has behind it, whose state is then this one's.

        Raises:
            KeyError, ValueError, RuntimeError: it is damaged, or another training's.
        """
        done, groups = load_checkpoint(self.checkpoint, self.optimizer)
        self.restore(groups)
        for _ in range(done):
            self.optimizer.step()  # gradients are None: only tells the schedule that steps were taken
            self.schedule.step()
        return done

    def run(
        self,
        start: int,
        steps: int,
        loss_of: Callable[[int], torch.Tensor],
        after: Callable[[int, float], None],
        pause: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Steps `start` to `steps`.

        Args:
            loss_of: the loss of step 0, 1, ...; nothing in it need wait for the device.
            after: told of each step how many are done and the learning rate that it had.
            pause: called before each checkpoint with how many steps are done.
        """
        optimizer = self.optimizer if self.accelerator is None else self.accelerator.prepare(self.optimizer)
        for step in range(start, steps):
            rate = self.schedule.get_last_lr()[0]
            self._descend(loss_of(step), optimizer)
            self.schedule.step()
            done = step + 1
            after(done, rate)
            if done % self.every == 0 or done == steps:
                pause(done)
                save_checkpoint(self.checkpoint, self.state(), optimizer, done)

    def _descend(self, loss: torch.Tensor, optimizer: Any) -> None:
        if self.accelerator is None:
            loss.backward()
            sharding.average_gradients(self.trained)
            torch.nn.utils.clip_grad_norm_(self.trained, self.norm)
        else:
            self.accelerator.backward(loss)
            sharding.average_gradients(self.trained)
            self.accelerator.clip_grad_norm_(self.trained, self.norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
