"""A text encoder in somebody's pipeline, as they use it: with LoRAs attached, with tokens of its own, quantised, offloaded.

An erased encoder's tensors go into a copy of it by the names that it had before all that. What cannot take them is refused in one
sentence, because weights that are quantised, fused or elsewhere would leave the original in place without a word.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.errors import UserError
from sd_erase.mismatch import Reshaped, is_extra, mismatch

ROWS = f"{formats.PREFIX}embeddings.token_embedding.weight"
PROJECTION = "text_projection.weight"
# what peft puts into a layer beside the layer itself
ADAPTER = re.compile(r"\.(lora_|base_layer\.lora_|ia3_|hada_|lokr_|oft_|vera_|modules_to_save\.|_?adapter)")


def copied(part: Any) -> Any:
    """A copy of a tokenizer or a scheduler.

    transformers replaces the `decode` of CLIP's fast tokenizer when it is made, to end words with spaces; a copy lacks that.
    """
    result = copy.deepcopy(part)
    mend = getattr(result, "_wrap_decode_method_backend_tokenizer", None)
    if mend is not None:
        mend()
    return result


def unwrapped(encoder: Any) -> Any:
    """The encoder inside torch.compile's or DataParallel's wrapper."""
    inner = getattr(encoder, "_orig_mod", None)  # torch.compile
    if inner is None and type(encoder).__name__ in {"DataParallel", "DistributedDataParallel"}:
        inner = encoder.module
    return encoder if inner is None else inner


def own_names(encoder: Any) -> dict[str, str]:
    """The encoder's tensors under a text encoder's plain, prefixed names -> their names in its state dict.

    Raises:
        UserError: it has tensors that belong neither to a text encoder nor to an adapter.
    """
    stored = list(encoder.state_dict())
    plain = {name: _plain(name) for name in stored}
    keys = formats.text_encoder_keys(formats.count_layers(stored), projection=True)
    foreign = [name for name in stored if plain[name] not in keys and not ADAPTER.search(name) and not is_extra(name)]
    if foreign:
        raise mismatch("text encoder", "the pipeline", unknown=foreign)
    return {plain[name]: name for name in stored if plain[name] in keys and not ADAPTER.search(name)}


def _plain(name: str) -> str:
    bare = name.removeprefix(formats.PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    return bare if bare == PROJECTION else formats.PREFIX + bare


def own_state(encoder: Any) -> dict[str, Any]:
    """The encoder's own tensors with plain names, without those of its adapters."""
    state = encoder.state_dict()
    return {plain: state[name].detach().cpu().contiguous() for plain, name in own_names(encoder).items()}


def check_host(encoder: Any, component: str) -> None:
    """Whether the encoder can take other weights as it is.

    Raises:
        UserError: it is offloaded or quantised, or a LoRA is fused into it.
    """
    if any(hasattr(module, hook) for module in encoder.modules() for hook in ("_hf_hook", "_diffusers_hook")) or any(
        parameter.is_meta for parameter in encoder.parameters()
    ):
        raise UserError(
            f"The {component} of this pipeline is offloaded (enable_model_cpu_offload, enable_sequential_cpu_offload, group "
            "offloading or a device_map): call load_erased on the pipeline before that, and offload what it returns."
        )
    if kind := _quantisation(encoder):
        raise UserError(
            f"The {component} of this pipeline is quantised ({kind}), and rounded weights cannot take an exact change: call "
            "load_erased on the pipeline before it is quantised and quantise what it returns, or load the folder of "
            "`sd-erase export --to diffusers` with your quantisation settings."
        )
    if any(getattr(module, "merged_adapters", None) for module in encoder.modules()):
        raise UserError(
            f"A LoRA is fused into the {component} of this pipeline: call unfuse_lora(), then load_erased, and fuse it into the "
            "result again."
        )


def _quantisation(encoder: Any) -> str:
    """How the encoder's weights are quantised, by transformers' own quantisers or from outside; "" where they are not."""
    import torch

    settings = getattr(getattr(encoder, "config", None), "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method", "") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
        return str(getattr(method, "value", method) or "quantization_config")
    for name, module in encoder.named_modules():
        weight = module._parameters.get("weight")  # a layer that holds it in another way is found by its name
        if name.endswith(tuple(formats.LINEARS)) and type(module) is not torch.nn.Linear and not hasattr(module, "base_layer"):
            return f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
        if weight is not None and type(weight) is not torch.nn.Parameter:
            return type(weight).__name__
        if weight is not None and (not weight.is_floating_point() or weight.itemsize < 2):
            return str(weight.dtype).removeprefix("torch.")
    return ""


def with_weights(encoder: Any, state: Mapping[str, Any], source: Path) -> Any:
    """A copy of the encoder whose own tensors are those of `state`; its adapters and its added token rows stay.

    Args:
        state: an erased encoder's tensors, with prefixed names.
        source: where they come from, for the error.

    Raises:
        UserError: they do not fit.
    """
    names, own = own_names(encoder), encoder.state_dict()
    tensors = {key: value for key, value in state.items() if key in names or not _is_spare(key, names)}
    tensors = _with_projection(tensors, {plain: own[name] for plain, name in names.items()})
    if ROWS in tensors and ROWS in names:
        tensors[ROWS] = _with_rows(tensors[ROWS], own[names[ROWS]], source)
    missing, unknown = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    shapes = [
        Reshaped(key, tuple(value.shape), tuple(own[names[key]].shape))
        for key, value in tensors.items()
        if key in names and value.shape != own[names[key]].shape
    ]
    if missing or unknown or shapes:
        raise mismatch("text encoder", source, missing, unknown, shapes)
    changed = copy.deepcopy(encoder)
    changed.load_state_dict({**own, **{names[key]: value for key, value in tensors.items()}}, strict=True)
    return changed


def _is_spare(key: str, names: Mapping[str, str]) -> bool:
    """What files hold beyond an encoder: SD 2.x checkpoints a last block that is not read, CLIPSave a projection."""
    return is_extra(key) or f".layers.{formats.count_layers(names)}." in key


def _with_projection(tensors: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A CLIP-L file has no projection, or the identity that ComfyUI puts in its place: the pipeline's own is kept then."""
    import torch

    if PROJECTION not in own:
        return tensors
    given = tensors.get(PROJECTION)
    is_filler = given is not None and given.shape[0] == given.shape[1] and torch.equal(given.float(), torch.eye(len(given)))
    return {**tensors, PROJECTION: own[PROJECTION]} if given is None or is_filler else tensors


def _with_rows(rows: Any, own: Any, source: Path) -> Any:
    """The token embedding, followed by the rows of tokens that the pipeline has more (textual inversion)."""
    import torch

    if len(rows) > len(own):
        raise UserError(
            f"{source} has {len(rows)} token embeddings, {len(rows) - len(own)} more than this pipeline, whose tokenizer does not "
            "know those tokens: pass a pipeline of the base that it was erased from."
        )
    return torch.cat([rows.to(own), own[len(rows) :]]) if len(rows) < len(own) else rows
