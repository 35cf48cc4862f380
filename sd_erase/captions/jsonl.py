"""JSON Lines: one object a line with a caption, and where there is one the image's path relative to the file."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import Caption, find_file, image_inside, lines, require_some
from sd_erase.errors import UserError

_TEXT = ("caption", "text", "captions", "prompt")
_IMAGE = ("image", "file_name", "image_path", "path")


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """Captions of a ``.jsonl`` file (also .gz): keys caption/text/captions, image/file_name, split, key.

    Raises:
        UserError: no such file, or a line that is no such object.
    """
    file = find_file(path, ("metadata.jsonl", "*.jsonl", "*.jsonl.gz"), "JSON Lines file")
    yield from require_some(_captions(file), file, 'lines such as {"image": "1.jpg", "caption": "..."}')


def _captions(file: Path) -> Iterator[Caption]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: no JSON ({error}).") from error
        except RecursionError as error:
            raise UserError(f"{file}, line {number}: JSON nested too deeply.") from error
        column = next((name for name in _TEXT if name in row), None) if isinstance(row, dict) else None
        if column is None:
            raise UserError(f"{file}, line {number}: no caption; expected an object with one of {', '.join(_TEXT)}.")
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file}, line {number}: {column} must be text or a list of texts.")
        image = next((row[name] for name in _IMAGE if row.get(name)), None)
        if image is not None and not isinstance(image, str):
            raise UserError(f"{file}, line {number}: the image must be a path relative to the file.")
        # lines about one image must share its name, or one of them could forget what another retains
        name = posixpath.normpath(image) if image else str(row.get("key") or f"{number:09d}")
        split = row.get("split")
        for position, text in enumerate(texts):
            if text.strip():
                # the line's number keeps several lines about one image apart
                key = f"{name}#{number}" if len(texts) == 1 else f"{name}#{number}.{position}"
                yield Caption(key, image_inside(file.parent, image, file) if image else None, text.strip(), split and str(split))
