"""The erased text encoders as one file for Forge (models/text_encoder).

Forge reads the text encoder of Stable Diffusion 1.x as ComfyUI does. Of SDXL it takes `text_projection.weight` in OpenCLIP's
orientation, whatever its name says, so that Hugging Face's file is silently wrong there; under a full checkpoint's names both encoders
are right, in one file. What it is given for SD 2.x never reaches the model where the checkpoint has its usual names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sd_erase import formats
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import compare, text_encoder
from sd_erase.export.job import SHORT, Erased, Job, rounded, save, sha256
from sd_erase.export.modelspec import modelspec
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir


def export(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write the file, load it back, compare it with the run's encoders, and only then give it its name.

    Returns:
        The manifest, as `text_encoder.export`'s with one file.

    Raises:
        UserError: Stable Diffusion 2.x, or as `text_encoder.export`.
    """
    job = Job.of(config, run, progress)
    if job.base.family == "sd2":
        raise UserError(
            f"Forge ignores text encoders' files of Stable Diffusion 2.x without a word ({job.base.name}): "
            "pass --to a1111 with --checkpoint, or --to lora."
        )
    if job.base.family == "sd1":
        return text_encoder.export(config, run, progress)
    target = job.target(f"{job.stem}-text_encoders-forge-{SHORT[config.export.dtype]}.safetensors")
    return job.once([str(target)], lambda: {"files": [_write(job, target)]}, [target])


def _write(job: Job, target: Any) -> dict[str, Any]:
    import torch

    dtype = job.config.export.dtype
    tensors: dict[str, Callable[[], Any]] = {}
    places = {erased: _place(job, erased) for erased in job.encoders}
    for erased, place in places.items():
        for name, keys in formats.stored_names(erased.keys, (), place.prefix, place.open_clip).items():
            tensors[name] = functools.partial(_stored, erased, name, keys, dtype)
    size = sum(make().numel() for make in tensors.values()) * getattr(torch, dtype).itemsize
    description = f"CLIP text encoders from which sd-erase erased {job.concept} (objective {job.objective}), for Forge."
    title = f"{job.base.name} text encoders without {job.concept}"
    metadata = {
        "format": "pt",
        **modelspec(title, description, job.base, "text-encoder", job.date),
        **job.provenance(),
    }
    with job.written(target, size) as temporary:
        digest = save(temporary, tensors, dtype, metadata)
        header = formats.read_header(temporary)

        def found(erased: Erased) -> dict[str, Any]:
            place = places[erased]
            return formats.read_encoder(header, place.prefix, place.open_clip, erased.encoder.pooled)

        difference = max(compare.check(erased, functools.partial(found, erased), dtype) for erased in places)
    return {
        "path": str(target),
        "encoder": " + ".join(erased.name for erased in places),
        "tensors": len(tensors),
        "bytes": target.stat().st_size,
        "dtype": dtype,
        "sha256": sha256(target),
        "data_sha256": digest,
        "difference": difference,
    }


def _stored(erased: Erased, name: str, keys: tuple[str, ...], dtype: str) -> Any:
    return formats.joined(name, [rounded(key, erased.tensor(key), dtype) for key in keys]).contiguous()


def _place(job: Job, erased: Erased) -> formats.Place:
    return next(place for place in formats.PLACES[job.base.family] if place.encoder == erased.name)
