"""What is wrong with a text encoder in a file: tensors that are missing, strange, mis-shaped, all zero or quantised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sd_erase import formats
from sd_erase.export.numbers import Numbers, all_zero, companions, quantised
from sd_erase.formats import Header, text_encoder_keys

WIDTHS = {128, 768, 1024, 1280}  # of the encoders that Stable Diffusion and the pocket model have
VOCABULARY, POSITIONS = 49408, 77  # of every CLIP text encoder
MAX_IDS = 4096  # numbers of position_ids that are looked at
# tensors that a text encoder's file may hold beside the encoder
COMPANIONS = {"logit_scale", "visual_projection.weight", "text_projection.weight", "text_projection", "attn_mask"}


@dataclass
class Findings:
    """What is known of one text encoder in a file."""

    width: int
    layers: int
    foreign: list[str]  # tensors behind the prefix that are not the encoder's
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine(header: Header, numbers: dict[str, Numbers], prefix: str, open_clip: bool, projection: bool) -> Findings:
    """The text encoder that stands behind `prefix` in a file.

    Args:
        numbers: of all tensors, from `numbers.scan`.
        open_clip: whether the file has OpenCLIP's layout.
        projection: whether it should have one.
    """
    own = [name for name in header.tensors if name.startswith(prefix)]
    layers = formats.count_layers(own)
    stored = formats.stored_names(text_encoder_keys(layers, projection), own, prefix, open_clip)
    known = {*stored, *(prefix + name for name in COMPANIONS), *companions(own)}
    foreign = sorted(name for name in own if name not in known and not name.endswith(formats.POSITION_IDS))
    missing = sorted(stored.keys() - header.tensors.keys())
    width = _width(header, stored)
    found = Findings(width, layers, foreign)
    if missing:
        found.problems.append(f"{len(missing)} tensors of the encoder are missing, first {missing[0]}.")
    found.problems += _mis_shaped(header, stored, width)
    notes, problems = _rows(header, stored, width)
    found.notes += notes
    found.problems += problems
    found.problems += all_zero(numbers, (name for name in stored if name.endswith(("weight", "embedding", "projection"))))
    notes, problems = quantised(header, stored)
    found.notes += notes
    found.problems += problems + position_id_problems(header, prefix)
    return found


def _width(header: Header, stored: dict[str, tuple[str, ...]]) -> int:
    """The encoder's width: that of most of its norms."""
    sizes = Counter(
        header.shape(name)[0]
        for name, keys in stored.items()
        if name in header.tensors and "norm" in keys[0] and len(header.shape(name)) == 1
    )
    return sizes.most_common(1)[0][0] if sizes else 0


def _mis_shaped(header: Header, stored: dict[str, tuple[str, ...]], width: int) -> list[str]:
    """Tensors whose shape is not that of the others' width."""
    inner = Counter(
        header.shape(name)[0]
        for name, keys in stored.items()
        if name in header.tensors and keys[0].endswith("fc1.bias") and len(header.shape(name)) == 1
    )
    middle = inner.most_common(1)[0][0] if inner else 4 * width
    wrong = []
    for name, keys in stored.items():
        if name not in header.tensors or not width:
            continue
        shape = header.shape(name)
        expected = _expected(keys, name, shape, width, middle)
        if shape != expected:
            wrong.append(f"{name} {list(shape)} in place of {list(expected)}")
    return [f"{len(wrong)} tensors of the encoder have a wrong shape, first {wrong[0]}."] if wrong else []


def _expected(keys: tuple[str, ...], name: str, shape: tuple[int, ...], width: int, middle: int) -> tuple[int, ...]:
    """The shape of a tensor that holds `keys`; the number of rows is the file's own where it is no matter of the width."""
    key, joined = keys[0], len(keys)
    rows = shape[0] if shape else 1
    if key.endswith("embedding.weight"):
        return rows, width
    if key == "text_projection.weight":  # OpenCLIP keeps it turned
        return (width, shape[1] if len(shape) > 1 else 1) if name.endswith("text_projection") else (rows, width)
    out = middle if ".fc1." in key else width * joined
    if key.endswith(".weight") and "norm" not in key:
        return out, middle if ".fc2." in key else width
    return (out,)


def _rows(header: Header, stored: dict[str, tuple[str, ...]], width: int) -> tuple[list[str], list[str]]:
    """Notes and problems about the numbers of words and positions."""
    notes: list[str] = []
    problems: list[str] = []
    for name, keys in stored.items():
        shape = header.shape(name) if name in header.tensors else ()
        if not keys[0].endswith("embedding.weight") or len(shape) != 2:
            continue
        what, expected = ("words", VOCABULARY) if "token" in keys[0] else ("positions", POSITIONS)
        if shape[0] == expected:
            continue
        if what == "words" and shape[0] > expected:
            notes.append(
                f"its vocabulary has {shape[0] - expected} rows more than CLIP's {expected} (tokens that were added): ComfyUI, A1111 and "
                "Forge refuse it or ignore them"
            )
        else:
            sentence = f"{name} has {shape[0]} {what}, not CLIP's {expected}"
            (problems if width in WIDTHS else notes).append(sentence + (": no program can load it." if width in WIDTHS else ""))
    return notes, problems


def position_id_problems(header: Header, prefix: str) -> list[str]:
    """What is wrong with a file's ``position_ids``, which merges corrupt by rounding; they are copied as they are."""
    return [
        f"{name} of {header.path.name} {fault}, as some merges leave it: programs that read it see prompts scrambled; repair the file."
        for name in header.tensors
        if name.startswith(prefix) and name.endswith(formats.POSITION_IDS) and (fault := _position_fault(header, name))
    ]


def _position_fault(header: Header, name: str) -> str:
    import torch

    shape, dtype = header.shape(name), header.tensors[name]["dtype"]
    start, end = header.tensors[name]["data_offsets"]
    if end - start > 8 * MAX_IDS or dtype in formats.UNREADABLE or len(shape) not in (1, 2):
        return f"is {dtype} of shape {list(shape)}"
    ids = formats.read_tensors(header.path, [name])[name].flatten()
    if len(ids) and torch.equal(ids.double(), torch.arange(len(ids)).double()):
        return "" if len(ids) == _positions(header, name) else f"has {len(ids)} positions"
    return f"is not 0 to {max(len(ids), 1) - 1}"


def _positions(header: Header, ids: str) -> int:
    """How many rows the position embedding beside these ids has."""
    beside = ids.removesuffix("position_ids") + "position_embedding.weight"
    return header.shape(beside)[0] if beside in header.tensors and header.shape(beside) else POSITIONS
