"""Captions of a data set, one at a time: each reader yields `Caption` and never holds the data set in memory.

A caption's key is ``IMAGE#NUMBER``, so that an image is known by its key even where only the text is there. Readers whose
images lie inside another file (parquet, tar, CIFAR) name the file under ``folder`` where an image would lie, and write it
only for the keys in ``wanted``.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sd_erase import catalog
from sd_erase.errors import UserError

if TYPE_CHECKING:
    from sd_erase.bases import Base


@dataclass(frozen=True)
class Caption:
    """One sentence about one image; ``image`` is an absolute path, or None for text alone."""

    key: str
    image: str | None
    text: str
    split: str | None

    @property
    def image_key(self) -> str:
        """What all captions of one image share."""
        return self.key.rpartition("#")[0] or self.key


def open_dataset(spec: str, base: Base, folder: Path, wanted: Collection[str] | None = None) -> Iterator[Caption]:
    """The captions of ``READER:PATH`` (or ``auto``: the scenes of the pocket base).

    Args:
        base: what "auto" depends on.
        folder: where a reader may put files (rendered scenes, images taken out of archives).
        wanted: keys whose images are to be taken out of archives; None takes none.

    Raises:
        UserError: no such reader or path, or, while reading, a file that is malformed.
    """
    reader, separator, path = spec.partition(":")
    if reader == "auto":
        if base.name != "pocket":
            raise UserError(
                f"Base {base.name} has no captions of its own: pass --dataset READER:PATH, such as flickr30k:data/flickr30k "
                f"(readers: {', '.join(catalog.READERS)})."
            )
        reader = "pocket"
    read = catalog.resolve(catalog.READERS, reader, "Data set reader")
    if reader == "pocket" and not path:
        return iter(read(folder))
    if not separator or not path:
        raise UserError(f"Data set {spec!r} names no path: pass --dataset {reader}:PATH.")
    location = Path(path).expanduser()
    if reader != "pocket" and not location.exists():
        raise UserError(f"Data set {spec}: {location} does not exist: pass the folder or file that holds the captions.")
    return iter(read(location, folder=folder, wanted=wanted))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into one sentence that names it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        # the position is of no use: it counts from the start of a block
        byte = error.object[error.start : error.start + 1]
        raise UserError(f"{path} is not UTF-8 text ({error.reason} {byte!r}): save it as UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or no gzip file ({error}): download it again.") from error
    except OSError as error:
        why = " ".join(str(error.strerror or error).split())[:120]  # pyarrow's reach over several lines
        raise UserError(f"{path} cannot be read ({why}): check the file.") from error


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, gzipped or not, without their ends; a damaged file raises `UserError`."""
    with reading(path):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
            for line in stream:
                yield line.rstrip("\r\n")


def image_inside(folder: Path, name: str, source: Path) -> str:
    """The absolute path of image `name` in `folder`.

    Raises:
        UserError: the name leads out of the folder.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if leaves or not posix.name or "\0" in name:
        raise UserError(f"{source} names an image outside its folder ({name[:80]!r}): remove that row, the file is not safe.")
    return str(folder.absolute() / name)


def image_folder(candidates: Iterable[Path]) -> Path | None:
    """The first folder that exists, or None where the data set is text alone."""
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def find_file(path: Path, names: Iterable[str], what: str) -> Path:
    """`path` itself where it is a file, else the first of `names` (globs) that the folder holds.

    Raises:
        UserError: none is there.
    """
    if path.is_file():
        return path
    names = list(names)
    for name in names:
        found = sorted(match for match in path.glob(name) if match.is_file())
        if found:
            return found[0]
    raise UserError(f"{path} holds no {what}: expected {' or '.join(names)} in it.")


def require_some(captions: Iterator[Caption], path: Path, shape: str) -> Iterator[Caption]:
    """`captions`, or a `UserError` that tells the expected shape where there is none, or where a caption is no text.

    JSON's escapes (``\\ud800``) and file names can hold half a character, which no file can be written with.
    """
    empty = True
    for caption in captions:
        empty = False
        try:
            f"{caption.key}{caption.image}{caption.text}{caption.split}".encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path} holds text that is not Unicode (at {caption.key[:80]!r}): save it as UTF-8.") from error
        yield caption
    if empty:
        raise UserError(f"{path} holds no caption: expected {shape}.")


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """The items under `prefix` of a JSON file, without reading the file as a whole."""
    import ijson

    with reading(path):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as stream:
                yield from ijson.items(stream, prefix, use_float=True)
        except ijson.JSONError as error:
            raise UserError(
                f"{path} is no complete JSON file ({' '.join(str(error).split())[:120]}): download it again."
            ) from error


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of `path`: itself, or all under the folder, in order."""
    return [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []


def parquet_rows(path: Path, columns: Collection[str], image_column: str | None, wanted: bool) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file; the image column is read only where images are wanted."""
    import pyarrow
    import pyarrow.parquet

    names = [column for column in columns if column != image_column or wanted]
    with reading(path):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64 if wanted else 1024, columns=names):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(
                f"{path} is no complete parquet file ({' '.join(str(error).split())[:120]}): download it again."
            ) from error


def parquet_columns(path: Path) -> list[str]:
    """The column names of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    with reading(path):
        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is no parquet file ({' '.join(str(error).split())[:120]}): download it again.") from error


def image_bytes(value: Any) -> bytes | None:
    """The file that a parquet cell holds: the hub's ``{"bytes": ..., "path": ...}``, or the bytes alone."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def split_of_name(path: Path) -> str | None:
    """The split that a shard's name tells, as the hub writes them: ``train-00000-of-00005.parquet``."""
    stem = path.name.split("-")[0].split(".")[0].lower()
    return {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}.get(stem)


def take_out(folder: Path, name: str, content: bytes | None, source: Path) -> str:
    """Write an archive's image to ``folder/name`` (once) where `content` is given; its path either way."""
    target = Path(image_inside(folder, name, source))
    try:
        if content is not None and not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.part")
            temporary.write_bytes(content)
            temporary.replace(target)
    except OSError as error:  # the disk is full, or the archive's names are too long or name a file and a folder alike
        raise UserError(f"{target} of {source} cannot be written ({error.strerror or error}).") from error
    return str(target)
