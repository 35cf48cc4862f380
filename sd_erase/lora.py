"""A LoRA of text encoders (or its exact form, ``.diff``) in the names of kohya, diffusers, peft and ComfyUI, added to the weights.

Every tensor of the file has to be used: a part that is left out would be a model that nobody trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.errors import UserError

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:up|down)\.weight|lora_[AB](?:\.\w+)?\.weight|lora\.(?:up|down)\.weight"
    r"|lora_linear_layer\.(?:up|down)\.weight|alpha|diff|diff_b)"
)
# what other kinds of files hold, and what they are
KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?)$", "a DoRA, which rescales every weight that it changes"),
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.(oft_|boft_)", "an OFT"),
    (r"\.lora_mid\.", "a LoRA in Tucker's form"),
    (r"\.(w_norm|b_norm)$|_norm\d?\.(diff|diff_b)$", "one that changes norms"),
    (r"^bundle_emb\.", "one with embeddings of its own"),
)
DENOISER = re.compile(r"(lora|lycoris)_(unet|transformer|prior)_|(unet|transformer|diffusion_model|model\.diffusion_model)\.")
# ComfyUI's name of each encoder; SD 2.x's only one is clip_h, and an SDXL without CLIP-L has clip_g
_COMFYUI = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's, and not those of a model that was saved with one attached."""
    names = list(names)
    marks = re.compile(r"^(lora|lycoris)_|\.diff$|(^|\.)lora_(A|B|up|down)\.|\.lora(_linear_layer)?\.(up|down)\.|\.(hada|lokr)_")
    return any(marks.search(name) for name in names) and not any(".base_layer." in name for name in names)


@dataclass
class _Module:
    """What a file holds for one linear layer."""

    up: str = ""
    down: str = ""
    others: dict[str, str] = field(default_factory=dict)  # "alpha", "diff", "diff_b" -> the tensor's name


def add_lora(states: Mapping[str, dict[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """The encoders' states with a LoRA (or its exact form, ``.diff``) added to their linear weights, in float32.

    Args:
        states: the original encoders by component, with prefixed names.

    Raises:
        UserError: the file is damaged, changes no text encoder, or holds anything that cannot be added to them.
    """
    header = formats.read_header(path)
    found, unknown = _sorted(states, header)
    unknown = _that_change(header, unknown)
    if unknown or not found:
        raise _refusal(path, header, unknown)
    changed = {component: dict(state) for component, state in states.items()}
    for (component, module), parts in found.items():
        state = changed[component]
        names = [name for name in (parts.up, parts.down, *parts.others.values()) if name]
        tensors = {name: value.float() for name, value in formats.read_tensors(path, names).items()}
        for kind, exact in (("weight", "diff"), ("bias", "diff_b")):
            if exact in parts.others:
                _add(state, f"{module}.{kind}", tensors[parts.others[exact]], path, parts.others[exact])
        if parts.up:
            down = tensors[parts.down]
            alpha = float(tensors[parts.others["alpha"]]) if "alpha" in parts.others else _stated_alpha(header, component, parts)
            # in peft's order, so that the sum has the very bits of a merged adapter
            change = (tensors[parts.up] @ down) * ((down.shape[0] if alpha is None else alpha) / down.shape[0])
            _add(state, f"{module}.weight", change, path, parts.up)
    return changed


def _add(state: dict[str, Any], key: str, change: Any, path: Path, name: str) -> None:
    if key not in state or state[key].shape != change.shape:
        own = tuple(state[key].shape) if key in state else "none"
        raise UserError(
            f"LoRA {path} does not fit the text encoder: {name} changes {tuple(change.shape)} numbers of {own}: pass its base."
        )
    state[key] = state[key].float() + change


def _stems(states: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """What a file may call each module -> component and module."""
    lone = len(states) == 1 and "text_encoder_2" not in states
    stems: dict[str, tuple[str, str]] = {}
    for component, state in states.items():
        kohya = "lora_te_" if lone else "lora_te1_" if component == "text_encoder" else "lora_te2_"
        for module in {key.rpartition(".")[0] for key in state}:
            bare = module.removeprefix(formats.PREFIX)  # what transformers 5.6 calls it
            names = [kohya + module.replace(".", "_"), f"{component}.{module}", f"{component}.{bare}"]
            names += [f"text_encoders.{name}.transformer.{module}" for name in _COMFYUI[component]]
            if lone:  # an adapter that peft saved from the encoder itself
                names += [f"base_model.model.{module}", f"base_model.model.{bare}"]
            stems |= dict.fromkeys(names, (component, module))
    return stems


def _sorted(states: Mapping[str, dict[str, Any]], header: formats.Header) -> tuple[dict[tuple[str, str], _Module], list[str]]:
    """What the file holds for each module, and the tensors that belong to none or lack their other half."""
    stems = _stems(states)
    found: dict[tuple[str, str], _Module] = {}
    unknown = []
    for name in header.tensors:
        match = _PART.fullmatch(name)
        if match is None or match["module"] not in stems:
            unknown.append(name)
            continue
        module, part = found.setdefault(stems[match["module"]], _Module()), match["part"]
        if part in ("alpha", "diff", "diff_b"):
            module.others[part] = name
        elif "up" in part or "lora_B" in part:
            module.up = name
        else:
            module.down = name
    for parts in found.values():
        if bool(parts.up) != bool(parts.down):
            unknown.append(parts.up or parts.down)
        elif not parts.up and "alpha" in parts.others:
            unknown.append(parts.others["alpha"])
    return found, unknown


def _that_change(header: formats.Header, names: list[str]) -> list[str]:
    """Those of `names` that are no part of a change by zero, as ComfyUI's LoraSave writes of every layer that stayed as it was."""
    changes = [name for name in names if name.endswith((".lora_up.weight", ".diff", ".diff_b"))]
    tensors = formats.read_tensors(header.path, changes)
    same = {name.removesuffix(".weight").rpartition(".")[0] for name in changes if not tensors[name].any()}
    same -= {name.removesuffix(".weight").rpartition(".")[0] for name in changes if tensors[name].any()}
    return [name for name in names if name.removesuffix(".weight").rpartition(".")[0] not in same]


def _refusal(path: Path, header: formats.Header, unknown: list[str]) -> UserError:
    """Why a file's tensors cannot all be added to the text encoders."""
    for pattern, what in KINDS:
        if any(re.search(pattern, name) for name in unknown):
            first = next(name for name in unknown if re.search(pattern, name))
            return UserError(
                f"File {path} is {what} ({first}), which is not read: merge it where it was made, and pass the merged model."
            )
    denoiser = [name for name in unknown if DENOISER.match(name)]
    if denoiser and len(denoiser) == len(header.tensors):
        return UserError(
            f"File {path} does not fit the text encoder: it is a LoRA of the denoiser alone, it changes none of its layers; pass an export of sd-erase."
        )
    if denoiser:
        return UserError(
            f"File {path} is a LoRA that changes the denoiser too ({len(denoiser)} tensors, first {denoiser[0]}), which would be lost "
            "here: load it with the pipeline's own load_lora_weights()."
        )
    return UserError(
        f"File {path} does not fit the text encoder: "
        + (
            f"{len(unknown)} of its tensors belong to none of its layers, first {min(unknown)}"
            if unknown
            else "it changes none of its layers"
        )
        + ": pass a LoRA of this very base, in the names of kohya, diffusers, peft or ComfyUI."
    )


def _stated_alpha(header: formats.Header, component: str, parts: _Module) -> float | None:
    """The alpha that peft's settings state for a module without one of its own; None where nothing is stated.

    Raises:
        UserError: the settings are missing where nothing else scales the change, or ask for what is not read.
    """
    if parts.up.startswith("base_model."):
        path = header.path.with_name("adapter_config.json")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"File {header.path} is a LoRA of peft, whose scale stands in {path.name} beside it, which cannot be read "
                f"({type(error).__name__}): pass the file in its folder."
            ) from error
    else:
        try:
            every = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
            settings = {
                key.removeprefix(f"{component}."): value for key, value in every.items() if key.startswith(f"{component}.")
            }
        except (ValueError, AttributeError) as error:
            raise UserError(f"File {header.path} has an unreadable lora_adapter_metadata ({error}): save it again.") from error
    refused = [
        name for name in ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "modules_to_save") if settings.get(name)
    ]
    if refused:
        raise UserError(
            f"File {header.path} is a LoRA with {refused[0]}, which is not read: merge it, and pass the merged model."
        )
    alpha = settings.get("lora_alpha")
    return None if alpha is None else float(alpha)
