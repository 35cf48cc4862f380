"""CIFAR-100: class names as captions through prompt templates; the python pickle by a restricted reader, or parquet."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions.arrow import files_of, image_bytes, rows_of, schema_of, shard_name, splits_of_names
from sd_erase.captions.caption import Caption, Tally, checked
from sd_erase.captions.files import MAX_ROW, reading, take_out
from sd_erase.errors import UserError
from sd_erase.terminal import one_line

TEMPLATES = (
    "a photo of a {}",
    "a blurry photo of a {}",
    "a small picture of the {}",
    "a close-up photo of a {}",
    "a photo of the {}",
)
# what the published pickles hold besides plain values: one numpy array of bytes
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
}  # fmt: skip


# what plain values, lists, tables and one array are written with
_OPCODES = frozenset(
    # ruff: noqa: SIM905 -- a list of quoted names is harder to read
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM "
    "SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
    "BUILD".split()
)


def _check_opcodes(content: bytes) -> None:
    """Refuse a pickle that would cost memory or time beyond its size.

    The unpickler makes room for as many remembered values as the highest number says, and the hash of a tuple that holds another one
    twice, and so on, is never finished.
    """
    import pickletools

    last, tuples, remembered = "", set[int](), set[int]()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"it uses {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(remembered) if argument is None else int(argument)
            if number > count:
                raise pickle.UnpicklingError("it numbers values that it does not have")
            remembered.add(number)
            if last.startswith("TUPLE"):
                tuples.add(number)
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET") and int(argument or 0) in tuples:
            raise pickle.UnpicklingError("it repeats a tuple")
        last = opcode.name


class _Array:
    """A numpy array as a pickle tells of it: numpy itself crashes where the type's or the array's state is wrong."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self, images: int) -> Any:
        """Bytes of [images, 3072].

        Raises:
            ValueError, TypeError: it is no such array.
        """
        import numpy

        _, shape, kind, is_fortran, content = self.state
        if (
            shape != (images, 3072)
            or kind.arguments[:1] not in (("u1",), (b"u1",))
            or is_fortran
            or len(content) != images * 3072
        ):
            raise ValueError(f"images of shape {shape}")
        return numpy.frombuffer(content, dtype="uint8").reshape(images, 3072)


class _Kind:
    """An array's type of number by the arguments that name it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


class _SafeUnpickler(pickle.Unpickler):
    """Builds numbers, texts and lists, keeps what arrays are made of as it is, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # numpy 1 and 2 keep the function in modules of different names; the class is only named, not called
        return {"_reconstruct": _Array, "ndarray": "ndarray", "dtype": _Kind}[name]


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes; the codec is fixed so that the file cannot choose one."""
    return text.encode("latin1")


def _load(path: Path) -> dict[bytes, Any]:
    with reading(path):
        if path.stat().st_size > MAX_ROW:
            raise UserError(f"{path} is larger than {MAX_ROW >> 20} MB: it is no CIFAR-100 file; download it again.")
        try:
            content = path.read_bytes()
            _check_opcodes(content)
            values = _SafeUnpickler(io.BytesIO(content), encoding="bytes").load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(f"{path} is no CIFAR-100 file ({' '.join(str(error).split())[:120]}): download it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no CIFAR-100 file: expected a table of images and labels.")
    return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in values.items()}


def read(
    path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, tally: Tally | None = None, **_: Any
) -> Iterator[Caption]:
    """One caption an image, of the folder with ``train``, ``test`` and ``meta`` or of parquet files.

    Raises:
        UserError: no such files, or malformed or unsafe ones.
    """
    shards = files_of(path)
    captions = _parquet(shards, folder, wanted) if shards else _pickles(path, folder, wanted)
    shape = "CIFAR-100's train, test and meta, or parquet files"
    yield from checked(captions, path, shape, Tally() if tally is None else tally)


def caption_of(label: str, position: int) -> str:
    """The class name in the template that an image's position chooses."""
    return TEMPLATES[position % len(TEMPLATES)].format(label.replace("_", " "))


def label_of(caption: str) -> str | None:
    """The class name in a caption of `caption_of`, or None."""
    # the longest template first: "a photo of the {}" is no class "the ..."
    for template in sorted(TEMPLATES, key=len, reverse=True):
        head = template.removesuffix("{}")
        if caption.startswith(head):
            return caption.removeprefix(head)
    return None


def _pickles(path: Path, folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    root = path if path.is_dir() else path.parent
    root = root / "cifar-100-python" if (root / "cifar-100-python").is_dir() else root
    if not (root / "meta").is_file():
        raise UserError(
            f"{root} holds no CIFAR-100 file meta: pass the folder cifar-100-python (unpacked), with train, test and meta."
        )
    try:
        labels = [name.decode() if isinstance(name, bytes) else str(name) for name in _load(root / "meta")[b"fine_label_names"]]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{root / 'meta'} does not name CIFAR-100's classes ({error}): download it again.") from error
    for split in ("train", "test"):
        file = root / split
        if not file.is_file():
            continue
        values = _load(file)
        try:
            classes = values[b"fine_labels"]
            pixels = values[b"data"].pixels(len(classes))
            names = [labels[number] for number in classes]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{file} is no CIFAR-100 file ({error}): download it again.") from error
        for position, label in enumerate(names):
            name = f"{split}-{position:05d}.png"
            key = f"{name}#0"
            image = None
            if folder is not None:
                chosen = wanted is not None and key in wanted
                image = take_out(folder / "images", name, _png(pixels[position]) if chosen else None, file)
            yield Caption(key, image, caption_of(label, position), split)


def _png(pixels: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def _parquet(shards: list[Path], folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    import json

    splits = splits_of_names(shards)
    for shard in shards:
        schema = schema_of(shard)
        columns = schema.names
        image_column = next((name for name in ("img", "image") if name in columns), None)
        if "fine_label" not in columns:
            raise UserError(
                f"{shard} has no column fine_label (it has {one_line(', '.join(columns)[:300])}): pass CIFAR-100's parquet files."
            )
        metadata = schema.metadata or {}
        try:
            labels = json.loads(metadata[b"huggingface"])["info"]["features"]["fine_label"]["names"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{shard} does not name its classes: pass the files as the hub stores them.") from error
        wished = [column for column in ("fine_label", image_column) if column]
        for position, row in enumerate(rows_of(shard, wished, image_column, wanted is not None)):
            name = f"{shard_name(shard)}-{position:05d}.png"
            key = f"{name}#0"
            image = None
            if image_column and folder is not None:
                content = image_bytes(row[image_column]) if wanted is not None and key in wanted else None
                image = take_out(folder / "images", name, content, shard)
            number = row["fine_label"]
            if not isinstance(number, int) or not 0 <= number < len(labels):
                raise UserError(f"{shard}, row {position}: class {number!r} is none of its {len(labels)}: download it again.")
            yield Caption(key, image, caption_of(str(labels[number]), position), splits[shard])
