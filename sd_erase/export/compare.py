"""Whether an exported encoder is the erased one: hidden states of both on prompts of every length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_erase.components import build_text_encoder
from sd_erase.errors import UserError
from sd_erase.export.job import TOLERANCE, Erased


def check(erased: Erased, found: Callable[[], dict[str, Any]], dtype: str) -> float:
    """The largest relative difference of the hidden states of an encoder with the tensors `found()` from the erased encoder's.

    Raises:
        UserError: rounding to `dtype` changes the encoder too much.
    """
    difference = compare(erased, found)
    if not difference <= TOLERANCE[dtype]:  # also where it is not a number
        raise UserError(f"The encoder changes by {difference:.2g} when rounded to {dtype}: pass --dtype float32.")
    return difference


def compare(erased: Erased, found: Callable[[], dict[str, Any]]) -> float:
    """The same, without a limit; one encoder is in memory at a time."""
    expected = hidden_states(erased.folder, erased.state(), erased.encoder.pooled)
    return largest_difference(expected, hidden_states(erased.folder, found(), erased.encoder.pooled))


def largest_difference(expected: list[Any], found: list[Any]) -> float:
    """The largest relative difference of any vector (last dimension) of `found` from the same one of `expected`, in L2."""
    pairs = zip(expected, found, strict=True)
    return max(float(((first - second).norm(dim=-1) / first.norm(dim=-1).clamp_min(1e-12)).max()) for first, second in pairs)


def hidden_states(folder: Path, tensors: dict[str, Any], pooled: bool) -> list[Any]:
    """All hidden states [prompts, tokens, width] in float32 of an encoder with these tensors, and its pooled projection."""
    import torch

    model = build_text_encoder(folder, tensors, pooled)
    with torch.inference_mode():
        output = model(input_ids=prompts(model.config), output_hidden_states=True)
    states = [*output.hidden_states, output.last_hidden_state]
    return [*states, output.text_embeds] if pooled else states


def prompts(settings: Any) -> Any:
    """Token ids [prompts, positions] of an empty prompt, short ones and ones that fill every position."""
    import torch

    length, end = settings.max_position_embeddings, settings.vocab_size - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((9, length), end)  # Stable Diffusion pads with the end token
    ids[:, 0] = end - 1
    for row, words in enumerate((0, 1, 2, 4, 8, 16, length // 2, length - 3, length - 2)):
        words = min(words, length - 2)
        ids[row, 1 : 1 + words] = torch.randint(0, end - 1, (words,), generator=generator)
    return ids
