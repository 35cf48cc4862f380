"""What stands before the numbers of a safetensors file, read so that no file, however it was made, costs more than it is worth.

safetensors reads a header into its own structures before it judges it: 100 MB of brackets or of empty tensors are gigabytes
there. Here the length, the number of strings and of values are counted on the bytes first; the rest is safetensors' own rules.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sd_erase.errors import UserError, no_file

PICKLES = {".ckpt", ".bin", ".pt", ".pth"}
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_TENSORS = 200_000  # the largest models have some thousands
MAX_NAME = 1_000  # characters
MAX_QUOTES = 12 * MAX_TENSORS  # ten a tensor, four an entry of the metadata
MAX_VALUES = 25 * MAX_TENSORS  # commas and brackets outside of strings
MAX_DIMENSIONS = 16
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# what people rename to .safetensors, or download in its place
OTHERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes them (a pickle)",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "a web page",
}


@dataclass(frozen=True)
class Header:
    """What stands before the numbers of a safetensors file."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets (bytes behind `start`), in the file's order
    start: int

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])


# Checkpoints of pytorch-lightning (sd-v1-4.ckpt) name classes of their training beside the weights, which torch refuses to make.
# Each gets an empty class in its place, so that nothing of the file's is imported or called; weights keep their types, on whatever
# card they were saved, and those that share memory, which safetensors cannot store, become copies
_CONVERSION = (
    "import sys, zipfile, torch, safetensors.torch; from torch import serialization as s; f, t = sys.argv[1:]; "
    "n = s.get_unsafe_globals_in_checkpoint(f) if zipfile.is_zipfile(f) else []; e = lambda *a: None; "
    "s.add_safe_globals([(type('Empty', (), {'__init__': e, '__setstate__': e}), i) for i in n]); "
    "d = torch.load(f, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
    "safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}, t)"
)


def pickle_error(what: str, path: Path) -> UserError:
    """The refusal of a pickle, with a line that converts it without running its code."""
    names = " ".join(shlex.quote(str(each)) for each in (path, path.with_suffix(".safetensors")))
    return UserError(
        f"{what} {path} is a pickle, which can run code when opened; convert it and pass the new file: "
        f'python -c "{_CONVERSION}" {names}'
    )


def read_header(path: Path) -> Header:
    """The header of a complete safetensors file.

    Every place that opens such a file asks this first.

    Raises:
        UserError: no such file, a pickle, a truncated file, or one that breaks the format's rules.
    """
    if path.suffix in PICKLES:
        raise pickle_error("File", path)
    try:
        if not path.is_file():
            inside = next(itertools.chain(path.glob("*.safetensors"), path.glob("*/*.safetensors")), None)
            example = f", such as {inside}" if inside else ""
            raise UserError(f"File {path} {no_file(path)}: pass the path of a .safetensors file{example}.")
        size = path.stat().st_size
        text, start = _header_text(path, size)
        metadata, tensors = parse_header(text, size - start)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"File {path} is no complete safetensors file ({error}): export or download it again.") from error
    return Header(path, metadata, tensors, start)


def _header_text(path: Path, size: int) -> tuple[str, int]:
    """The header's text and where the numbers start."""
    with path.open("rb") as stream:
        first = stream.read(32)
        length = int.from_bytes(first[:8], "little")
        for magic, what in OTHERS.items():
            # a header's own length may begin with these bytes too, but no brace follows it then
            if first.startswith(magic) and first[8:9] != b"{":
                raise ValueError(f"it is {what}")
        if len(first) < 8:
            raise ValueError(f"it has {len(first)} bytes")
        if length > MAX_HEADER:
            raise ValueError(f"its header claims {length} bytes; {MAX_HEADER} are allowed")
        if length > size - 8:
            raise ValueError(f"it ends within its header: {length} bytes are stated, {size - 8} are there")
        stream.seek(8)
        content = stream.read(length)
    _check_amount(content)
    try:
        return content.decode(), 8 + length
    except UnicodeDecodeError:
        raise ValueError("its header is no UTF-8") from None


def _check_amount(content: bytes) -> None:
    """Refuse a header that would become far larger in memory than it is in the file."""
    outside = content.replace(b"\\\\", b"").replace(b'\\"', b"")  # then every quote begins or ends a string
    if outside.count(b'"') > MAX_QUOTES:
        raise ValueError(f"its header has more than {MAX_TENSORS} tensors or entries")
    plain = b"".join(outside.split(b'"')[::2])
    if sum(plain.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"its header has more than {MAX_VALUES} values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, following in itertools.pairwise(names) if name == following)
        raise ValueError(f"its header has {twice[:80]!r} twice")
    return found


def _whole(text: str) -> int:
    if len(text) > 19:
        raise ValueError("its header has a number that no file can hold")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"its header has {text[:20]} where a whole number belongs")


def parse_header(text: str, numbers: int) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Metadata and tensors of a header.

    Args:
        text: the JSON.
        numbers: how many bytes follow it in the file.

    Returns:
        The metadata, and name -> dtype, shape and data_offsets in the order of the numbers.

    Raises:
        ValueError: the text is no header, or not of that many bytes.
    """
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_no_number, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict) or not text.startswith("{"):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no mapping of names to texts")
    for name, entry in header.items():
        _check_entry(name, entry)
    tensors = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    _check_places(tensors, numbers)
    return metadata, tensors


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_entry(name: str, entry: Any) -> None:
    """One tensor's type, shape and bytes."""
    shown = repr(name[:80])
    if len(name) > MAX_NAME:
        raise ValueError(f"tensor {shown}... has a name of {len(name)} characters")
    if not name.isprintable():  # the libraries print names as they are
        raise ValueError(f"tensor {shown} has control characters in its name")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"tensor {shown} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {shown} is of the unknown type {str(dtype)[:20]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 2**62:
        raise ValueError(f"tensor {shown} has an impossible shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown} has impossible data_offsets")
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"tensor {shown} has {offsets[1] - offsets[0]} bytes, which {dtype} of shape {shape} does not need")


def _check_places(tensors: dict[str, dict[str, Any]], numbers: int) -> None:
    """The tensors' bytes follow each other without a hole or an overlap, and fill the file."""
    end = 0
    for name, entry in tensors.items():
        start = entry["data_offsets"][0]
        if start != end:
            raise ValueError(
                f"tensor {name[:80]!r} {'overlaps the one' if start < end else 'leaves a hole behind the one'} before it"
            )
        end = entry["data_offsets"][1]
    if end > numbers:
        raise ValueError(f"it is truncated: {end - numbers} of {end} bytes of numbers are missing")
    if end < numbers:
        raise ValueError(f"{numbers - end} bytes behind its last tensor belong to none")
