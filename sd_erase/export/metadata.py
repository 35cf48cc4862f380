"""Metadata of a safetensors file: what sd-erase writes (ModelSpec 1.0.1 and its own keys) and what it reads back."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_erase.errors import UserError

MODELSPEC_VERSION = "1.0.1"
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
PREFIX = "text_model."
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
# (width, layers) of known text encoders
ENCODERS = {
    (128, 4): "the pocket model's CLIP text encoder",
    (768, 12): "CLIP-L text encoder (Stable Diffusion 1.x, XL)",
    (1024, 23): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1024, 24): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1280, 32): "CLIP-G text encoder (Stable Diffusion XL)",
}


def text_encoder_keys(layers: int, projection: bool = False) -> set[str]:
    """The names of all tensors of a CLIP text encoder with this number of layers."""
    linears = ("mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    modules = [f"encoder.layers.{layer}.{part}" for layer in range(layers) for part in (*linears, "layer_norm1", "layer_norm2")]
    keys = {f"{PREFIX}{module}.{kind}" for module in (*modules, "final_layer_norm") for kind in ("weight", "bias")}
    keys |= {f"{PREFIX}embeddings.{part}_embedding.weight" for part in ("token", "position")}
    return keys | {"text_projection.weight"} if projection else keys


def modelspec(title: str, description: str, family: str, date: str, data_sha256: str) -> dict[str, str]:
    """The ModelSpec fields of a text encoder; `date` in ISO 8601, `data_sha256` of the bytes after the header."""
    return {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{ARCHITECTURES[family]}/text-encoder",
        "modelspec.implementation": "https://github.com/huggingface/transformers",
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.author": "sd-erase",
        "modelspec.date": date,
        "modelspec.hash_sha256": f"0x{data_sha256}",
    }


def data_sha256(path: Path) -> str:
    """SHA-256 of all bytes after the header of a safetensors file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        stream.seek(8 + length)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inspect_file(path: Path) -> dict[str, Any]:
    """What a safetensors file is, from its names and header; a foreign one is recognised too.

    Returns:
        file, kind, tensors, parameters, bytes, dtypes, layers (text encoders), concept, anchor, objective, base, run and
        sd_erase (None in foreign files), hash ("matches", "does not match", "absent"), notes, problems, metadata.

    Raises:
        UserError: no such file, a pickle, or a truncated file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"File {path} does not exist: pass the path of a .safetensors file.")
    if path.suffix in {".ckpt", ".bin", ".pt", ".pth"}:
        raise UserError(f"File {path} is a pickle, which can run code when opened: pass a .safetensors file.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = sorted({part.get_dtype() for part in slices.values()})
    except (SafetensorError, OSError) as error:
        raise UserError(f"File {path} is no complete safetensors file ({error}): export or download it again.") from error

    kind, layers, notes, problems = _recognise(shapes)
    stated = metadata.get("modelspec.hash_sha256")
    intact = stated is not None and stated == f"0x{data_sha256(path)}"
    if stated is not None and not intact:
        problems.append("its numbers do not have the hash that its header states; export or download it again.")
    return {
        "file": str(path),
        "kind": kind,
        "tensors": len(shapes),
        "parameters": sum(_count(shape) for shape in shapes.values()),
        "bytes": path.stat().st_size,
        "dtypes": dtypes,
        "layers": layers,
        **{
            name: metadata.get(f"sd_erase.{name}", metadata.get("sd_erase.version") if name == "sd_erase" else None)
            for name in ("concept", "anchor", "objective", "base", "run", "sd_erase")
        },
        "hash": "absent" if stated is None else "matches" if intact else "does not match",
        "notes": notes,
        "problems": problems,
        "metadata": metadata,
    }


def _count(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _recognise(shapes: dict[str, tuple[int, ...]]) -> tuple[str, int | None, list[str], list[str]]:
    """Kind, layers, notes and problems of a file with tensors of these names."""
    keys = set(shapes)
    if any(key.startswith(("cond_stage_model.", "conditioner.embedders.", "model.diffusion_model.")) for key in keys):
        if any(key.startswith("conditioner.embedders.") for key in keys):
            kind = "checkpoint (Stable Diffusion XL)"
        elif any(key.startswith("cond_stage_model.model.") for key in keys):
            kind = "checkpoint (Stable Diffusion 2.x)"
        elif any(key.startswith("cond_stage_model.") for key in keys):
            kind = "checkpoint (Stable Diffusion 1.x)"
        else:
            kind = "checkpoint without a text encoder"
        return kind, None, [], []
    if any(key.startswith("lora_") or ".lora_A." in key or ".lora_up." in key for key in keys):
        on_text = any(key.startswith("lora_te") or key.startswith("text_encoder") for key in keys)
        return "LoRA" + (" that changes the text encoder" if on_text else " without a text encoder part"), None, [], []
    layers = {int(match[1]) for key in keys if (match := LAYER.match(key))}
    if layers:
        expected = text_encoder_keys(max(layers) + 1, "text_projection.weight" in keys)
        notes = ["holds position_ids, which some programs refuse"] if f"{PREFIX}embeddings.position_ids" in keys else []
        foreign = keys - expected - {f"{PREFIX}embeddings.position_ids", "logit_scale", "visual_projection.weight"}
        if any(key.startswith("vision_model.") for key in keys):
            return "CLIP model with both towers", max(layers) + 1, notes, []
        missing = expected - keys
        problems = [f"{len(missing)} tensors of the encoder are missing, first {min(missing)}."] if missing else []
        problems += [f"{len(foreign)} tensors do not belong to a text encoder, first {min(foreign)}."] if foreign else []
        width = shapes.get(f"{PREFIX}final_layer_norm.weight", (0,))[0]
        return ENCODERS.get((width, max(layers) + 1), f"CLIP text encoder of width {width}"), max(layers) + 1, notes, problems
    if any(key.startswith("encoder.layers.0.") for key in keys) and "final_layer_norm.weight" in keys:
        note = "its names lack the prefix text_model., so ComfyUI would load nothing from it: export it with sd-erase"
        return "CLIP text encoder without the prefix text_model.", None, [note], []
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in keys):
        return "UNet (diffusers)", None, [], []
    if any(key.startswith(("decoder.", "first_stage_model.decoder.")) for key in keys):
        return "autoencoder", None, [], []
    return "unknown", None, [], []
