"""Flickr8k: a CSV with the columns image and caption, or the token file, with the images beside it."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import Caption, find_file, image_folder, image_inside, lines, require_some
from sd_erase.captions.flickr30k import _tokens
from sd_erase.errors import UserError

_LONGEST = 5  # lines of one row, above which a quotation mark was left open and swallows the rows behind it


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """The captions of Flickr8k at `path`: ``captions.csv`` / ``captions.txt`` (``image,caption``) or ``Flickr8k.token.txt``.

    Raises:
        UserError: no such file, or a malformed one.
    """
    file = find_file(path, ("captions.csv", "captions.txt", "*.csv", "Flickr8k.token.txt", "*.token.txt"), "Flickr8k captions")
    images = image_folder(file.parent / name for name in ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"))
    captions = _tokens(file, images) if ".token" in file.name else _rows(file, images)
    yield from require_some(captions, file, "`image,caption` rows")


def _rows(file: Path, images: Path | None) -> Iterator[Caption]:
    counts: dict[str, int] = {}
    rows = csv.reader(f"{line}\n" for line in lines(file))  # with its end, a caption of two lines keeps them apart
    try:
        header = next(rows, None)
        if header is None or [cell.strip() for cell in header[:2]] != ["image", "caption"]:
            raise UserError(f"{file} does not start with `image,caption`: pass a comma-separated file with that header.")
        before = rows.line_num
        for row in rows:
            begun, before = before + 1, rows.line_num
            if before - begun > _LONGEST:
                raise UserError(f"{file}, line {begun}: a quotation mark is closed only on line {before}: double or remove it.")
            if not row:
                continue
            if len(row) < 2:
                raise UserError(f"{file}, line {rows.line_num}: no caption after {row[0][:60]!r}; expected `image,caption`.")
            name, text = row[0].strip(), " ".join(",".join(row[1:]).split())  # an unquoted comma belongs to the caption
            number = counts[name] = counts.get(name, -1) + 1
            if text:
                yield Caption(f"{name}#{number}", image_inside(images, name, file) if images else None, text, None)
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: no CSV ({error}).") from error
