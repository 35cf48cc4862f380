"""The numbers of a safetensors file, read block by block: where they are not finite, all zero, or quantised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sd_erase.headers import Header
from sd_erase.progress import NoProgress, Progress

BLOCK = 1 << 23  # bytes; a multiple of every type's size
# floats by the bits of their exponent; what is more than that is not a number
EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "C64": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C}
WIDTHS = {"F64": 8, "F32": 4, "C64": 4, "F16": 2, "BF16": 2, "F8_E5M2": 1}  # bytes of what a mask is laid over
NAN_BYTES = {"F8_E4M3": (0x7F, 0xFF), "F8_E4M3FNUZ": (0x80,), "F8_E5M2FNUZ": (0x80,), "F8_E8M0": (0xFF,)}
PLAIN = {"F64", "F32", "F16", "BF16"}
QUANTISED = {
    "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "BOOL": "truth values", "C64": "complex numbers", "F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6", "F8_E8M0": "fp8 scales",
}  # fmt: skip
# what stands beside the weights where a quantiser wrote them, by the quantiser
COMPANIONS = {
    "bitsandbytes": (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format"),
    "SDNQ": (".scale", ".zero_point", ".svd_up", ".svd_down"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "optimum-quanto": ("._data", "._scale", "._shift"),
    "ComfyUI": (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant", "scaled_fp8"),
}


@dataclass(frozen=True)
class Numbers:
    """What one tensor's numbers are."""

    size: int
    not_a_number: int
    infinite: int
    is_zero: bool


def scan(header: Header, progress: Progress | None = None) -> dict[str, Numbers]:
    """Every tensor's numbers, with one block in memory at a time."""
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.tensors.values())
    with (progress or NoProgress())("reading the numbers (MB)", size // 10**6) as task:
        return {name: _scan_one(header, name, task.advance) for name in header.tensors}


def _scan_one(header: Header, name: str, advance: Callable[[int], None]) -> Numbers:
    import numpy

    dtype = header.tensors[name]["dtype"]
    nan = infinite = 0
    is_zero, before = True, header.tensors[name]["data_offsets"][0]
    for block in _blocks(header, name):
        pattern = numpy.frombuffer(block, f"u{WIDTHS.get(dtype, 1)}")
        if dtype in EXPONENTS:
            limit = EXPONENTS[dtype]
            magnitude = pattern & pattern.dtype.type((1 << (8 * WIDTHS[dtype] - 1)) - 1)  # without the sign
            largest = int(magnitude.max())
            is_zero &= largest == 0
            if largest >= limit:
                nan += int((magnitude > limit).sum())
                infinite += int((magnitude == limit).sum())
        else:
            is_zero &= not pattern.any()
            nan += sum(int((pattern == value).sum()) for value in NAN_BYTES.get(dtype, ()))
        advance((before + len(block)) // 10**6 - before // 10**6)
        before += len(block)
    return Numbers(math.prod(header.shape(name)), nan, infinite, is_zero)


def _blocks(header: Header, name: str) -> Iterator[bytes]:
    start, end = header.tensors[name]["data_offsets"]
    with header.path.open("rb") as stream:
        stream.seek(header.start + start)
        while start < end and (block := stream.read(min(BLOCK, end - start))):
            start += len(block)
            yield block


def not_finite(numbers: dict[str, Numbers]) -> list[str]:
    """Which tensors hold what is no number, one sentence for NaN and one for infinities."""
    problems = []
    for what, attribute in (("NaN", "not_a_number"), ("infinite numbers", "infinite")):
        found = {name: amount for name, each in numbers.items() if (amount := getattr(each, attribute))}
        if found:
            first = next(iter(found))
            problems.append(
                f"{len(found)} of {len(numbers)} tensors hold {what}, first {first} ({found[first]} of its {numbers[first].size} numbers): "
                "images will be black or noise; download it again, or get another file."
            )
    return problems


def all_zero(numbers: dict[str, Numbers], weights: Iterable[str]) -> list[str]:
    """Which of these weights are nothing but zeros."""
    found = [name for name in weights if name in numbers and numbers[name].size and numbers[name].is_zero]
    return [f"{len(found)} of its weights are all zero, first {found[0]}: what it should hold is lost."] if found else []


def companions(names: Iterable[str]) -> dict[str, str]:
    """Tensors that a quantiser keeps beside the weights -> its name."""
    return {
        name: maker
        for name in names
        for maker, endings in COMPANIONS.items()
        if name.endswith(endings) or (maker == "bitsandbytes" and ".quant_state." in name)
    }


def quantised(header: Header, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Notes and problems about weights that are no plain floats.

    Args:
        names: the tensors that should be weights.
    """
    types = Counter(header.tensors[name]["dtype"] for name in names if name in header.tensors)
    makers = sorted(set(companions(header.tensors).values()))
    by = f", in the form of {' and '.join(makers)}" if makers else ""
    notes, problems = [], []
    for dtype, count in types.items():
        if dtype in PLAIN:
            continue
        if dtype not in QUANTISED:
            notes.append(
                f"{count} of its weights are fp8 ({dtype}){by}, with some three digits: erase from a file of float16 or float32"
            )
        elif by:
            notes.append(
                f"quantised: {count} of its weights are {QUANTISED[dtype]}{by}; programs that do not know that form load wrong numbers"
            )
        else:
            problems.append(
                f"{count} of its weights are {QUANTISED[dtype]} ({dtype}) and no scales stand beside them: it was quantised, and programs "
                "would take those for the weights; get the file in float16 or float32."
            )
    return notes, problems
