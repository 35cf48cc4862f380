"""The one reader of the JSON files of a run, which were ours when they were written: a run may be copied, cut, edited or sent on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_erase import forms
from sd_erase.errors import UserError, shortened

MAX_DIGITS = 400  # of a whole number
# which command writes a file again, by the file's name
WRITERS = {
    "concepts.json": "harvest", "pairs.jsonl": "harvest", "metrics.jsonl": "train", "index.jsonl": "generate",
    "original.jsonl": "evaluate", "erased.jsonl": "evaluate", "evaluation.json": "evaluate", "attack.json": "attack",
}  # fmt: skip


class Row(dict[str, Any]):
    """A JSON object that says where it stands when a key is asked for that it lacks."""

    path: Path
    line: int

    def __missing__(self, key: str) -> Any:
        raise damaged(self.path, f"line {self.line} lacks {shortened(key)}")


def damaged(path: Path, reason: str) -> UserError:
    """The sentence about a file that is not as it was written."""
    writer = WRITERS.get(path.name)
    again = f"run `sd-erase {writer}` again" if writer else "run the command that wrote it again"
    return UserError(f"File {path} is damaged ({reason}): delete it and {again}.")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def parse(text: str, path: Path, where: str = "", finite: bool = True) -> Any:
    """The value of a text from the file at `path`.

    Args:
        where: the place in the file, for the error ("line 3").
        finite: whether NaN and Infinity, which are no JSON but which Python writes, are refused.

    Raises:
        UserError: it is no JSON, or holds a number that is none.
    """
    check = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, parse_int=_whole, **check)  # type: ignore[arg-type]
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except ValueError as error:
        reason = str(error)[:200]
    raise damaged(path, f"{where}: {reason}" if where else reason)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"byte {error.start} is no UTF-8") from error


def read(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    return parse(_text(path), path)


def read_as(path: Path, form: forms.Form) -> Any:
    """As `read`, of a value of a form.

    Raises:
        UserError: it has another form too.
    """
    value = read(path)
    check(value, form, path)
    return value


def check(value: object, form: forms.Form, path: Path, where: str = "it") -> None:
    """Refuse a value from the file at `path` that does not have its form; raises `UserError` with the place."""
    if bad := forms.misfit(value, form, where):
        raise damaged(path, f"{shortened(bad)[1:-1]} is missing or is not what stands there")


def read_lines(path: Path, finite: bool = True) -> Iterator[Row]:
    """The objects of a JSON Lines file, in order.

    Raises:
        FileNotFoundError: there is none.
        UserError: a line is no JSON object; asking a row for a key that it lacks, too.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise damaged(path, f"line {number} is no UTF-8") from None
            value = parse(text, path, f"line {number}", finite)
            if not isinstance(value, dict):
                raise damaged(path, f"line {number} is no object")
            row = Row(value)
            row.path, row.line = path, number
            yield row
