"""What data sets call their captions, images and splits, and how a caption is taken from a cell of any of their kinds."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

from sd_erase.captions.caption import Tally
from sd_erase.errors import UserError
from sd_erase.terminal import one_line

# in the order in which one is taken where there are several
TEXT = ("caption", "captions", "raw", "sentences", "text", "texts", "sentence", "sentences_raw", "comment", "prompt", "alt_text")
IMAGE = ("image", "file_name", "filename", "image_name", "image_path", "img_path", "filepath", "path", "img")
_SPLITS = {"train": "train", "restval": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val", "test": "test"}


def column_of(names: Iterable[str], known: Iterable[str]) -> str | None:
    """The first of `known` among `names`, as it is spelt there (LAION writes TEXT)."""
    spelt = {str(name).strip().lower(): name for name in reversed(list(names))}
    return next((spelt[name] for name in known if name in spelt), None)


def note_other_texts(names: Iterable[str], chosen: str, source: Any, tally: Tally) -> None:
    """Say it where a row has captions under several names, of which one is read."""
    others = [name for name in names if name != chosen and str(name).lower() in TEXT]
    if others:
        tally.note(f"{source} has captions in {chosen} and {', '.join(others)}: {chosen} is read.")


def texts_of(value: Any, file: Any, place: str, tally: Tally, what: str = "caption") -> list[tuple[int, str]]:
    """The captions of a cell by their number in it: a text, a list of texts, or of Karpathy's ``{"raw": ...}``.

    Args:
        file, place: where the cell stands, such as "line 3".

    Raises:
        UserError: it is neither.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        tally.skip("null captions", place)
        return []
    items = value if isinstance(value, (list, tuple)) else [value]
    texts = []
    for number, item in enumerate(items):
        text = item.get("raw") if isinstance(item, Mapping) else item
        if text is None:
            tally.skip("null captions", place)
        elif not isinstance(text, str):
            raise UserError(
                f"{file}, {place}: {one_line(what)} must be text or a list of texts, not {type(text).__name__}: write it in quotes."
            )
        else:
            texts.append((number, text.strip()))
    return texts


def caption_column(row: Mapping[str, Any], file: Any, place: str, tally: Tally) -> str | None:
    """The name under which an object has its caption; None where it has none, which is counted."""
    filled = [name for name in row if row[name] is not None]
    column = column_of(filled, TEXT)
    if column is not None:
        note_other_texts(filled, column, file, tally)
    elif column_of(row, TEXT) is not None:
        tally.skip("null captions", place)
    else:
        tally.skip("rows without a caption", f"{place}, which has {', '.join(map(str, row))[:60] or 'nothing'}")
    return column


def image_of(row: Mapping[str, Any], file: Any, place: str) -> str | None:
    """The image's path that an object names.

    Raises:
        UserError: it is no text.
    """
    column = column_of([name for name in row if row[name]], IMAGE)
    if column is None:
        return None
    if not isinstance(row[column], str):
        raise UserError(f"{file}, {place}: the image must be a path relative to the file: write images/a.jpg, for example.")
    return str(row[column])


def split_of(value: Any) -> str | None:
    """The split that a cell names, by one spelling."""
    return _SPLITS.get(str(value), str(value)) if value else None


def image_name(value: str) -> str:
    """An image's name by which captions know that they share it, however its path is spelt."""
    return posixpath.normpath(value)
