"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with few launches.

torch's own orthogonalises one matrix after the other: of ViT-L/14's 72, 29 ms a step on an H200, where a batch of each shape takes 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sd_erase.resources import WIDE

MOST = 2**26  # numbers of a stack, so that the largest encoder's take no more memory than a few of its matrices


class StackedMuon(torch.optim.Muon):
    """torch's Muon, its state and its numbers to rounding, but the matrices of one shape are orthogonalised together.

    The steps have the size of AdamW's (``match_rms_adamw``, Liu et al. 2025, arXiv:2502.16982), so that its learning rates serve.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float):
        """
        Args:
            matrices: [out, in] each.
            lr: learning rate.
            weight_decay: decoupled.

        Raises:
            ValueError: one is no matrix.
        """
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step down the gradients; matrices without one stay.

        Returns:
            What `closure` gives.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            gradients = [matrix.grad for matrix in matrices]
            for matrix in matrices:
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
            moments = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, moments, group["momentum"]) if group["nesterov"] else moments
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            for places in _stacks(matrices):
                stack = torch.stack([updates[place] for place in places])
                directions = orthogonalised(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                size = group["lr"] * 0.2 * max(stack.shape[1:]) ** 0.5
                for place, direction in zip(places, directions, strict=True):
                    matrices[place].add_(direction, alpha=-size)
        return loss


def _stacks(matrices: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Places of matrices of one shape and device, at most `MOST` numbers together."""
    alike: dict[Any, list[int]] = {}
    for place, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.device), []).append(place)
    for (shape, _), places in alike.items():
        count = max(1, MOST // shape.numel())
        for start in range(0, len(places), count):
            yield places[start : start + count]


def orthogonalised(stack: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    """Matrices near the orthogonal factors U V^T of those of `stack`, by a quintic Newton-Schulz iteration in bfloat16.

    Small ones on a processor stay in float32, which takes no longer there (128 wide: 2.0 ms a stack of four, either way) and is not moved
    by a gradient's last bits: in bfloat16 they cost 1e-4 of the loss within a dozen steps, whether from threads or from processes.

    Args:
        stack: [matrices, out, in].
        coefficients: of the first, third and fifth power.
        steps: of the iteration.
        eps: the least norm by which a matrix is divided.
    """
    a, b, c = coefficients
    is_small = stack.device.type == "cpu" and min(stack.shape[1:]) < WIDE
    found = stack.float() if is_small else stack.bfloat16()
    is_tall = found.shape[1] > found.shape[2]
    found = found.mT if is_tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found
