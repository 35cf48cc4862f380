"""Least squares on the output maps of a few MLPs: an edit in seconds, without a gradient.

For one layer, with X the inputs of ``mlp.fc2``, forget rows f and kept rows k:

    min over dW of  mean ||dW X_f - E_f||^2 + strength * mean ||dW X_k - E_k||^2 + ridge * ||dW||^2

E_f is what the block's output lacks to the frozen encoder's output for the anchor's caption, E_k what it lacks to the frozen
encoder's output for the same caption. The layers are solved one after the other, each from the states that the edits before it
leave, so that a later one takes away what an earlier one could not. The form is that of UCE (Gandikota et al. 2024,
arXiv:2308.14761) and MEMIT (Meng et al. 2023, arXiv:2210.07229), there on cross-attention and on facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STRENGTH = 3.0  # of keeping against forgetting
RIDGE = 1e-2  # relative to the mean square of the inputs
LAYERS = 4  # spread evenly over the encoder's depth
BATCH = 128  # captions at once


def spread(layers: int, count: int = LAYERS) -> list[int]:
    """`count` layer numbers spread evenly over an encoder of `layers` layers, the first and the last among them."""
    return sorted({round(step * (layers - 1) / max(1, count - 1)) for step in range(count)})


def edit(
    text: Any,
    frozen: Any,
    forget_ids: torch.Tensor,
    target_ids: torch.Tensor,
    index: torch.Tensor,
    kept_ids: torch.Tensor,
    kept_weights: torch.Tensor,
    layers: Sequence[int] | None = None,
) -> None:
    """Change the ``mlp.fc2`` weights of `layers` in place.

    Args:
        text: the CLIPTextModel to edit.
        frozen: its unchanged copy.
        forget_ids: tokens [captions, positions] of captions that name the concept.
        target_ids: tokens of the captions that stand in their place.
        index: [captions, positions], the position of the target that each position shall equal.
        kept_ids: tokens of captions whose states shall stay, with a weight each in `kept_weights`.
        layers: which layers; None spreads `LAYERS` of them.
    """
    import torch

    blocks = getattr(text, "text_model", text).encoder.layers
    frozen_blocks = getattr(frozen, "text_model", frozen).encoder.layers
    for layer in spread(len(blocks)) if layers is None else layers:
        linear = blocks[layer].mlp.fc2
        size, width = linear.in_features, linear.out_features
        gram, cross = (torch.zeros(rows, size, dtype=torch.float64) for rows in (size, width))
        kept_share = STRENGTH / (float(kept_weights.sum()) * kept_ids.shape[1])
        forget_share = 1.0 / index.numel()
        for start in range(0, len(forget_ids), BATCH):
            part = slice(start, start + BATCH)
            inputs, output = _at(text, blocks[layer], forget_ids[part])
            _, target = _at(frozen, frozen_blocks[layer], target_ids[part])
            lacking = target.gather(1, index[part, :, None].expand_as(target)) - output
            _accumulate(gram, cross, inputs, lacking, forget_share)
        for start in range(0, len(kept_ids), BATCH):
            part = slice(start, start + BATCH)
            inputs, output = _at(text, blocks[layer], kept_ids[part])
            _, target = _at(frozen, frozen_blocks[layer], kept_ids[part])
            root = kept_weights[part, None, None].sqrt().to(inputs.device)
            _accumulate(gram, cross, root * inputs, root * (target - output), kept_share)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        change = torch.linalg.solve(gram, cross.T).T  # gram is symmetric
        with torch.no_grad():
            linear.weight += change.to(linear.weight)


def _accumulate(gram: torch.Tensor, cross: torch.Tensor, inputs: torch.Tensor, lacking: torch.Tensor, share: float) -> None:
    rows, wanted = inputs.flatten(0, 1), lacking.flatten(0, 1)
    gram += share * (rows.T @ rows).double().cpu()
    cross += share * (wanted.T @ rows).double().cpu()


def _at(text: Any, block: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a block's ``fc2`` [captions, positions, 4 * width] and the block's output [captions, positions, width]."""
    import torch

    seen: dict[str, torch.Tensor] = {}
    hooks = (
        block.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0])),
        block.register_forward_hook(lambda _, __, output: seen.update(output=output[0] if isinstance(output, tuple) else output)),
    )
    try:
        with torch.no_grad():
            text(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["inputs"], seen["output"]
