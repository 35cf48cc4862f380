"""Parquet files, and Arrow ones as `datasets` saves them: of captions, with or without their images (the hub's, LAION's, img2dataset's)."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase.captions.caption import Caption, Keys, Tally
from sd_erase.captions.columns import TEXT, column_of, image_name, note_other_texts, split_of, texts_of
from sd_erase.captions.files import MAX_ROW, Images, peeked, reading, relative_name, take_out
from sd_erase.errors import UserError
from sd_erase.terminal import one_line

SUFFIXES = (".parquet", ".arrow")
_NAMES = ("filename", "image_name", "file_name", "image_path", "filepath", "img_id", "image_id", "key")
_PATHS = ("filename", "image_name", "file_name", "image_path", "filepath")  # of the names, those that are files
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
_STARTS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


def files_of(path: Path) -> list[Path]:
    """The parquet files of `path`, or Arrow ones as `datasets` saves them to disk: itself, or all under the folder, in order."""
    if path.suffix in SUFFIXES and path.is_file():
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


def rows_of(path: Path, columns: Collection[str], image_column: str | None, wanted: bool) -> Iterator[dict[str, Any]]:
    """Rows of a parquet or Arrow file; the image column is read only where images are wanted."""
    names = [column for column in columns if column != image_column or wanted]
    size = 64 if wanted else 1024
    with _table(path) as table:
        if path.suffix == ".arrow":
            for whole in table:
                batch = whole.select(names)
                batch.validate(full=True)  # offsets of a damaged file could lead anywhere in the memory
                for start in range(0, batch.num_rows, size):
                    yield from batch.slice(start, size).to_pylist()
            return
        for number in range(table.metadata.num_row_groups):
            group = table.metadata.row_group(number)
            if group.total_byte_size > MAX_ROW * max(1, group.num_rows):
                raise UserError(
                    f"{path} has rows of more than {MAX_ROW >> 20} MB: it is no file of captions and photos; pass another with --dataset."
                )
        for batch in table.iter_batches(batch_size=size, columns=names):
            yield from batch.to_pylist()


def schema_of(path: Path) -> Any:
    """The Arrow schema of a parquet or Arrow file."""
    with _table(path) as table:
        schema = table.schema if path.suffix == ".arrow" else table.schema_arrow
        _ = schema.names  # an error here where one is no text
        return schema


def image_bytes(value: Any) -> bytes | None:
    """The file that a cell holds: the hub's ``{"bytes": ..., "path": ...}``, or the bytes alone."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def splits_of_names(paths: Sequence[Path]) -> dict[Path, str | None]:
    """The split that each shard's name tells, as the hub writes them: ``train-00000-of-00005.parquet`` or ``train/0000.parquet``.

    Where all are of one split, that is only what the whole was called: the hub's Flickr30K is all "test".
    """
    splits = {path: _STARTS.get(_start(path)) or _STARTS.get(path.parent.name) for path in paths}
    return splits if len(set(splits.values())) > 1 else dict.fromkeys(paths)


def shard_name(path: Path) -> str:
    """What tells a shard's rows from those of the others: its name, behind its split's folder where only that has one."""
    return path.stem if _start(path) in _STARTS or path.parent.name not in _STARTS else f"{path.parent.name}-{path.stem}"


def _start(path: Path) -> str:
    return path.name.split("-")[0].split(".")[0].lower()


# --- captions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Where a file has its captions, the names of its images, the images themselves (bytes, or paths) and its splits."""

    text: str
    name: str | None
    image: str | None
    path: str | None
    split: str | None

    @classmethod
    def of(cls, file: Path, tally: Tally) -> _Columns:
        import pyarrow.types as kinds

        schema = schema_of(file)
        names = [name for name in schema.names if schema.names.count(name) == 1]
        texts = [name for name in names if column_of([name], TEXT)]
        readable = [name for name in texts if _is_text(schema.field(name).type)]
        text = column_of(readable, TEXT)
        if text is None:
            why = (
                f"its {one_line(', '.join(f'{name} is {schema.field(name).type}' for name in texts)[:120])}; it has"
                if texts
                else "it has"
            )
            raise UserError(
                f"{file} has no caption column ({why} {one_line(', '.join(schema.names)[:300])}): expected one of {', '.join(TEXT)}."
            )
        note_other_texts(readable, text, file, tally)
        strings = [name for name in names if _is_string(schema.field(name).type)]
        known = [name for name in names if name in strings or kinds.is_integer(schema.field(name).type)]
        image, path = column_of(names, _IMAGES), None
        if image is None or image in strings:
            path, image = image or column_of(strings, _PATHS), None
        return cls(text, column_of(known, _NAMES), image, path, column_of(strings, ("split",)))

    @property
    def read(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.text, self.name, self.image, self.path, self.split) if name))


def _is_string(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        return _is_string(kind.value_type)
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or "string_view" in str(kind))


def _is_text(kind: Any) -> bool:
    """Whether a column holds texts, lists of them, or Karpathy's sentences; null where all cells are."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind) or kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        return _is_text(kind.value_type)
    if kinds.is_struct(kind):
        return any(field.name == "raw" and _is_text(field.type) for field in kind)
    return _is_string(kind) or bool(kinds.is_null(kind))


def read(files: Sequence[Path], tally: Tally, folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    """The captions of parquet or Arrow files, with their images where they hold any.

    Raises:
        UserError: a file is damaged or has no caption column, which lists the columns that it has.
    """
    splits = splits_of_names(files)
    keys = Keys(tally)
    before = 0
    for file in files:
        with reading(file):  # names within a column's type may be no text
            columns = _Columns.of(file, tally)
        one = _File(file, columns, splits[file], folder if columns.image else None, wanted, keys, tally, before)
        yield from one.captions()
        before += one.rows


@dataclass
class _File:
    """One file while it is read."""

    file: Path
    columns: _Columns
    split: str | None
    folder: Path | None  # where its images are written; None where none are to be
    wanted: Collection[str] | None
    keys: Keys
    tally: Tally
    before: int  # rows of the files before it
    rows: int = 0

    def captions(self) -> Iterator[Caption]:
        image_column = self.columns.image if self.folder is not None else None
        names = [name for name in self.columns.read if name != self.columns.image or image_column]
        rows: Iterator[dict[str, Any]] = rows_of(self.file, names, image_column, self.wanted is not None)
        images = Images(self.file, self.tally)
        if self.columns.path is not None:
            first, rows = peeked(rows)
            images.look([row[self.columns.path] or "" for row in first])
        for position, row in enumerate(rows):
            yield from self._of_row(position, row, images)
            self.rows += 1

    def _of_row(self, position: int, row: dict[str, Any], images: Images) -> Iterator[Caption]:
        value = _listed(row[self.columns.text])
        texts = texts_of(value, self.file, f"{self.file.name}, row {position}", self.tally, self.columns.text)
        given = (
            row[self.columns.path or self.columns.name or self.columns.text] if self.columns.path or self.columns.name else None
        )
        name = f"{shard_name(self.file)}-{position:06d}" if given in (None, "") else relative_name(str(given), self.file.parent)
        name = image_name(name if "." in name else f"{name}.jpg")
        if given not in (None, "") and not isinstance(value, list):
            own = [
                f"{name}#{self.before + position}" for _ in texts
            ]  # a row for each caption keeps the captions of one image apart
        elif given in (None, ""):
            own = [f"{name}#{number}" for number, _ in texts]
        else:
            own = [self.keys.own(f"{name}#{number}") for number, _ in texts]
        image = images.path(str(given)) if self.columns.path and given else None
        if self.folder is not None and texts:
            chosen = self.wanted is not None and not set(own).isdisjoint(self.wanted)
            content = image_bytes(row.get(str(self.columns.image))) if chosen else None
            image = take_out(self.folder / "images", name, content, self.file)
        split = split_of(row[self.columns.split]) if self.columns.split else None
        for key, (_, text) in zip(own, texts, strict=True):
            yield Caption(key, image, text, split or self.split)


def _listed(value: Any) -> Any:
    """A list that the hub's csv-born copies hold as text, else the value itself."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        items = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets nested without end
        return value
    return items if isinstance(items, list) and items and all(isinstance(item, str) for item in items) else value
