"""Prompt files: plain text, CSV and TSV, JSON and JSON Lines, each read by the rules of its own format.

Nothing of a file is dropped in silence: what cannot be a prompt is an error that names the line, what the formats allow to be
left out (comments, blank lines, rows with an empty prompt) is counted, and what would change the images (guidance, sizes,
steps, options behind ``--``) but is not read from a list is named in `PromptList.notes`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from sd_erase import resources
from sd_erase.errors import UserError
from sd_erase.terminal import one_line

MAX_FILE = 2**28  # bytes: what is larger is no list of prompts
MAX_PROMPT = 10_000  # characters: a text encoder reads 77 tokens
SEEDS = ("evaluation_seed", "seed", "sd_seed")  # of ESD, of most lists, of I2P
# columns that say how the images of a published list were drawn; ours are all drawn alike
SETTINGS = frozenset(
    prefix + name
    for prefix in ("", "sd_")
    for name in (
        "guidance", "guidance_scale", "cfg", "cfg_scale", "image_width", "image_height", "width", "height", "steps", "step",
        "num_inference_steps", "sampler", "scheduler", "model", "negative_prompt", "clip_skip",
    )
)  # fmt: skip
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_SUFFIXES = {
    **dict.fromkeys(("", ".txt", ".text", ".list", ".prompt", ".prompts"), "text"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    **dict.fromkeys((".jsonl", ".ndjson"), "json lines"),
    ".json": "json",
}
_WHOLE = re.compile(r"\+?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
# what kohya's and A1111's own prompt files, and Midjourney's, write behind a prompt
_OPTION = re.compile(
    r"(?:^|\s)--(?:prompt|negative_prompt|no|n|w|h|d|s|l|g|ar|seed|steps|width|height|cfg_scale|stylize|v)(?=\s|$)"
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, with a seed of its own where its file gives one."""

    text: str
    seed: int | None = None


class PromptList(list[Prompt]):
    """The prompts of one file, in its order, repeated ones too.

    Attributes:
        skipped: how many of what was passed over ("comments", "blank lines", "rows without a prompt").
        notes: what a user should know of it, one sentence each.
    """

    def __init__(self, prompts: Iterable[Prompt] = (), skipped: dict[str, int] | None = None, notes: Iterable[str] = ()):
        super().__init__(prompts)
        self.skipped = skipped or {}
        self.notes = tuple(notes)


@dataclass
class _File:
    """A prompts file while it is read: its text, and what was passed over in it."""

    path: Path
    text: str
    unit: str = "line"  # what its rows are counted in
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    empty: int | None = None  # the first row without a prompt

    def refusal(self, why: str, line: int | None = None) -> UserError:
        return UserError(f"Prompts file {self.path}{'' if line is None else f', {self.unit} {line},'} {why}")

    def without_prompt(self, line: int) -> None:
        """Count a row whose prompt is empty."""
        self.skipped["rows without a prompt"] += 1
        self.empty = line if self.empty is None else self.empty

    def lines(self) -> Iterator[tuple[int, str]]:
        r"""The lines with their numbers, without their ends: ``\n``, ``\r\n`` or ``\r``, and no other character."""
        return enumerate((line.removesuffix("\n") for line in io.StringIO(self.text, newline=None)), 1)


_Row = tuple[int, str, int | None]  # the line, the prompt, its seed


def is_text(path: Path) -> bool:
    """Whether a file of this name is read as one prompt a line."""
    return _SUFFIXES.get(path.suffix.lower()) == "text"


def read_prompts(path: str | Path) -> PromptList:
    r"""The prompts of a file.

    * text: one a line; a line that starts with ``#`` is a comment.
    * ``.csv`` and ``.tsv``: a column ``prompt``, and ``evaluation_seed``, ``seed`` or ``sd_seed`` where it has one, as the lists of
      ESD, AdvUnlearn, Concept Ablation and I2P; the header tells whether commas, semicolons or tabs divide it.
    * ``.jsonl`` and ``.json``: texts, or objects with the same names.

    Args:
        path: a file, or the name of a bundled list ("apple", "prompts/apple.txt").

    Raises:
        UserError: the file is missing, of another kind, damaged, has no prompt, or a row cannot be read without a doubt.
    """
    if str(path) and resources.is_special(os.path.expanduser(path)):
        raise UserError(
            f"Prompts file {path} is no regular file, and later commands read it again: save the prompts to a .txt file."
        )
    found = resources.find("prompts", path)
    kind = _SUFFIXES.get(found.suffix.lower())
    if kind is None:
        raise UserError(
            f"Prompts file {found} is of no kind that is read ({found.suffix}): pass a .txt file of one prompt a line, or .csv, .tsv, "
            ".json or .jsonl."
        )
    file = _File(found, _text_of(found))
    read = {"text": _from_text, "table": _from_table, "json lines": _from_json_lines, "json": _from_json}[kind]
    prompts = [Prompt(text, seed) for _, text, seed in _checked(file, read(file))]
    if not prompts:
        passed = ", ".join(f"{count} {what}" for what, count in file.skipped.items())
        raise file.refusal(f"holds no prompt{f' ({passed})' if passed else ''}: write one a line ('#' starts a comment).")
    if file.empty is not None:
        number = _count(file.skipped["rows without a prompt"], "row")
        file.notes.append(f"{found}: {number} without a prompt skipped (the first is {file.unit} {file.empty}).")
    options = sum(bool(_OPTION.search(prompt.text)) for prompt in prompts)
    if options:
        file.notes.append(
            f"{found}: {options} prompts hold options behind `--`, which are read as words: take them out, and pass a CSV file with the "
            "columns prompt and seed where each has a seed of its own."
        )
    return PromptList(prompts, dict(file.skipped), file.notes)


def read_prompt_files(paths: Iterable[str | Path]) -> tuple[list[Prompt], list[dict[str, Any]], list[str]]:
    """The prompts of several files, a row for each file (``file``, ``prompts``, ``skipped``), and all notes."""
    lists = [(str(path), read_prompts(path)) for path in paths]
    prompts = [prompt for _, one in lists for prompt in one]
    rows = [{"file": name, "prompts": len(one), "skipped": one.skipped} for name, one in lists]
    notes = [note for _, one in lists for note in one.notes]
    again = len(prompts) - len(set(prompts))
    if again:
        notes.append(
            f"{again} of {len(prompts)} prompts repeat another one with the same seed: their images are the same and count as often; pass "
            "each once, or a CSV file with the columns prompt and seed."
        )
    return prompts, rows, notes


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"Prompts file {path} is larger than {MAX_FILE >> 20} MB: pass a list of prompts.")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Prompts file {path} cannot be read ({error.strerror or error}): check the file.") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"Prompts file {path} is UTF-16 text: save it as UTF-8 (Windows: Save as, Encoding UTF-8).")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        byte = content[error.start : error.start + 1]
        raise UserError(f"Prompts file {path}, line {line}, is not UTF-8 text ({byte!r}): save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(
            f"Prompts file {path}, line {1 + text[: text.index(chr(0))].count(chr(10))}, holds a NUL: it is no text file; pass one that is."
        )
    return text


def _checked(file: _File, rows: Iterable[_Row]) -> Iterator[_Row]:
    for line, text, seed in rows:
        if len(text) > MAX_PROMPT:
            raise file.refusal(f"holds a prompt of {len(text):,} characters, {MAX_PROMPT:,} is the most: shorten it.", line)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character
            raise file.refusal("holds half a character (a lone surrogate): save it as UTF-8.", line) from error
        yield line, text, seed


# --- text ------------------------------------------------------------------------------------------------------------


def _from_text(file: _File) -> Iterator[_Row]:
    comments: list[tuple[int, str]] = []  # those that may have been meant as prompts
    any_prompt = False
    for line, whole in file.lines():
        text = whole.strip(" \t")
        if not text.strip():
            file.skipped["blank lines"] += 1
        elif text.startswith("#"):
            file.skipped["comments"] += 1
            if any_prompt or text[1:2].strip("# !-"):  # "#sunset", or amid the prompts: not the head of a list
                comments.append((line, text))
        else:
            if not any_prompt:
                _refuse_other_formats(file, line, text)
            any_prompt = True
            yield line, text, None
    if comments:
        line, text = comments[0]
        file.notes.append(
            f"{file.path}: {_count(len(comments), 'line')} that start with # are taken for comments, not for prompts (the first is line "
            f"{line}, {text[:40]!r}): write such prompts into a CSV file with the column prompt."
        )


def _refuse_other_formats(file: _File, line: int, text: str) -> None:
    """A table or JSON under the name of a text file must not be drawn as if its first line was a prompt."""
    for delimiter in _DELIMITERS:
        cells = [cell.strip(' "').lower() for cell in text.split(delimiter)]
        if "prompt" in cells and all(re.fullmatch(r"\w*", cell) for cell in cells):
            raise file.refusal(f"is the header of a table ({text[:60]!r}): name the file .csv.", line)
    if text in ("{", "["):
        raise file.refusal("holds JSON: name the file .json.", line)
    if text[0] in "{[":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        kind = ".jsonl" if isinstance(value, dict) or file.text.count("\n") > 1 else ".json"
        raise file.refusal(f"holds JSON: name the file {kind}.", line)


# --- tables ----------------------------------------------------------------------------------------------------------


def _from_table(file: _File) -> Iterator[_Row]:
    stream = io.StringIO(file.text, newline="")  # as csv asks for: it finds the ends of rows itself
    offset, declared = 0, ""
    if match := re.match(r"sep=([,;\t|])\r?\n", file.text):  # Excel's own first line
        declared, offset = match[1], 1
        stream.seek(match.end())
    start, line = stream.tell(), 1 + offset
    delimiter = declared or _delimiter_of(stream)
    stream.seek(start)
    rows = csv.reader(stream, delimiter=delimiter, strict=True)
    columns: _Columns | None = None
    try:
        for row in rows:
            begun, line = line, offset + rows.line_num + 1
            if not any(cell.strip() for cell in row) and (columns is None or len(row) < 2):
                file.skipped["blank lines"] += 1
            elif columns is None:
                columns = _Columns.of(file, [cell.strip(" \t\r\n") for cell in row], delimiter)
            else:
                columns.check(file, row, begun)
                text = row[columns.prompt].strip(" \t\r\n")
                if not text.strip():
                    file.without_prompt(begun)
                    continue
                seed = row[columns.seed] if columns.seed is not None and columns.seed < len(row) else None
                yield begun, text, _seed(file, begun, seed)
    except csv.Error as error:
        raise file.refusal(f"is no valid CSV ({error}): close or double its quotes.", line) from error
    if columns is None:
        return
    _note_settings(file, columns.names)


def _delimiter_of(stream: io.StringIO) -> str:
    """What divides the header so that one of its cells is "prompt"; a comma where nothing does."""
    start = stream.tell()
    for delimiter in _DELIMITERS:
        stream.seek(start)
        try:
            header = next((row for row in csv.reader(stream, delimiter=delimiter, strict=True) if any(row)), [])
        except csv.Error:
            continue
        if "prompt" in (cell.strip().lower() for cell in header):
            return delimiter
    return ","


@dataclass(frozen=True)
class _Columns:
    """Where a table's prompts and seeds stand."""

    names: list[str]
    delimiter: str
    prompt: int
    seed: int | None

    @classmethod
    def of(cls, file: _File, header: list[str], delimiter: str) -> _Columns:
        names = [cell.lower() for cell in header]
        if "prompt" not in names:
            shown = ", ".join(repr(name[:40]) for name in header[:20] if name) or "none"
            raise file.refusal(f"has no column 'prompt' (its first row names {shown}): write the names of the columns there.")
        twice = [name for name in ("prompt", *SEEDS) if names.count(name) > 1]
        if twice:
            raise file.refusal(f"names the column {twice[0]!r} twice: rename one.")
        seeds = [name for name in SEEDS if name in names]
        if len(seeds) > 1:
            file.notes.append(f"{file.path} has the columns {' and '.join(seeds)}: the seeds of {seeds[0]} are used.")
        return cls(names, delimiter, names.index("prompt"), names.index(seeds[0]) if seeds else None)

    def check(self, file: _File, row: list[str], line: int) -> None:
        """Refuse a row whose cells are not those of the header: a prompt would be cut, or two rows read as one."""
        needed = max(number for number, name in enumerate(self.names, 1) if name)
        what = f"has {_count(len(row), 'cell')}, the header names {len(self.names)}"
        if any(cell.strip() for cell in row[len(self.names) :]):
            divider = _DELIMITERS[self.delimiter]
            raise file.refusal(f'{what}: put a prompt that holds a {divider} into double quotes ("...").', line)
        if len(row) < needed:
            raise file.refusal(f'{what}: add what is missing; a prompt of several lines stands in double quotes ("...").', line)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _from_json_lines(file: _File) -> Iterator[_Row]:
    for line, text in file.lines():
        if text.strip():
            yield from _from_value(file, line, _parsed(file, text, line))
        else:
            file.skipped["blank lines"] += 1


def _from_json(file: _File) -> Iterator[_Row]:
    file.unit = "entry"
    values = _parsed(file, file.text, None)
    if isinstance(values, dict):
        known = next((name for name in values if name.lower() in ("prompts", "prompt")), None)
        if known is None or not isinstance(values[known], list):
            names = one_line(", ".join(str(name)[:40] for name in list(values)[:8])) or "no name"
            raise file.refusal(
                f"is no list of prompts (an object with {names}): pass a list of texts, or of objects with prompt and seed."
            )
        values = values[known]
    if not isinstance(values, list):
        raise file.refusal("is no list of prompts: pass a list of texts, or of objects with prompt and seed.")
    for number, value in enumerate(values, 1):
        yield from _from_value(file, number, value)


def _parsed(file: _File, text: str, line: int | None) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise file.refusal("names a key twice in one object: remove one.", line)
        return values

    try:
        return json.loads(text, object_pairs_hook=once)
    except UserError:
        raise
    except ValueError as error:
        raise file.refusal(f"is no JSON ({' '.join(str(error).split())[:120]}): mend it there.", line) from error
    except RecursionError as error:
        raise file.refusal("is nested too deeply: pass a list of prompts.", line) from error


def _from_value(file: _File, line: int, value: Any) -> Iterator[_Row]:
    if isinstance(value, dict):
        row = {key.lower(): item for key, item in value.items()}
        if len(row) < len(value):
            raise file.refusal("names a key twice in one object: remove one.", line)
        if "prompt" not in row:
            raise file.refusal(f"has no 'prompt' (it has {one_line(', '.join(list(row)[:8])[:200]) or 'nothing'}): add it.", line)
        value = row["prompt"]
        seeds = [name for name in SEEDS if row.get(name) is not None]
        if len(seeds) > 1 and not any("are used" in note for note in file.notes):
            file.notes.append(f"{file.path} has {' and '.join(seeds)}: the seeds of {seeds[0]} are used.")
        seed = _seed(file, line, str(row[seeds[0]])) if seeds else None
        _note_settings(file, row)
    else:
        seed = None
    if value is None or isinstance(value, str) and not value.strip():
        file.without_prompt(line)
    elif not isinstance(value, str):
        raise file.refusal(f"holds a prompt that is no text ({str(value)[:40]}): write it in quotes.", line)
    else:
        yield line, value.strip(" \t\r\n"), seed


# --- what tables and JSON share --------------------------------------------------------------------------------------


def _seed(file: _File, line: int, cell: str | None) -> int | None:
    text = (cell or "").strip()
    if not text:
        return None
    # pandas writes a column with gaps as 4068.0
    value = Decimal(text) if _WHOLE.fullmatch(text) else None
    if value is None or value >= 2**63 or value != value.to_integral_value():
        raise file.refusal(
            f"has the seed {text[:40]!r}, which is no whole number from 0 to 2^63 - 1: correct or remove it.", line
        )
    return int(value)


def _note_settings(file: _File, names: Iterable[str]) -> None:
    found = [name for name in names if name in SETTINGS]
    if found and not any("are not read" in note for note in file.notes):
        file.notes.append(
            f"{file.path}: {', '.join(found)} are not read: all prompts are drawn with the run's own settings (--guidance, --width, "
            "--height, --steps, --negative-prompt)."
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
