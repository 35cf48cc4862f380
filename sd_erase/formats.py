"""The names of a text encoder's tensors in the files of Stable Diffusion's programs, and how such files are read and written.

Inside sd-erase an encoder's state has Hugging Face's names with the prefix ``text_model.``, which transformers 5.6 and later
drop and without which ComfyUI, A1111 and transformers 4 load nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sd_erase.errors import UserError
from sd_erase.headers import PICKLES as PICKLES
from sd_erase.headers import Header as Header
from sd_erase.headers import pickle_error as pickle_error
from sd_erase.headers import read_header as read_header
from sd_erase.mismatch import is_extra, mismatch

PREFIX = "text_model."
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
POSITION_IDS = "embeddings.position_ids"
HASH = "modelspec.hash_sha256"  # of all bytes behind the header: changes with the order of the tensors
CONTENT = "sd_erase.content_sha256"  # of every tensor, whatever their order: see `content_sha256`
ENCODER_CONTENT = "sd_erase.encoder_sha256"  # the same of a checkpoint's text encoders alone
UNREADABLE = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}  # types of safetensors that no number of torch has
LAYER = re.compile(r"(?:layers|resblocks)\.(\d{1,9})\.")
MAX_LAYERS = 1000  # a name may claim any number


class Place(NamedTuple):
    """Where one text encoder stands in a full checkpoint, and what kohya's LoRA files call it."""

    encoder: str
    prefix: str
    open_clip: bool  # OpenCLIP's layout instead of Hugging Face's
    lora: str


PLACES: dict[str, tuple[Place, ...]] = {
    "sd1": (Place("text_encoder", "cond_stage_model.transformer.", False, "lora_te_"),),
    "sd2": (Place("text_encoder", "cond_stage_model.model.", True, "lora_te_"),),
    "sdxl": (
        Place("text_encoder", "conditioner.embedders.0.transformer.", False, "lora_te1_"),
        Place("text_encoder_2", "conditioner.embedders.1.model.", True, "lora_te2_"),
    ),
}


def text_encoder_keys(layers: int, projection: bool = False) -> set[str]:
    """The names of all tensors of a CLIP text encoder with this number of layers."""
    modules = [f"encoder.layers.{layer}.{part}" for layer in range(layers) for part in (*LINEARS, "layer_norm1", "layer_norm2")]
    keys = {f"{PREFIX}{module}.{kind}" for module in (*modules, "final_layer_norm") for kind in ("weight", "bias")}
    keys |= {f"{PREFIX}embeddings.{part}_embedding.weight" for part in ("token", "position")}
    return keys | {"text_projection.weight"} if projection else keys


def prefixed(state: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's state dict with ``text_model.`` before every key but the projection's, without ``position_ids``."""
    return {
        key if key.startswith((PREFIX, "text_projection")) else PREFIX + key: value.detach().cpu().contiguous()
        for key, value in state.items()
        if not key.endswith("position_ids")
    }


def linear_modules(layers: int) -> list[str]:
    """The names of the attention's and MLP's linear layers, in order."""
    return [f"{PREFIX}encoder.layers.{layer}.{part}" for layer in range(layers) for part in LINEARS]


def count_layers(names: Iterable[str]) -> int:
    """The number of layers that tensors of these names make up; 0 where there is none, at most `MAX_LAYERS`."""
    numbers = (int(match[1]) for name in names if (match := LAYER.search(name)))
    return 1 + max((min(number, MAX_LAYERS - 1) for number in numbers), default=-1)


def lora_name(module: str, place: Place) -> str:
    """kohya's name of a linear layer."""
    return place.lora + module.replace(".", "_")


# --- OpenCLIP's layout ------------------------------------------------------------------------------------------------------

_OPEN_CLIP = (
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


def _open_clip_name(key: str) -> str:
    if key == "text_projection.weight":
        return "text_projection"
    name = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", key.removeprefix(PREFIX))
    for ours, theirs in _OPEN_CLIP:
        name = name.replace(ours, theirs)
    return name


def stored_names(keys: Iterable[str], names: Iterable[str], prefix: str, open_clip: bool) -> dict[str, tuple[str, ...]]:
    """Which tensor of a file holds each of an encoder's.

    Args:
        keys: the encoder's names.
        names: the file's names.
        prefix: what stands before the encoder's names in the file.
        open_clip: whether the file has OpenCLIP's layout.

    Returns:
        The file's name -> the encoder's; three (query, key, value) where the file keeps them as one. A name that the file
        lacks is among them.
    """
    present = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys, key=lambda key: key.replace("q_proj", "a_proj")):  # query, key, value, as OpenCLIP joins them
        name = prefix + (_open_clip_name(key) if open_clip else key)
        bare = prefix + key.removeprefix(PREFIX)
        if not open_clip and name not in present and bare in present:  # old merges and transformers 5.6
            name = bare
        found[name] = (*found.get(name, ()), key)
    return found


def joined(name: str, parts: list[Any]) -> Any:
    """The tensor that a file keeps under `name`, from the encoder's own."""
    import torch

    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensor.T if name.endswith("text_projection") else tensor


def parted(name: str, keys: tuple[str, ...], tensor: Any) -> dict[str, Any]:
    """The encoder's own tensors, from the one that a file keeps under `name`."""
    if name.endswith("text_projection"):
        tensor = tensor.T
    return dict(zip(keys, tensor.chunk(len(keys)), strict=True))


# --- reading ----------------------------------------------------------------------------------------------------------------


def checkpoint_family(names: Iterable[str]) -> str | None:
    """The family ("sd1", "sd2", "sdxl") of a full checkpoint with these names; None where it has no encoder of theirs."""
    names = list(names)
    # the last place tells: SDXL's first encoder has the layout of SD 1.x, and the refiner has no second one
    for family, places in PLACES.items():
        if any(name.startswith(places[-1].prefix) for name in names):
            return family
    return None


def encoder_names(names: Iterable[str]) -> list[str]:
    """The tensors of a full checkpoint that its text encoders are; none where it is no checkpoint."""
    names = list(names)
    family = checkpoint_family(names)
    prefixes = tuple(place.prefix for place in PLACES[family]) if family else ()
    return [name for name in names if prefixes and name.startswith(prefixes)]


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0  # `read_header` says it
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _types(path: Path, size: int, changed: int) -> dict[str, str]:
    """The type of each tensor of a file, checked once for a file that is read tensor by tensor."""
    return {name: entry["dtype"] for name, entry in read_header(path).tensors.items()}


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Tensors of a file, mapped into memory rather than read.

    Args:
        names: which; None gives all.

    Raises:
        UserError: the file is damaged, or torch has no such type of numbers.
    """
    from safetensors import SafetensorError, safe_open

    types = _types(path, *_state(path))
    wanted = list(types if names is None else names)
    unreadable = [name for name in wanted if types[name] in UNREADABLE]
    if unreadable:
        raise UserError(
            f"File {path} has numbers of the type {types[unreadable[0]]} ({unreadable[0]}), which is quantised and cannot be computed "
            "with: pass a file of float16, bfloat16 or float32."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise UserError(f"File {path} is no complete safetensors file ({error}): export or download it again.") from error


def read_encoder(header: Header, prefix: str = "", open_clip: bool = False, projection: bool = False) -> dict[str, Any]:
    """The state of the text encoder that stands behind `prefix` in a file.

    Raises:
        UserError: tensors are missing, or some are no text encoder's.
    """
    own = [name for name in header.tensors if name.startswith(prefix)]
    layers = count_layers(name for name in own if not is_extra(name.removeprefix(prefix)))
    mapping = stored_names(text_encoder_keys(layers, projection), own, prefix, open_clip)
    missing = mapping.keys() - header.tensors.keys()
    unknown = [name for name in own if name not in mapping and not is_extra(name.removeprefix(prefix))]
    if missing or unknown:  # A1111 and ComfyUI would fill in the one and drop the other, silently
        raise mismatch("text encoder", header.path, missing, unknown)
    stored = read_tensors(header.path, mapping)
    return {key: part for name, keys in mapping.items() for key, part in parted(name, keys, stored[name]).items()}


def read_encoders(path: Path) -> dict[str, dict[str, Any]]:
    """The text encoders of a full checkpoint or of a text encoder's own file, by the pipeline's component.

    A file of one encoder stands under the component that its metadata names, or under "".

    Raises:
        UserError: the file is damaged or holds no text encoder.
    """
    header = read_header(path)
    family = checkpoint_family(header.tensors)
    if family:
        return {
            place.encoder: read_encoder(header, place.prefix, place.open_clip, place.encoder == "text_encoder_2")
            for place in PLACES[family]
        }
    if found := _comfyui_encoders(header):
        return found
    component = header.metadata.get("sd_erase.encoder", "")
    if any(name.startswith("transformer.resblocks.") for name in header.tensors):
        return {component: read_encoder(header, open_clip=True, projection="text_projection" in header.tensors)}
    if any(name.removeprefix(PREFIX).startswith("encoder.layers.0.self_attn.") for name in header.tensors):
        return {component: read_encoder(header, projection="text_projection.weight" in header.tensors)}
    raise UserError(f"File {path} holds no text encoder of Stable Diffusion: `sd-erase inspect` says what it is.")


def _comfyui_encoders(header: Header) -> dict[str, dict[str, Any]]:
    """The text encoders under ComfyUI's own names, as checkpoints of SD 3 and FLUX.1 and some savers have them."""
    found = {}
    for name, component in (("clip_l", "text_encoder"), ("clip_h", "text_encoder"), ("clip_g", "text_encoder_2")):
        for prefix in (f"text_encoders.{name}.transformer.", f"{name}.transformer."):
            if f"{prefix}{PREFIX}final_layer_norm.weight" in header.tensors:
                has_projection = f"{prefix}text_projection.weight" in header.tensors
                found[component] = read_encoder(header, prefix, projection=has_projection)
    return found


# --- writing ----------------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """As safetensors' own `save_file`, with the metadata in one order: its own differs from call to call, and with it the file's hash.

    What is known by its content (an erased encoder, and all that was made with it) would be new after an equal training.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"The header of {path} does not fit its place: safetensors writes it in another way than before.")
        stream.seek(8)
        stream.write(text.ljust(length))


def write_tensors(
    path: Path, entries: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str], chunks: Callable[[str], Iterable[Any]]
) -> str:
    """Write a safetensors file tensor by tensor, so that memory holds one at a time.

    Args:
        entries: name -> dtype (as safetensors names it), shape and size in bytes, in the order to write.
        metadata: of the header; the hashes of the numbers are added.
        chunks: the bytes of a tensor, called once for each.

    Returns:
        SHA-256 of all bytes behind the header, in hexadecimal.
    """
    own = encoder_names(entries)
    hashes = [HASH, CONTENT, *([ENCODER_CONTENT] if own else [])]
    header: dict[str, Any] = {"__metadata__": {**metadata, **dict.fromkeys(hashes, "0" * 64), HASH: f"0x{'0' * 64}"}}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry["size"]
        header[name] = {"dtype": entry["dtype"], "shape": list(entry["shape"]), "data_offsets": [offset, end]}
        offset = end

    def encoded() -> bytes:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight
        return len(text).to_bytes(8, "little") + text

    digest, digests = hashlib.sha256(), {}
    with path.open("wb") as stream:
        stream.write(encoded())
        for name in entries:
            tensor = hashlib.sha256()
            for chunk in chunks(name):
                digest.update(chunk)
                tensor.update(chunk)
                stream.write(chunk)
            digests[name] = tensor.hexdigest()
        header["__metadata__"] |= {HASH: f"0x{digest.hexdigest()}", CONTENT: content_sha256(header, digests)}
        if own:
            header["__metadata__"][ENCODER_CONTENT] = content_sha256(header, {name: digests[name] for name in own})
        stream.seek(0)
        stream.write(encoded())  # of the same length: only the hashes' digits differ
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def content_sha256(entries: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str]) -> str:
    """One hash of many tensors that does not depend on their order: of their names, types, shapes and own hashes, sorted by name.

    Args:
        entries: name -> dtype and shape.
        digests: name -> SHA-256 of the tensor's bytes, for those that count.
    """
    rows = [[name, entries[name]["dtype"], list(entries[name]["shape"]), digests[name]] for name in sorted(digests)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def raw_bytes(tensor: Any) -> Any:
    """A tensor's numbers as a buffer of bytes."""
    import torch

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
