"""JSON Lines: one object a line with a caption, and where there is one the image's path relative to the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions.caption import Caption, Tally
from sd_erase.captions.columns import TEXT, caption_column, image_name, image_of, split_of, texts_of
from sd_erase.captions.files import image_inside, lines, relative_name
from sd_erase.errors import UserError


def read(file: Path, tally: Tally) -> Iterator[Caption]:
    """The captions of a ``.jsonl`` file (also gzipped).

    Raises:
        UserError: a line that is no such object.
    """
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            tally.skip("blank lines", f"line {number}", quiet=True)
            continue
        place = f"line {number}"

        def table(pairs: list[tuple[str, Any]], place: str = place) -> dict[str, Any]:
            values = dict(pairs)
            if len(values) < len(pairs):
                tally.keep("objects that name a key twice, of which the last is read", place)
            return values

        try:
            row = json.loads(line, object_pairs_hook=table)
        except ValueError as error:
            raise UserError(
                f"{file}, {place}: no JSON ({' '.join(str(error).split())[:120]}): mend or remove that line."
            ) from error
        except RecursionError as error:
            raise UserError(f"{file}, {place}: JSON nested too deeply: remove that line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: no caption; expected an object with one of {', '.join(TEXT)}.")
        yield from captions_of_row(row, number, place, file, tally)


def captions_of_row(row: dict[str, Any], number: int, place: str, file: Path, tally: Tally) -> Iterator[Caption]:
    """The captions of one object, whose image lies beside `file`."""
    column = caption_column(row, file, place, tally)
    if column is None:
        return
    image = image_of(row, file, place)
    # lines about one image must share its name, or one of them could forget what another retains
    name = image_name(relative_name(image, file.parent)) if image else str(row.get("key") or f"{number:09d}")
    path = image_inside(file.parent, relative_name(image, file.parent), file) if image else None
    single = not isinstance(row[column], list) or len(row[column]) == 1
    for position, text in texts_of(row[column], file, place, tally, column):
        # the line's number keeps several lines about one image apart
        key = f"{name}#{number}" if single else f"{name}#{number}.{position}"
        yield Caption(key, path, text, split_of(row.get("split")))
