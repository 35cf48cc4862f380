"""The erased text encoder as one safetensors file for ComfyUI (models/text_encoders) and Forge (models/text_encoder)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from sd_erase.components import added_tokens
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import compare
from sd_erase.export.job import SHORT, Erased, Job, rounded, save, sha256
from sd_erase.export.modelspec import modelspec
from sd_erase.formats import read_encoder, read_header
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir


def export(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write each erased encoder of `run`, load it back, compare it with the run's, and only then give it its name.

    Returns:
        The manifest: "files", one mapping an encoder (path, encoder, tensors, bytes, dtype, sha256, data_sha256, difference).

    Raises:
        UserError: the run has no erased encoder, the target is read-only or too small, or the encoder does not fit the type.
    """
    job = Job.of(config, run, progress)
    output = job.folder()
    if len(job.encoders) > 1 and output.suffix == ".safetensors" and not output.is_dir():
        raise UserError(
            f"Base {job.base.name} has {len(job.encoders)} text encoders: pass a folder with --output, not the file {output}."
        )
    targets = [job.target(f"{job.stem}-{_kind(erased)}-{SHORT[config.export.dtype]}.safetensors") for erased in job.encoders]

    def make() -> dict[str, Any]:
        with job.progress("exporting", len(targets)) as task:
            files = []
            for erased, target in zip(job.encoders, targets, strict=True):
                files.append(write_encoder(job, erased, target))
                task.advance()
        return {"files": files, "warnings": [text for erased in job.encoders for text in added_tokens(erased.tokens)]}

    return job.once([str(target) for target in targets], make, targets)


def vision_name(width: int) -> str:
    """What CLIP calls an encoder of this width; SD.Next tells encoders by these words in their files' names alone."""
    return {768: "vit-l", 1024: "vit-h", 1280: "vit-g"}.get(width, "")


def _kind(erased: Erased) -> str:
    """What of the pipeline a file is, for its name."""
    return "-".join(filter(None, (erased.name, vision_name(erased.width))))


def write_encoder(job: Job, erased: Erased, target: Path) -> dict[str, Any]:
    """One encoder under Hugging Face's names in the type that the settings ask for; its entry in the manifest."""
    import torch

    dtype = job.config.export.dtype
    # all before anything is written
    size = sum(rounded(key, erased.tensor(key), dtype).numel() for key in erased.keys) * getattr(torch, dtype).itemsize
    metadata = {
        "format": "pt",
        **modelspec(
            f"{job.base.name} {erased.name} without {job.concept}",
            f"CLIP text encoder from which sd-erase erased {job.concept} (objective {job.objective}).",
            job.base,
            "text-encoder",
            job.date,
        ),
        **job.provenance(),
        "sd_erase.encoder": erased.name,
    }
    with job.written(target, size) as temporary:
        digest = save(temporary, {key: functools.partial(_rounded, erased, key, dtype) for key in erased.keys}, dtype, metadata)
        difference = compare.check(erased, lambda: read_encoder(read_header(temporary), projection=erased.encoder.pooled), dtype)
    return {
        "path": str(target),
        "encoder": erased.name,
        "tensors": len(erased.keys),
        "bytes": target.stat().st_size,
        "dtype": dtype,
        "sha256": sha256(target),
        "data_sha256": digest,
        "difference": difference,
    }


def _rounded(erased: Erased, key: str, dtype: str) -> Any:
    return rounded(key, erased.tensor(key), dtype)
