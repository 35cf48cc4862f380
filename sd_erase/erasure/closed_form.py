"""Least squares on the output maps of a few MLPs: an edit in seconds, without a gradient.

For one layer, with X the inputs of ``mlp.fc2``, forget rows f and kept rows k:

    min over dW of  mean ||dW X_f - E_f||^2 + strength * mean ||dW X_k - E_k||^2 + ridge * ||dW||^2

E_f is what the block's output lacks to the frozen encoder's output for the anchor's caption, E_k what it lacks to the frozen
encoder's output for the same caption. The layers are solved one after the other, each from the states that the edits before it
leave, so that a later one takes away what an earlier one could not: captions go through both encoders once, block by block, and wait
before each edit for its solution. The form is that of UCE (Gandikota et al. 2024,
arXiv:2308.14761) and MEMIT (Meng et al. 2023, arXiv:2210.07229), there on cross-attention and on facts.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase.progress import NoProgress, Progress

if TYPE_CHECKING:
    import torch

STRENGTH = 3.0  # of keeping against forgetting
RIDGE = 1e-2  # relative to the mean square of the inputs
LAYERS = 4  # spread evenly over the encoder's depth
BATCH = 128  # captions at once
BLOCKS = 4  # of columns, whose products with those before them are known


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
    progress: Progress | None = None,
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
        progress: told of each batch behind each block.
    """
    import torch

    blocks, frozen_blocks = _blocks(text), _blocks(frozen)
    chosen = set(spread(len(blocks)) if layers is None else layers)
    forget_root = index.numel() ** -0.5
    kept_roots = (STRENGTH / (kept_weights.sum() * kept_ids.shape[1]) * kept_weights).sqrt().to(kept_ids.device)
    with torch.no_grad():
        rows = [
            _Rows(_Stream.of(text, forget_ids[part]), _Stream.of(frozen, target_ids[part]), index[part], forget_root)
            for part in _parts(len(forget_ids))
        ] + [
            _Rows(_Stream.of(text, kept_ids[part]), _Stream.of(frozen, kept_ids[part]), None, kept_roots[part, None, None])
            for part in _parts(len(kept_ids))
        ]
        with (progress or NoProgress())("closed form", (max(chosen) + 1) * len(rows)) as task:
            for layer in range(max(chosen) + 1):
                for part in rows:
                    part.wanted.hidden = part.wanted.behind(frozen_blocks[layer])
                if layer in chosen:
                    _solve(blocks[layer], rows)
                for part in rows:
                    part.student.hidden = part.student.behind(blocks[layer])
                    task.advance()


def _solve(block: Any, rows: Sequence[_Rows]) -> None:
    """Change the ``fc2`` of the block that `rows` stand before."""
    import torch

    linear = block.mlp.fc2
    # no card of Apple's computes in float64
    device = torch.device("cpu") if linear.weight.device.type == "mps" else linear.weight.device
    size, width = linear.in_features, linear.out_features
    gram, cross = (torch.zeros(each, size, dtype=torch.float64, device=device) for each in (size, width))
    for part in rows:
        seen: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        try:
            lacking = part.lacking(block)
        finally:
            hook.remove()
        (inputs,) = seen
        own, missing = ((part.root * each).flatten(0, 1) for each in (inputs, lacking))
        _add_gram(gram, own)
        cross += (missing.T @ own).to(cross)
    gram += gram.triu(1).T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=device)
    linear.weight += torch.linalg.solve(gram, cross.T).T.to(linear.weight)  # gram is symmetric


def _add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the products of the columns of `rows` [rows, size] to the upper triangle of `gram`: by blocks, five eighths of the work."""
    size = rows.shape[1]
    edges = [size * part // BLOCKS for part in range(BLOCKS + 1)]
    for start, stop in itertools.pairwise(edges):
        block = rows[:, start:stop].T @ rows[:, start:]
        block[:, : stop - start].triu_()
        gram[start:stop, start:] += block


@dataclass
class _Stream:
    """Captions on their way through an encoder: `hidden` states [captions, positions, width], and what a block takes beside them."""

    hidden: torch.Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    @classmethod
    def of(cls, text: Any, ids: torch.Tensor) -> _Stream:
        """Captions before the first block."""
        taken: dict[str, Any] = {}

        def take(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            taken.update(named, arguments=arguments)
            raise _BeforeBlocks

        hook = _blocks(text)[0].register_forward_pre_hook(take, with_kwargs=True)
        try:
            with contextlib.suppress(_BeforeBlocks):
                text(input_ids=ids)
        finally:
            hook.remove()
        hidden, *others = taken.pop("arguments") or (taken.pop("hidden_states"),)
        return cls(hidden, tuple(others), taken)

    def behind(self, block: Any) -> torch.Tensor:
        """What `block` gives, [captions, positions, width]."""
        output = block(self.hidden, *self.others, **self.named)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class _Rows:
    """Some captions in both encoders, and the root of what each of their positions counts."""

    student: _Stream
    wanted: _Stream
    index: torch.Tensor | None  # [captions, positions] of the wanted states; None keeps each at its place
    root: Any  # a number, or [captions, 1, 1]

    def lacking(self, block: Any) -> torch.Tensor:
        """What the student's `block` lacks to the wanted states, which are one block ahead."""
        wanted = self.wanted.hidden
        if self.index is not None:
            wanted = wanted.gather(1, self.index[..., None].expand_as(wanted))
        return wanted - self.student.behind(block)


class _BeforeBlocks(Exception):
    """Ends a forward pass where the states before the first block are known."""


def _blocks(text: Any) -> Any:
    return getattr(text, "text_model", text).encoder.layers


def _parts(count: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]
