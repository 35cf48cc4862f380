"""A denoiser with a few tensors of its own: what a published comparator changes, and how a run holds it.

Such a run has ``encoder/unet.safetensors`` (`RunDir.denoiser`), the changed tensors under the denoiser's names, beside a text encoder
that is the original's. Whatever draws with the run takes both (`pipeline.load_erased`). It is no export: sd-erase's own methods leave
the denoiser alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.mismatch import Reshaped, mismatch
from sd_erase.rundir import RunDir, replacing
from sd_erase.weights import check_finite

CROSS_ATTENTION = ".attn2."  # of diffusers' UNets: where they read the text


def cross_attention(unet: Any, endings: Collection[str] = ("",)) -> dict[str, Any]:
    """Name -> parameter of a UNet's cross-attention, of those whose names end so ("to_k.weight"); empty where it has none."""
    return {name: each for name, each in unet.named_parameters() if CROSS_ATTENTION in name and name.endswith(tuple(endings))}


def copied(unet: Any, own: Collection[str]) -> Any:
    """A copy whose parameters `own` are its own and all others the same objects, so that memory holds those once."""
    shared = {id(each): each for name, each in (*unet.named_parameters(), *unet.named_buffers()) if name not in own}
    return copy.deepcopy(unet, shared)


def save(tensors: Mapping[str, Any], run: RunDir, metadata: Mapping[str, str]) -> None:
    """Write what a training changed of the denoiser into `run`, through a rename."""
    with replacing(run.denoiser) as temporary:
        held = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
        formats.save_tensors(temporary, held, {"format": "pt", **metadata})


def changed(unet: Any, file: Path) -> Any:
    """A copy of `unet` with the tensors of `file`, as the denoiser's own type and on its device.

    Raises:
        UserError: the file is damaged, or its tensors are not this denoiser's or no numbers.
    """
    import torch

    tensors, known = formats.read_tensors(file), dict(unet.named_parameters())
    shapes = [
        Reshaped(name, tuple(each.shape), tuple(known[name].shape))
        for name, each in tensors.items()
        if name in known and each.shape != known[name].shape
    ]
    if shapes or not tensors.keys() <= known.keys():
        raise mismatch("denoiser (UNet)", file, unknown=tensors.keys() - known.keys(), shapes=shapes)
    check_finite(tensors, "denoiser (UNet)", file)
    result = copied(unet, tensors.keys())
    with torch.no_grad():
        for name, each in result.named_parameters():
            if name in tensors:
                each.copy_(tensors[name])
    return result
