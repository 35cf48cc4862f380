"""Captions of a data set, one at a time: each reader yields `Caption` and never holds the data set in memory.

A caption's key is ``IMAGE#NUMBER``, so that an image is known by its key even where only the text is there. Readers whose
images lie inside another file (parquet, tar, CIFAR) name the file under ``folder`` where an image would lie, and write it
only for the keys in ``wanted``.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sd_erase import catalog
from sd_erase.errors import UserError
from sd_erase.folders import replacing

if TYPE_CHECKING:
    from sd_erase.bases import Base
    from sd_erase.concepts import Concept


MAX_TEXT = 2**20  # characters of a line or a text: what is longer is no caption, and could fill the memory
MAX_ROW = 2**28  # bytes of one row or of one file in an archive
# where a reader's data set lies on the hub, as parquet: data sets that are scripts are loaded no more
HUB = {"flickr30k": "lmms-lab/flickr30k", "cifar100": "uoft-cs/cifar100"}


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


def choose_dataset(spec: str, base: Base, concepts: Iterable[Concept]) -> str:
    """`spec`, or what "auto" stands for: the pocket base's own scenes for objects, else synthetic captions."""
    if spec != "auto":
        return spec
    return "pocket" if base.name == "pocket" and all(concept.kind == "object" for concept in concepts) else "synthetic"


def open_dataset(
    spec: str, base: Base, folder: Path, wanted: Collection[str] | None = None, concepts: Sequence[Concept] = (), seed: int = 0
) -> Iterator[Caption]:
    """The captions of ``READER:PATH`` (or of ``auto``, ``pocket`` and ``synthetic``, which need no path).

    Args:
        base: what "auto" depends on, and what tells the words of synthetic captions apart.
        folder: where a reader may put files (rendered scenes, images taken out of archives).
        wanted: keys whose images are to be taken out of archives; None takes none.
        concepts, seed: what synthetic captions are made of.

    Raises:
        UserError: no such reader or path, or, while reading, a file that is malformed.
    """
    spec = choose_dataset(spec, base, concepts)
    reader, _, path = spec.partition(":")
    read = catalog.resolve(catalog.READERS, reader, "Data set reader")
    if reader == "synthetic" and path:
        raise UserError(f"Data set {spec}: synthetic captions are made, not read; pass --dataset synthetic without a path.")
    if reader in ("pocket", "synthetic") and not path:
        return iter(read(folder, concepts=concepts, seed=seed, base=base))
    if not path and reader not in HUB:
        raise UserError(f"Data set {spec!r} names no path: pass --dataset {reader}:PATH.")
    location = Path(path).expanduser()
    if reader in HUB and (not path or re.fullmatch(r"[\w\-]+/[\w.\-]+", path) and not location.exists()):
        location = from_hub(path or HUB[reader])
    if reader != "pocket" and not location.exists():
        raise UserError(f"Data set {spec}: {location} does not exist: pass the folder or file that holds the captions.")
    return iter(read(location, folder=folder, wanted=wanted))


def from_hub(identifier: str) -> Path:
    """The local folder of a hub data set's parquet files, fetched where they are not there yet.

    Raises:
        UserError: the hub cannot be reached, has no such data set, or none of parquet files.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(identifier, repo_type="dataset", allow_patterns=["*.parquet"]))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are of these kinds
        raise UserError(
            f"Data set {identifier} is no local path and cannot be fetched from the hub ({type(error).__name__}): pass the folder of "
            "its parquet files."
        ) from error
    if not parquet_files(folder):
        raise UserError(f"Data set {identifier} of the hub holds no parquet file: pass another one, or a local folder.")
    return folder


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
            while line := stream.readline(MAX_TEXT):
                if len(line) == MAX_TEXT:
                    raise UserError(f"{path} has a line of {MAX_TEXT:,} characters or more: it is no caption file.")
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


class _Texts:
    """A JSON stream whose texts end: the parser would collect one without end until the memory is full."""

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path, self._since = stream, path, 0

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        quote = block.rfind(b'"')
        self._since = self._since + len(block) if quote < 0 else len(block) - quote
        if self._since > MAX_TEXT:
            raise UserError(f"{self._path} has a value of more than {MAX_TEXT:,} bytes: it is no caption file.")
        return block


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """The items under `prefix` of a JSON file, without reading the file as a whole."""
    import ijson

    with reading(path):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as stream:
                yield from ijson.items(_Texts(stream, path), prefix, use_float=True)
        except ijson.JSONError as error:
            why = error.args[0] if error.args else ""  # bytes where the text is not UTF-8
            readable = why.decode("ascii", errors="replace") if isinstance(why, bytes) else str(why)
            advice = "save it as UTF-8" if isinstance(why, bytes) else "download it again"
            raise UserError(f"{path} is no complete JSON file ({' '.join(readable.split())[:120]}): {advice}.") from error


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of `path`, or Arrow ones as `datasets` saves them to disk: itself, or all under the folder, in order."""
    if path.suffix in (".parquet", ".arrow"):
        return [path]
    if not path.is_dir():
        return []
    return sorted(path.rglob("*.parquet")) or sorted(file for file in path.rglob("*.arrow") if not file.name.startswith("cache-"))


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """A parquet file or an Arrow stream, open."""
    import pyarrow
    import pyarrow.parquet

    with reading(path):
        try:
            if path.suffix == ".arrow":
                with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
                    yield stream
            else:
                with pyarrow.parquet.ParquetFile(path) as file:
                    yield file
        except pyarrow.ArrowException as error:
            kind = path.suffix.removeprefix(".")
            raise UserError(
                f"{path} is no complete {kind} file ({' '.join(str(error).split())[:120]}): download it again."
            ) from error


def parquet_rows(path: Path, columns: Collection[str], image_column: str | None, wanted: bool) -> Iterator[dict[str, Any]]:
    """Rows of a parquet or Arrow file; the image column is read only where images are wanted."""
    names = [column for column in columns if column != image_column or wanted]
    size = 64 if wanted else 1024
    with _table(path) as table:
        if path.suffix == ".arrow":
            for batch in table:
                for start in range(0, batch.num_rows, size):
                    yield from batch.select(names).slice(start, size).to_pylist()
            return
        for number in range(table.metadata.num_row_groups):
            group = table.metadata.row_group(number)
            if group.total_byte_size > MAX_ROW * max(1, group.num_rows):
                raise UserError(f"{path} has rows of more than {MAX_ROW >> 20} MB: it is no file of captions and photos.")
        for batch in table.iter_batches(batch_size=size, columns=names):
            yield from batch.to_pylist()


def parquet_schema(path: Path) -> Any:
    """The Arrow schema of a parquet or Arrow file."""
    with _table(path) as table:
        return table.schema if path.suffix == ".arrow" else table.schema_arrow


def image_bytes(value: Any) -> bytes | None:
    """The file that a parquet cell holds: the hub's ``{"bytes": ..., "path": ...}``, or the bytes alone."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


def splits_of_names(paths: Sequence[Path]) -> dict[Path, str | None]:
    """The split that each shard's name tells, as the hub writes them: ``train-00000-of-00005.parquet`` or ``train/0000.parquet``.

    Where all are of one split, that is only what the whole was called: the hub's Flickr30K is all "test".
    """
    splits = {path: _SPLITS.get(_start(path)) or _SPLITS.get(path.parent.name) for path in paths}
    return splits if len(set(splits.values())) > 1 else dict.fromkeys(paths)


def shard_name(path: Path) -> str:
    """What tells a shard's rows from those of the others: its name, behind its split's folder where only that has one."""
    return path.stem if _start(path) in _SPLITS or path.parent.name not in _SPLITS else f"{path.parent.name}-{path.stem}"


def _start(path: Path) -> str:
    return path.name.split("-")[0].split(".")[0].lower()


def take_out(folder: Path, name: str, content: bytes | None, source: Path) -> str:
    """Write an archive's image to ``folder/name`` (once) where `content` is given; its path either way."""
    target = Path(image_inside(folder, name, source))
    try:
        if content is not None and not target.is_file():
            with replacing(target) as temporary:
                temporary.write_bytes(content)
    except OSError as error:  # the disk is full, or the archive's names are too long or name a file and a folder alike
        raise UserError(f"{target} of {source} cannot be written ({error.strerror or error}).") from error
    return str(target)
