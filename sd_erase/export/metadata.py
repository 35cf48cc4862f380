"""Metadata of a safetensors file: what sd-erase writes (ModelSpec 1.0.1 and its own keys) and what it reads back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.export import encoders, numbers
from sd_erase.export.integrity import check as integrity_of
from sd_erase.export.numbers import Numbers
from sd_erase.export.statement import lost_statement
from sd_erase.formats import PREFIX, Header
from sd_erase.lora import is_lora
from sd_erase.progress import Progress

# (width, layers) of known text encoders
ENCODERS = {
    (128, 4): "CLIP text encoder of the pocket model's size",
    (768, 12): "CLIP-L text encoder (Stable Diffusion 1.x, XL)",
    (1024, 23): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1024, 24): "CLIP-H text encoder (Stable Diffusion 2.x)",
    (1280, 32): "CLIP-G text encoder (Stable Diffusion XL)",
}
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
# tensors of the denoiser and the autoencoder in full checkpoints
UNET, VAE = "model.diffusion_model.", "first_stage_model."
UNET_TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
VAE_TENSORS = 248
VAE_PARTS = tuple(f"{VAE}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
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


def inspect_file(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """What a safetensors file is and what is wrong with it, from its names, header and numbers; a foreign one is recognised too.

    The numbers are read block by block: memory does not grow with the file.

    Returns:
        file, kind, tensors, parameters, bytes, dtypes, layers (of text encoders), rank (of LoRAs), concept, anchor, objective,
        base, run and sd_erase (None in foreign files), hash ("matches", "does not match", "absent"), notes, problems, metadata.

    Raises:
        UserError: no such file, a pickle, or a truncated file.
    """
    header = formats.read_header(path)
    metadata = header.metadata
    found = numbers.scan(header, progress)
    kind, details, notes, problems = _recognise(header, found)
    integrity = integrity_of(header)
    empty = [] if header.tensors else ["It holds no tensor: export or download it again."]
    problems = [*empty, *numbers.not_finite(found), *problems, *integrity.problems]
    notes += integrity.notes
    notes += lost_statement(metadata, details.get("layers") is not None or "text encoder" in kind.partition(" without ")[0])
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


def _recognise(header: Header, found: dict[str, Numbers]) -> tuple[str, dict[str, Any], list[str], list[str]]:
    """Kind, details, notes and problems of a file."""
    names = set(header.tensors)
    if any(name.startswith(("cond_stage_model.", "conditioner.embedders.", UNET)) for name in names):
        return _checkpoint(header, found)
    if is_lora(names):
        return _lora(header, found)
    if any(name.startswith("transformer.resblocks.") for name in names):
        if any(name.startswith("visual.") for name in names):
            return "CLIP model with both towers in OpenCLIP's layout", {}, *_weights(header, found, lambda name: True)
        return _encoder(header, found, True)
    if any(name.startswith(f"{PREFIX}encoder.layers.") for name in names):
        if any(name.startswith("vision_model.") for name in names):
            details = {"layers": formats.count_layers(_of(names, PREFIX))}
            notes, problems = _weights(header, found, lambda name: not name.endswith(formats.POSITION_IDS))
            return "CLIP model with both towers", details, notes, problems + encoders.position_id_problems(header, PREFIX)
        return _encoder(header, found, False)
    if any(name.startswith("encoder.layers.0.") for name in names) and "final_layer_norm.weight" in names:
        kind, details, notes, problems = _encoder(header, found, False)
        note = "its names lack the prefix text_model., so ComfyUI would load nothing from it: export it with sd-erase"
        return "CLIP text encoder without the prefix text_model.", details, [note, *notes], problems
    return _other(names), {}, *_weights(header, found, lambda name: not name.endswith(("_ids", "num_batches_tracked")))


def _other(names: Iterable[str]) -> str:
    """The kind of a file without a text encoder of CLIP's."""
    if any(name.startswith(("down_blocks.", "up_blocks.")) for name in names):
        return "UNet (diffusers)"
    if any(name.startswith(("decoder.", "first_stage_model.decoder.")) for name in names):
        return "autoencoder"
    if any(re.search(r"(^|\.)(encoder\.block|shared)\.", name) for name in names):
        return "T5 text encoder"
    if any(re.search(r"(^|\.)(double_blocks|joint_blocks|transformer_blocks)\.", name) for name in names):
        return "diffusion transformer (FLUX.1, Stable Diffusion 3)"
    return "unknown"


def _of(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _weights(header: Header, found: dict[str, Numbers], which: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Notes and problems about a component's weights: quantised, or all zero."""
    matrices = [name for name in header.tensors if which(name) and len(header.shape(name)) > 1]
    notes, problems = numbers.quantised(header, matrices)
    return notes, problems + numbers.all_zero(found, matrices)


def _checkpoint(header: Header, found: dict[str, Numbers]) -> tuple[str, dict[str, Any], list[str], list[str]]:
    family = formats.checkpoint_family(header.tensors)
    notes, problems = _weights(header, found, lambda name: name.startswith((UNET, *VAE_PARTS)))
    if family is None:
        has_encoder = any(name.startswith(("cond_stage_model.", "conditioner.embedders.")) for name in header.tensors)
        return f"checkpoint {'of another kind' if has_encoder else 'without a text encoder'}", {}, notes, problems
    kind, layers = f"checkpoint ({FAMILIES[family]})", []
    for place in formats.PLACES[family]:
        own = encoders.examine(header, found, place.prefix, place.open_clip, place.encoder == "text_encoder_2")
        layers.append(own.layers)
        problems += own.problems
        notes += own.notes
        notes += [f"{len(own.foreign)} tensors do not belong to its text encoder, first {own.foreign[0]}"] if own.foreign else []
    return kind, {"layers": layers[0] if len(layers) == 1 else layers}, notes + _parts(header, family), problems


def _parts(header: Header, family: str) -> list[str]:
    """Notes about what a checkpoint holds beside its text encoders."""
    notes = []
    unet, vae = _of(header.tensors, UNET), [name for name in header.tensors if name.startswith(VAE_PARTS)]
    first = f"{UNET}input_blocks.0.0.weight"
    is_full = first in header.tensors and header.shape(first)[:1] == (320,)
    if not unet:
        notes.append("it holds no UNet")
    elif is_full and len(unet) != UNET_TENSORS[family]:
        notes.append(
            f"its UNet has {len(unet)} tensors, that of {FAMILIES[family]} {UNET_TENSORS[family]}: it is distilled, changed or incomplete"
        )
    if not _of(header.tensors, VAE):
        notes.append("it holds no autoencoder")
    elif is_full and len(vae) < VAE_TENSORS:
        notes.append(f"its autoencoder has {len(vae)} tensors of {VAE_TENSORS}: it is incomplete")
    return notes


def _encoder(header: Header, found: dict[str, Numbers], open_clip: bool) -> tuple[str, dict[str, Any], list[str], list[str]]:
    projections = header.tensors.keys() & {"text_projection", "text_projection.weight"}
    own = encoders.examine(header, found, "", open_clip, bool(projections))
    notes, problems = own.notes, own.problems
    if own.foreign:
        problems.append(f"{len(own.foreign)} tensors do not belong to a text encoder, first {own.foreign[0]}.")
    if any(name.endswith(formats.POSITION_IDS) for name in header.tensors):
        notes.append("holds position_ids, which some programs refuse")
    if (own.width, own.layers) == (1280, 32) and not projections:
        notes.append("lacks text_projection, which SDXL's pooled output needs")
    kind = ENCODERS.get((own.width, own.layers), f"CLIP text encoder of width {own.width}")
    return kind + (" in OpenCLIP's layout" if open_clip else ""), {"layers": own.layers}, notes, problems


def _lora(header: Header, found: dict[str, Numbers]) -> tuple[str, dict[str, Any], list[str], list[str]]:
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
    problems += lora_shapes(header)
    problems += _without_effect(header, found)
    more, faults = numbers.quantised(header, [name for name in header.tensors if len(header.shape(name)) > 1])
    notes, problems = notes + more, problems + faults
    scalars = [
        name for name in _ending(header, ".alpha") if found[name].size == 1 and header.tensors[name]["dtype"] in numbers.PLAIN
    ]
    alphas = {float(value) for value in formats.read_tensors(header.path, scalars).values()}
    if len(alphas) > 1:
        notes.append("its alphas differ from layer to layer, which diffusers mis-scales")
    if any(re.match(r"lora_te_(encoder|embeddings)_", name) for name in on_text):
        problems.append("its names lack text_model_, so no program applies them to the text encoder.")
    return kind, {"rank": max(ranks) if ranks else None}, notes, problems


def lora_shapes(header: Header) -> list[str]:
    """Pairs of a LoRA whose ranks differ, and alphas that are no single number."""
    wrong = [f"{name} {list(header.shape(name))}" for name in _ending(header, ".alpha") if math.prod(header.shape(name)) != 1]
    for up, down in LORA_PAIRS:
        for name in _ending(header, f".{up}"):
            other = name.removesuffix(up) + down
            if other not in header.tensors:
                continue
            outer, inner = header.shape(name), header.shape(other)
            if min(len(outer), len(inner)) < 2 or outer[1] != inner[0]:
                wrong.append(f"{name} {list(outer)} on {list(inner)}")
    return [f"{len(wrong)} of its tensors have a wrong shape, first {wrong[0]}."] if wrong else []


def _without_effect(header: Header, found: dict[str, Numbers]) -> list[str]:
    """Whether every change in the file is zero."""
    parts = (*(up for up, _ in LORA_PAIRS), "diff", "diff_b")
    changes = [name for name in header.tensors if name.endswith(tuple(f".{part}" for part in parts)) and found[name].size]
    if changes and all(found[name].is_zero for name in changes):
        return [f"all {len(changes)} changes in it are zero: it does nothing."]
    return []


def _ending(header: Header, suffix: str) -> list[str]:
    return [name for name in header.tensors if name.endswith(suffix)]
