"""Flickr30K in its five shapes: the token file (also gzipped), Karpathy's JSON, the mirror's results.csv, parquet."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import (
    Caption,
    find_file,
    image_bytes,
    image_folder,
    image_inside,
    json_items,
    lines,
    parquet_files,
    parquet_rows,
    parquet_schema,
    require_some,
    shard_name,
    splits_of_names,
    take_out,
)
from sd_erase.errors import UserError

_NAMES = ("results_20130124*.token", "results_20130124*.token.gz", "*.token", "*.token.gz", "dataset_flickr30k.json", "results.csv",
          "*/dataset_flickr30k.json", "*/results.csv")  # fmt: skip
_BROKEN_SHARE = 0.01  # rows that are no caption, above which the file is taken for another format


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """The captions of Flickr30K at `path`: one of its files, or a folder that holds one.

    Images are looked for in ``flickr30k-images/`` beside the file; without that folder the data set is text alone.

    Raises:
        UserError: no known file, or a malformed one.
    """
    shards = parquet_files(path)
    if shards:
        yield from require_some(_parquet(shards, folder, wanted), path, "rows with an image, its file name and captions")
        return
    file = find_file(path, _NAMES, "Flickr30K captions")
    images = image_folder(file.parent / name for name in ("flickr30k-images", "flickr30k_images", "images"))
    if file.name.endswith(".json"):
        captions = _karpathy(file, images)
    elif file.suffix == ".csv":
        captions = _results(file, images)
    else:
        captions = _tokens(file, images)
    yield from require_some(captions, file, "lines such as `1000092795.jpg#0<TAB>Two young guys ...`")


def _tokens(file: Path, images: Path | None) -> Iterator[Caption]:
    bad = good = 0
    for line in lines(file):
        key, tab, text = line.partition("\t")
        name, mark, number = key.rpartition("#")
        text = text.strip()
        if not tab or not mark or not number.isdigit() or not text:
            if line.strip():
                bad += 1
                _too_many(file, bad, good, "`NAME.jpg#0<TAB>caption`")
            continue
        good += 1
        # the official file writes a few names as 1000.jpg.jpg#r0: the part before # is the name as it is on disk
        yield Caption(key, image_inside(images, name, file) if images else None, text, None)
    _too_many(file, bad, good, "`NAME.jpg#0<TAB>caption`", final=True)


def _too_many(file: Path, bad: int, good: int, shape: str, final: bool = False) -> None:
    if bad and (final or bad >= 10) and bad > _BROKEN_SHARE * (bad + good) + (1 if good else 0):
        raise UserError(f"{file} has {bad} of {bad + good} rows that are not {shape}: pass a file of that form.")


def _karpathy(file: Path, images: Path | None) -> Iterator[Caption]:
    splits = {"restval": "train"}
    for row in json_items(file, "images.item"):
        try:
            name, split = str(row["filename"]), str(row.get("split") or "") or None
            texts = [sentence["raw"].strip() for sentence in row["sentences"]]
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is not Karpathy's form (a bad image: {error}): pass dataset_flickr30k.json.") from error
        image = image_inside(images, name, file) if images else None
        for number, text in enumerate(texts):
            if text:
                yield Caption(f"{name}#{number}", image, text, splits.get(split or "", split))


def _results(file: Path, images: Path | None) -> Iterator[Caption]:
    bad = good = 0
    for position, line in enumerate(lines(file)):
        cells = [cell.strip() for cell in line.split("|", 2)]
        if position == 0 and cells[0] == "image_name":
            continue
        if len(cells) == 2:  # the mirror's one broken row: "2199200615.jpg| 4   A dog runs across the grass ."
            number, _, text = cells[1].partition(" ")
            cells = [cells[0], number, text.strip()]
        if len(cells) != 3 or not cells[1].isdigit() or not cells[2]:
            if line.strip():
                bad += 1
                _too_many(file, bad, good, "`image_name| comment_number| comment`")
            continue
        good += 1
        name, number, text = cells
        yield Caption(f"{name}#{number}", image_inside(images, name, file) if images else None, text, None)
    _too_many(file, bad, good, "`image_name| comment_number| comment`", final=True)


def _parquet(shards: list[Path], folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    splits = splits_of_names(shards)
    for shard in shards:
        names = parquet_schema(shard).names
        text_column = next((name for name in ("caption", "captions", "raw", "sentences", "text") if name in names), None)
        name_column = next(
            (name for name in ("filename", "image_name", "file_name", "img_id", "image_id") if name in names), None
        )
        image_column = "image" if "image" in names and folder is not None else None
        if text_column is None:
            raise UserError(f"{shard} has no caption column (it has {', '.join(names)}): expected caption, filename and image.")
        columns = [column for column in (text_column, name_column, image_column, "split" if "split" in names else None) if column]
        for position, row in enumerate(parquet_rows(shard, columns, image_column, wanted is not None)):
            name = str(row[name_column]) if name_column and row[name_column] else f"{shard_name(shard)}-{position:06d}.jpg"
            name = name if "." in name else f"{name}.jpg"
            split = str(row.get("split") or splits[shard] or "") or None
            texts = _texts(row[text_column])
            # a row for each caption: its position keeps the captions of one image apart
            is_alone = name_column is not None and isinstance(row[text_column], str) and len(texts) == 1
            numbers = [position] if is_alone else range(len(texts))
            keys = [f"{name}#{number}" for number in numbers]
            image = None
            if image_column and folder is not None:
                content = row.get("image") if wanted is not None and not set(keys).isdisjoint(wanted) else None
                image = take_out(folder / "images", name, image_bytes(content), shard)
            for key, text in zip(keys, texts, strict=True):
                if text:
                    yield Caption(key, image, text, {"restval": "train"}.get(split or "", split))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str) and value.startswith("["):  # the hub's csv-born copies hold the list as text
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets nested without end
            value = [value]
    items = value if isinstance(value, (list, tuple)) else [value]
    return [str(item.get("raw", "") if isinstance(item, dict) else item or "").strip() for item in items]
