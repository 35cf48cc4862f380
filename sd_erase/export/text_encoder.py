"""The erased text encoder as one safetensors file for ComfyUI (models/text_encoders) and Forge (models/text_encoder).

The names keep the prefix ``text_model.``, which transformers 5.6 and later drop and without which ComfyUI loads nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sd_erase import __version__
from sd_erase.bases import TextEncoder
from sd_erase.bases import resolve as resolve_base
from sd_erase.config import RunConfig
from sd_erase.errors import UserError, unknown_choice
from sd_erase.export.metadata import PREFIX, data_sha256, modelspec, text_encoder_keys
from sd_erase.rundir import RunDir, fingerprint

STAGE = "export-comfyui"
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
# largest relative difference of hidden states that rounding to a type explains, with room to spare
TOLERANCE = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.15}
SPARE_BYTES = 1 << 20


def export(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Write each erased encoder of `run`, load it back, compare it with the run's, and only then give it its name.

    Returns:
        The manifest: "files", one mapping an encoder (path, encoder, tensors, bytes, dtype, sha256, data_sha256, difference).

    Raises:
        UserError: the run has no erased encoder, the target is read-only or too small, or the encoder does not fit the type.
    """
    if config.export.dtype not in SHORT:
        raise unknown_choice("Export type", config.export.dtype, SHORT)
    trained = run.require("train", "train")
    base = resolve_base(config.base)
    sources = {encoder: run.encoder / encoder.name for encoder in base.encoders}
    for encoder, folder in sources.items():
        for name in ("model.safetensors", "config.json"):
            if not (folder / name).is_file():
                raise UserError(f"Run {run} has no {encoder.name}/{name}: run `sd-erase train` again.")
    targets = _targets(config, run, list(sources), base.name)
    inputs = fingerprint(
        *(folder / "model.safetensors" for folder in sources.values()),
        [trained.get("inputs"), list(config.concepts), base.name, config.export.dtype, __version__],
        [str(path) for path in targets.values()],
    )
    done = run.read_manifest(STAGE)
    if done and run.is_complete(STAGE, inputs) and all(_is_intact(file) for file in done["files"]):
        return done
    run.reopen(STAGE)
    date = datetime.datetime.fromtimestamp(run.manifest("train").stat().st_mtime, datetime.timezone.utc)
    provenance = {
        "version": __version__,
        "concept": ", ".join(config.concepts) or Path(config.concept_file).stem,
        "anchor": json.dumps(trained.get("anchor"), ensure_ascii=False),
        "objective": str(trained.get("objective", config.train.objective)),
        "base": base.name,
        "run": run.name,
        "date": date.isoformat(timespec="seconds"),
    }
    files = [
        _export_one(encoder, folder, targets[encoder], config.export.dtype, base.family, provenance)
        for encoder, folder in sources.items()
    ]
    return run.complete(STAGE, inputs, {"files": files})


def _targets(config: RunConfig, run: RunDir, encoders: list[TextEncoder], base: str) -> dict[TextEncoder, Path]:
    """The file of each encoder: --output where it names a file, else a telling name in a folder."""
    output = Path(config.export.output).expanduser() if config.export.output else run.export
    if output.suffix == ".safetensors" and not output.is_dir():
        if len(encoders) > 1:
            raise UserError(f"Base {base} has {len(encoders)} text encoders: pass a folder with --output, not the file {output}.")
        return {encoders[0]: output}
    if output.exists() and not output.is_dir():
        raise UserError(f"Output {output} is neither a folder nor a .safetensors file: pass one of these with --output.")
    stem = "-".join([*config.concepts] or [Path(config.concept_file).stem]).lower().replace(" ", "_").replace("/", "_")
    return {encoder: output / f"{stem}-{base}-{encoder.name}-{SHORT[config.export.dtype]}.safetensors" for encoder in encoders}


def _is_intact(file: dict[str, Any]) -> bool:
    path = Path(file["path"])
    return path.is_file() and path.stat().st_size == file["bytes"] and _sha256(path) == file["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _export_one(
    encoder: TextEncoder, folder: Path, target: Path, dtype: str, family: str, provenance: dict[str, str]
) -> dict[str, Any]:
    import safetensors.torch
    import torch

    original = _read(folder / "model.safetensors")
    layers = 1 + max((int(key.split(".")[3]) for key in original if key.startswith(f"{PREFIX}encoder.layers.")), default=-1)
    keys = text_encoder_keys(layers, projection=encoder.pooled)
    if layers == 0 or not keys <= set(original):
        raise UserError(
            f"Encoder {folder} does not hold the tensors of a CLIP text encoder (first missing: "
            f"{min(keys - set(original), default='its layers')}): run `sd-erase train` again."
        )
    # position_ids and other buffers stay out; contiguous copies, because safetensors refuses shared or strided memory
    tensors = {key: original[key].to(getattr(torch, dtype)).contiguous() for key in sorted(keys)}
    overflown = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if overflown:
        raise UserError(f"Tensor {overflown[0]} does not fit {dtype} or is not finite: pass --dtype float32.")

    plain = safetensors.torch.save(tensors)
    header = int.from_bytes(plain[:8], "little")
    digest = hashlib.sha256(memoryview(plain)[8 + header :]).hexdigest()
    what = f"{provenance['base']} {encoder.name} without {provenance['concept']}"
    metadata = {
        "format": "pt",
        **modelspec(
            what,
            f"CLIP text encoder from which sd-erase erased {provenance['concept']} (objective {provenance['objective']}).",
            family,
            provenance["date"],
            digest,
        ),
        **{f"sd_erase.{key}": value for key, value in provenance.items() if key != "date"},
        "sd_erase.encoder": encoder.name,
    }
    size = len(plain) + sum(len(key) + len(value) + 8 for key, value in metadata.items())
    del plain
    temporary = _reserve(target, size)
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        difference = _compare(temporary, tensors, original, folder, encoder.pooled, dtype, digest)
        os.chmod(temporary, 0o644)  # temporary files are private; this one is for other programs
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "path": str(target),
        "encoder": encoder.name,
        "tensors": len(tensors),
        "bytes": target.stat().st_size,
        "dtype": dtype,
        "sha256": _sha256(target),
        "data_sha256": digest,
        "difference": difference,
    }


def _reserve(target: Path, size: int) -> Path:
    """A temporary file beside `target`, where that is possible and `size` bytes are free."""
    if target.is_dir():
        raise UserError(f"Output {target} is a folder of that name: pass another file with --output.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size + SPARE_BYTES:
            raise UserError(
                f"no space left on {target.parent} ({size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free): "
                "free some, or pass another folder with --output."
            )
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".safetensors")
    except OSError as error:
        raise UserError(f"Output {target} cannot be written ({error.strerror}): pass another folder with --output.") from error
    os.close(handle)
    return Path(name)


def _read(path: Path) -> dict[str, Any]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"File {path} is no complete safetensors file ({error}): run `sd-erase train` again.") from error


def _compare(
    path: Path, written: dict[str, Any], original: dict[str, Any], folder: Path, pooled: bool, dtype: str, digest: str
) -> float:
    """Load `path` back; the largest relative difference of its hidden states from the erased encoder's.

    Raises:
        RuntimeError: the file does not hold what was meant to be written.
    """
    import torch

    loaded = _read(path)
    if loaded.keys() != written.keys() or not all(torch.equal(loaded[key], written[key]) for key in written):
        raise RuntimeError(f"{path} does not hold the tensors that were written: the disk or its driver is at fault.")
    if data_sha256(path) != digest:
        raise RuntimeError(f"{path} does not have the hash of the bytes that were written.")
    reference = {key: original[key] for key in written}
    difference = largest_difference(_hidden_states(folder, reference, pooled), _hidden_states(folder, loaded, pooled))
    if not difference <= TOLERANCE[dtype]:  # also where it is not a number
        raise UserError(f"The encoder changes by {difference:.2g} when rounded to {dtype}: pass --dtype float32.")
    return difference


def largest_difference(expected: list[Any], found: list[Any]) -> float:
    """The largest relative difference of any vector (last dimension) of `found` from the same one of `expected`, in L2."""
    pairs = zip(expected, found, strict=True)
    return max(float(((first - second).norm(dim=-1) / first.norm(dim=-1).clamp_min(1e-12)).max()) for first, second in pairs)


def _hidden_states(folder: Path, tensors: dict[str, Any], pooled: bool) -> list[Any]:
    """All hidden states [prompts, tokens, width] in float32 of an encoder with these tensors, and its pooled projection."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig.from_pretrained(folder)
    model = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(settings).eval()
    own = model.state_dict()
    # this version of transformers may or may not use the prefix in memory
    prefixed = any(key.startswith(PREFIX) for key in own)
    model.load_state_dict({key if prefixed else key.removeprefix(PREFIX): tensor.float() for key, tensor in tensors.items()})
    with torch.inference_mode():
        output = model(input_ids=_prompts(settings), output_hidden_states=True)
    states = [*output.hidden_states, output.last_hidden_state]
    return [*states, output.text_embeds] if pooled else states


def _prompts(settings: Any) -> Any:
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
