"""Strict loading: each tensor of a module comes from its file, and each tensor of the file goes into the module.

Whatever is missing, unknown, of another shape or no number is told by name, before anything is read; a module with numbers that no
file holds would train, draw and be exported all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sd_erase import formats
from sd_erase.errors import UserError
from sd_erase.mismatch import Reshaped, is_extra, mismatch

# wrappers that torch puts before every name, where a model was saved from within them
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel; torch.compile
# the attention of autoencoders that diffusers before 0.18 wrote
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# torch's types that hold a weight as it is, as safetensors names them
_CODES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
FLOATS = set(_CODES.values())


class Entry(Protocol):
    """A tensor that may be read."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...  # as safetensors names it

    def read(self) -> Any: ...


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Any:
        """The tensor, mapped into memory rather than read."""
        return formats.read_tensors(self.path, [self.name])[self.name]


class Held(NamedTuple):
    """A tensor in memory."""

    name: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return _CODES.get(str(self.tensor.dtype), str(self.tensor.dtype))

    def read(self) -> Any:
        return self.tensor


def stored(files: Sequence[Path], prefix: str = "") -> dict[str, Stored]:
    """The tensors of safetensors files by name, which starts behind `prefix`.

    Raises:
        UserError: a file is missing, damaged or a pickle.
    """
    found = {}
    for path in files:
        header = formats.read_header(path)
        for name, entry in header.tensors.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = Stored(path, name, tuple(entry["shape"]), entry["dtype"])
    return found


# --- which files ------------------------------------------------------------------------------------------------------------


def choose_files(names: Iterable[str], stem: str, what: str) -> list[str]:
    """The safetensors files that hold a component: one file or its shards, in full precision where there is a choice.

    Args:
        names: of all files in the component's folder.
        stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers).
        what: the component and its folder, for the error.

    Raises:
        UserError: there is none, or only pickles; a shard is missing; or several variants, none of which is the usual one.
    """
    names = list(names)
    form = re.compile(rf"{re.escape(stem)}(\.\w+)?(?:-(\d{{5}})-of-(\d{{5}}))?(\.\w+)?\.safetensors")
    variants: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for name in names:
        if match := form.fullmatch(name):
            # one file, and shards of the same, are both complete
            key = (match[1] or match[4] or "").removeprefix(".") + ("/shards" if match[2] else "")
            variants.setdefault(key, {})[int(match[2] or 1)] = name
            counts[key] = int(match[3] or 1)
    if not variants:
        pickles = [name for name in names if name.startswith((stem, "pytorch_model")) and Path(name).suffix in formats.PICKLES]
        raise UserError(
            f"{what} has weights that are pickles ({pickles[0]}), which can run code when opened: pass a folder or a checkpoint with "
            ".safetensors files."
            if pickles
            else f"{what} has no {stem}.safetensors: pass a complete folder with .safetensors files."
        )
    order = [f"{kind}{shards}" for kind in ("", "fp32", "fp16", "bf16") for shards in ("", "/shards")]
    known = [key for key in order if key in variants] or sorted(variants)
    if known[0] not in order and len(known) > 1:
        raise UserError(
            f"{what} holds several variants ({', '.join(known)}) and none without a name: keep the one that you mean."
        )
    chosen, count = variants[known[0]], counts[known[0]]
    missing = sorted(set(range(1, count + 1)) - chosen.keys())
    if missing:
        raise UserError(f"{what} lacks shard {missing[0]} of {count} ({chosen[min(chosen)]} is there): fetch the whole folder.")
    return [chosen[number] for number in sorted(chosen)]


def component_files(folder: Path, stem: str, what: str) -> list[Path]:
    """The paths of `choose_files` in a component's folder."""
    if not folder.is_dir():
        raise UserError(f"{what} does not exist: pass a complete folder.")
    return [folder / name for name in choose_files([path.name for path in folder.iterdir()], stem, what)]


# --- which tensor is which --------------------------------------------------------------------------------------------------


def _unwrapped(names: Collection[str]) -> dict[str, str]:
    """The file's names -> those without a wrapper that stands before all of them."""
    result = {name: name for name in names}
    while wrapper := next((w for w in WRAPPERS if result and all(name.startswith(w) for name in result.values())), ""):
        result = {name: inner.removeprefix(wrapper) for name, inner in result.items()}
    return result


def _candidates(name: str) -> Iterable[str]:
    """What a file's tensor of this name may be called in memory; versions of the libraries differ."""
    yield name
    yield name.removeprefix(formats.PREFIX)
    yield formats.PREFIX + name
    head, part, kind = ("", *name.split("."))[-3:] if name.count(".") > 1 else ("", "", "")
    if "attentions." in name and part in OLD_ATTENTION:
        yield f"{name[: -len(f'.{part}.{kind}')]}.{OLD_ATTENTION[part]}.{kind}"


def matched(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry], what: str, file: object, reshaped: bool = False
) -> dict[str, Entry]:
    """The module's names -> the file's tensors.

    Args:
        wanted: name -> shape in the module.
        found: the file's.
        what: the component, for the error: "text encoder".
        file: where it lies, for the error.
        reshaped: whether a convolution of one pixel may stand for a linear layer, as in latent-diffusion's files.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or holds no floating-point numbers.
    """
    names = _unwrapped(found)
    result: dict[str, Entry] = {}
    # a CLIP's vision tower is no extra in a CLIP
    parts = {key.partition(".")[0] for key in wanted} - {formats.PREFIX.rstrip(".")}
    unknown = []
    for name, inner in names.items():
        key = next((candidate for candidate in _candidates(inner) if candidate in wanted), None)
        if key is not None and key not in result:
            result[key] = found[name]
        elif not is_extra(inner) or (inner.partition(".")[0] in parts and not inner.endswith("position_ids")):
            unknown.append(name)
    missing = [key for key in wanted if key not in result]
    shapes = [
        Reshaped(each.name, each.shape, wanted[key])
        for key, each in result.items()
        if _plain(each.shape, reshaped) != _plain(wanted[key], reshaped)
    ]
    if missing or unknown or shapes:
        raise mismatch(what, file, missing, unknown, shapes)
    foreign = [each for each in result.values() if each.dtype not in FLOATS]
    if foreign:
        raise UserError(
            f"The {what} of {file} stores {len(foreign)} tensors as {foreign[0].dtype}, first {foreign[0].name}, which are no weights as "
            "they stand (quantised, or damaged): pass the model in float16, bfloat16 or float32."
        )
    return result


def _plain(shape: tuple[int, ...], reshaped: bool) -> tuple[int, ...]:
    return shape[:2] if reshaped and len(shape) > 2 and set(shape[2:]) == {1} else shape


# --- into the module --------------------------------------------------------------------------------------------------------


def build(make: Callable[[], Any]) -> Any:
    """A module without memory for its weights, which `fill` gives it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return make().eval()


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors that a module stores."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module: Any, tensors: Mapping[str, Entry], dtype: Any) -> Any:
    """Give a module of `build` its tensors of `matched`, as `dtype`, and return it."""
    shapes = shapes_of(module)
    module.load_state_dict(
        {key: each.read().to(dtype).reshape(shapes[key]) for key, each in tensors.items()}, strict=True, assign=True
    )
    return module


def load(module: Any, found: Mapping[str, Entry], dtype: Any, what: str, file: object, *, finite: bool = False) -> Any:
    """`build`'s module with all of its tensors from a file, in eval mode.

    Args:
        finite: whether to look for NaN and infinity, which costs a pass over the numbers.

    Raises:
        UserError: a tensor does not fit (see `matched`) or is not finite.
    """
    fill(module, matched(shapes_of(module), found, what, file), dtype)
    if finite:
        check_finite(module.state_dict(), what, file)
    return module


def check_finite(state: Mapping[str, Any], what: str, file: object) -> None:
    """Raises `UserError` where a tensor holds NaN or infinity, which every result would then be."""
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(
            f"The {what} of {file} holds numbers that are NaN or infinite ({len(broken)} tensors, first {broken[0]}), so nothing can be "
            "computed with it: pass an intact model."
        )


def held(state: Mapping[str, Any]) -> dict[str, Held]:
    """The tensors of a state dict."""
    return {name: Held(name, tensor) for name, tensor in state.items()}


def load_named(module: Any, state: Mapping[str, Any], what: str, file: object) -> None:
    """Put tensors into a module that has memory; their names may lack the prefix ``text_model.`` or have it.

    Raises:
        UserError: a tensor does not fit (see `matched`).
    """
    module.load_state_dict({key: each.read() for key, each in matched(shapes_of(module), held(state), what, file).items()})
