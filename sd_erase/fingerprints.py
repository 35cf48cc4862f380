"""A few of a text encoder's weights, by which another program can tell whether it holds the base that something was erased from.

The query projections are sampled at fixed places of up to eight layers. Fine-tunes differ in all of them; storing a model in half
precision moves each by a thousandth at most.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from sd_erase.formats import PREFIX, count_layers

LAYERS, NUMBERS = 8, 8  # layers that are looked at, numbers of each
SAME = 5e-3  # relative L2 difference that storing one of two encoders in half precision explains


def sample(state: Mapping[str, Any]) -> Any:
    """Numbers [at most LAYERS * NUMBERS] of an encoder, in float32 on the CPU.

    Args:
        state: its tensors by prefixed names.
    """
    import torch

    layers = count_layers(name for name in state if name.startswith(PREFIX))
    chosen = sorted({round(step * (layers - 1) / (LAYERS - 1)) for step in range(LAYERS)})
    weights = [state[f"{PREFIX}encoder.layers.{layer}.self_attn.q_proj.weight"].flatten() for layer in chosen]
    places = [torch.linspace(0, len(weight) - 1, NUMBERS, dtype=torch.float64).long().to(weight.device) for weight in weights]
    return torch.cat([weight[place].float().cpu() for weight, place in zip(weights, places, strict=True)])


def written(state: Mapping[str, Any]) -> str:
    """`sample` as text for a file's metadata: base64 of float16."""
    return base64.b64encode(sample(state).half().numpy().astype("<f2").tobytes()).decode()


def difference(text: str, state: Mapping[str, Any]) -> float:
    """Relative L2 difference of an encoder from the one that `text` was written of; infinite where they are of different sizes.

    Raises:
        ValueError: `text` is none of `written`'s.
    """
    import numpy as np

    stated = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    own = sample(state).numpy()
    if stated.shape != own.shape:
        return float("inf")
    return float(np.linalg.norm(own - stated)) / max(float(np.linalg.norm(stated)), 1e-12)
