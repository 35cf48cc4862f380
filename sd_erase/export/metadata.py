"""Metadata of a safetensors file: what sd-erase writes (ModelSpec 1.0.1 and its own keys) and what it reads back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.export.checkpoint import position_id_problems
from sd_erase.export.integrity import check as integrity_of
from sd_erase.formats import PREFIX, Header, text_encoder_keys
from sd_erase.lora import is_lora

# (width, layers) of known text encoders
ENCODERS = {
    (128, 4): "the pocket model's CLIP text encoder",
    (768, 12): "CLIP-L text encoder (Stable Diffusion 1.x, XL)",
    (1024, 23): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1024, 24): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1280, 32): "CLIP-G text encoder (Stable Diffusion XL)",
}
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
# tensors that a text encoder's file may hold beside the encoder
COMPANIONS = {"logit_scale", "visual_projection.weight", "text_projection.weight", "text_projection", "attn_mask"}
LORA_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:up|down|mid)\.weight|lora_[AB](?:\.\w+)?\.weight|lora\.(?:up|down)\.weight"
    r"|lora_linear_layer\.(?:up|down)\.weight|alpha|diff|diff_b|dora_scale|hada_\w+|lokr_\w+)"
)
LORA_PAIRS = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
)


def inspect_file(path: Path) -> dict[str, Any]:
    """What a safetensors file is, from its names and header; a foreign one is recognised too.

    Returns:
        file, kind, tensors, parameters, bytes, dtypes, layers (of text encoders), rank (of LoRAs), concept, anchor, objective,
        base, run and sd_erase (None in foreign files), hash ("matches", "does not match", "absent"), notes, problems, metadata.

    Raises:
        UserError: no such file, a pickle, or a truncated file.
    """
    header = formats.read_header(path)
    metadata = header.metadata
    kind, details, notes, problems = _recognise(header)
    integrity = integrity_of(header)
    problems += integrity.problems
    notes += integrity.notes
    return {
        "file": str(path),
        "kind": kind,
        "tensors": len(header.tensors),
        "parameters": sum(math.prod(header.shape(name)) for name in header.tensors),
        "bytes": path.stat().st_size,
        "dtypes": sorted({entry["dtype"] for entry in header.tensors.values()}),
        "layers": None,
        "rank": None,
        **details,
        **{
            name: metadata.get(f"sd_erase.{name}", metadata.get("sd_erase.version") if name == "sd_erase" else None)
            for name in ("concept", "anchor", "objective", "base", "run", "sd_erase")
        },
        "hash": integrity.state,
        "notes": notes,
        "problems": problems,
        "metadata": metadata,
    }


def _recognise(header: Header) -> tuple[str, dict[str, Any], list[str], list[str]]:
    """Kind, details, notes and problems of a file."""
    names = set(header.tensors)
    is_checkpoint = any(
        name.startswith(("cond_stage_model.", "conditioner.embedders.", "model.diffusion_model.")) for name in names
    )
    if is_checkpoint:
        return _checkpoint(header)
    if is_lora(names):
        return _lora(header)
    if any(name.startswith("transformer.resblocks.") for name in names):
        if any(name.startswith("visual.") for name in names):
            return "CLIP model with both towers in OpenCLIP's layout", {}, [], []
        return _encoder(header, "", True, ["ln_final.weight"])
    if any(name.startswith(f"{PREFIX}encoder.layers.") for name in names):
        if any(name.startswith("vision_model.") for name in names):
            return "CLIP model with both towers", {"layers": formats.count_layers(_of(names, PREFIX))}, [], []
        return _encoder(header, "", False, [f"{PREFIX}final_layer_norm.weight"])
    if any(name.startswith("encoder.layers.0.") for name in names) and "final_layer_norm.weight" in names:
        note = "its names lack the prefix text_model., so ComfyUI would load nothing from it: export it with sd-erase"
        return "CLIP text encoder without the prefix text_model.", {"layers": formats.count_layers(names)}, [note], []
    if any(name.startswith(("down_blocks.", "up_blocks.")) for name in names):
        return "UNet (diffusers)", {}, [], []
    if any(name.startswith(("decoder.", "first_stage_model.decoder.")) for name in names):
        return "autoencoder", {}, [], []
    if any(re.search(r"(^|\.)(encoder\.block|shared)\.", name) for name in names):
        return "T5 text encoder", {}, [], []
    if any(re.search(r"(^|\.)(double_blocks|joint_blocks|transformer_blocks)\.", name) for name in names):
        return "diffusion transformer (FLUX.1, Stable Diffusion 3)", {}, [], []
    return "unknown", {}, [], []


def _of(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _missing(header: Header, prefix: str, open_clip: bool, projection: bool) -> tuple[int, list[str], list[str]]:
    """Layers, and the tensors that an encoder in a file lacks and those that do not belong to it."""
    own = _of(header.tensors, prefix)
    layers = formats.count_layers(own)
    expected = formats.stored_names(text_encoder_keys(layers, projection), own, prefix, open_clip)
    companions = {prefix + name for name in COMPANIONS}
    foreign = [
        name for name in own if name not in expected and name not in companions and not name.endswith(formats.POSITION_IDS)
    ]
    return layers, sorted(expected.keys() - header.tensors.keys()), sorted(foreign)


def _key_problems(missing: list[str], foreign: list[str]) -> list[str]:
    problems = [f"{len(missing)} tensors of the encoder are missing, first {missing[0]}."] if missing else []
    return problems + ([f"{len(foreign)} tensors do not belong to a text encoder, first {foreign[0]}."] if foreign else [])


def _checkpoint(header: Header) -> tuple[str, dict[str, Any], list[str], list[str]]:
    family = formats.checkpoint_family(header.tensors)
    if family is None:
        has_encoder = any(name.startswith(("cond_stage_model.", "conditioner.embedders.")) for name in header.tensors)
        return f"checkpoint {'of another kind' if has_encoder else 'without a text encoder'}", {}, [], []
    kind, notes, problems, layers = f"checkpoint ({FAMILIES[family]})", [], [], []
    for place in formats.PLACES[family]:
        count, missing, foreign = _missing(header, place.prefix, place.open_clip, place.encoder == "text_encoder_2")
        layers.append(count)
        problems += _key_problems(missing, [])
        notes += [f"{len(foreign)} tensors do not belong to its text encoder, first {foreign[0]}"] if foreign else []
        notes += position_id_problems(header, place.prefix)
    if not _of(header.tensors, "model.diffusion_model."):
        notes.append("it holds no UNet")
    if not _of(header.tensors, "first_stage_model."):
        notes.append("it holds no autoencoder")
    return kind, {"layers": layers[0] if len(layers) == 1 else layers}, notes, problems


def _encoder(header: Header, prefix: str, open_clip: bool, norms: list[str]) -> tuple[str, dict[str, Any], list[str], list[str]]:
    names = set(header.tensors)
    layers, missing, foreign = _missing(header, prefix, open_clip, bool(names & {"text_projection", "text_projection.weight"}))
    notes = ["holds position_ids, which some programs refuse"] if any(n.endswith(formats.POSITION_IDS) for n in names) else []
    width = header.shape(norms[0])[0] if norms[0] in names else 0
    if (width, layers) == (1280, 32) and not names & {"text_projection", "text_projection.weight"}:
        notes.append("lacks text_projection, which SDXL's pooled output needs")
    kind = ENCODERS.get((width, layers), f"CLIP text encoder of width {width}") + (" in OpenCLIP's layout" if open_clip else "")
    return kind, {"layers": layers}, notes, _key_problems(missing, foreign)


def _lora(header: Header) -> tuple[str, dict[str, Any], list[str], list[str]]:
    modules: dict[str, set[str]] = {}
    for name in header.tensors:
        if match := LORA_PART.fullmatch(name):
            modules.setdefault(match["module"], set()).add(re.sub(r"(lora_[AB])\.\w+\.weight", r"\1.weight", match["part"]))
    on_text = [name for name in modules if name.startswith(("lora_te", "text_encoder"))]
    layout = "kohya's" if any(name.startswith("lora_") for name in modules) else "diffusers'"
    exact = any(parts & {"diff"} for parts in modules.values())
    kind = f"{'Exact change of weights (.diff)' if exact else 'LoRA'}" + (
        " that changes the text encoder" if on_text else " without a text encoder part"
    )
    notes = [f"{len(modules)} modules in {layout} naming, {len(on_text)} of them of a text encoder"]
    problems, ranks = [], Counter[int]()
    for module, parts in modules.items():
        for up, down in LORA_PAIRS:
            if (up in parts) != (down in parts):
                problems.append(f"{module} has {up if up in parts else down} without its other half.")
        if parts <= {"alpha", "diff_b"}:
            problems.append(f"{module} has {' and '.join(sorted(parts))} alone, for which A1111 rejects the whole file.")
    for name in header.tensors:
        if name.endswith(("lora_down.weight", "lora_A.weight", "lora.down.weight")) and header.shape(name):
            ranks[header.shape(name)[0]] += 1
    alphas = {
        float(value) for value in formats.read_tensors(header.path, _ending(header, ".alpha")).values() if value.numel() == 1
    }
    if len(alphas) > 1:
        notes.append("its alphas differ from layer to layer, which diffusers mis-scales")
    if any(re.match(r"lora_te_(encoder|embeddings)_", name) for name in on_text):
        problems.append("its names lack text_model_, so no program applies them to the text encoder.")
    return kind, {"rank": max(ranks) if ranks else None}, notes, problems


def _ending(header: Header, suffix: str) -> list[str]:
    return [name for name in header.tensors if name.endswith(suffix)]
