"""Captions in lines of text: tables with a header, token files, the Flickr30K mirror's CSV, and Conceptual Captions' two columns."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd_erase.captions.caption import Caption, Keys, Tally
from sd_erase.captions.columns import IMAGE, TEXT, column_of, image_name, note_other_texts, split_of
from sd_erase.captions.files import Images, ended_lines, image_inside, lines, peeked, relative_name
from sd_erase.errors import UserError
from sd_erase.terminal import one_line

URL = re.compile(r"(?:https?|ftp)://|^//", re.IGNORECASE)
TOKEN = re.compile(r"[^\t]+#r?[0-9]+\t")
PIPES = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*$")
_DELIMITERS = (",", "\t", ";", "|")
_ADDRESSES = ("url", "image_url", "img_url", "urls")
_LONGEST = 5  # lines of one row, above which a quotation mark was left open and swallows the rows behind it
_BROKEN_SHARE = 0.01  # rows that are no caption, above which the file is taken for another format


# --- tables with a header --------------------------------------------------------------------------------------------


def header_of(line: str) -> tuple[str, list[str]] | None:
    """What divides the names of a table's columns, and the names; None where the line names no caption."""
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
        except csv.Error:
            continue
        if len(names) > 1 and column_of(names, TEXT) and column_of(names, (*IMAGE, *_ADDRESSES)):
            return delimiter, names
    return None


def _likeliest(line: str) -> str:
    return max(_DELIMITERS, key=line.count)


@dataclass(frozen=True)
class _Header:
    """Where a table's captions, images and splits stand."""

    names: list[str]
    text: int
    image: int | None
    split: int | None

    @classmethod
    def of(cls, names: list[str], file: Path, tally: Tally) -> _Header:
        column = column_of(names, TEXT)
        if column is None:
            raise UserError(
                f"{file} has no caption column (its first row names {', '.join(map(repr, names))[:200]}): expected one of {', '.join(TEXT)}."
            )
        note_other_texts(names, column, file, tally)
        image, split = column_of(names, IMAGE), column_of(names, ("split",))
        return cls(names, names.index(column), *(None if name is None else names.index(name) for name in (image, split)))

    def cells(self, row: list[str], file: Path, line: int) -> tuple[str, str | None, str | None]:
        """A row's caption, image and split.

        Raises:
            UserError: the row has other cells than the header names.
        """
        if self.text == len(self.names) - 1 and len(row) > len(self.names):
            row = [*row[: self.text], ",".join(row[self.text :])]  # an unquoted comma belongs to a caption at the end
        if any(cell.strip() for cell in row[len(self.names) :]):
            why = f"{len(row)} cells, the header names {len(self.names)}"
            raise UserError(
                f'{file}, line {line}: {why}; put a caption that holds what divides the cells into double quotes ("...").'
            )
        if len(row) <= self.text:
            raise UserError(
                f"{file}, line {line}: no caption after {row[0][:60]!r}; expected `{one_line(','.join(self.names)[:80])}`."
            )
        image, split = (row[at].strip() if at is not None and at < len(row) else None for at in (self.image, self.split))
        return row[self.text], image or None, split or None


def read_table(file: Path, tally: Tally, folders: tuple[str, ...] = ()) -> Iterator[Caption]:
    """A CSV or TSV file whose first row names its columns, as Flickr8k's ``captions.csv`` and the hub's ``metadata.csv``.

    Raises:
        UserError: it has no caption column, or a row that is not as the header says.
    """
    first_line = next((line for line in ended_lines(file, "") if line.strip()), "")
    known = header_of(first_line)
    rows = _numbered_rows(file, known[0] if known else _likeliest(first_line), tally)
    header = _Header.of([cell.strip() for cell in next(rows, (1, [""]))[1]], file, tally)
    first, captions = peeked((line, *header.cells(row, file, line)) for line, row in rows)
    images = _images_of(file, header, [image or "" for _, _, image, _ in first], tally, folders)
    counts: Counter[str] = Counter()
    for line, text, image, split in captions:
        text = " ".join(text.split())
        if header.image is None:
            yield Caption(f"{line:09d}#0", None, text, split_of(split))
        elif image is None:
            tally.skip("rows without an image's name", f"line {line}")
        else:
            name = image_name(relative_name(image, file.parent))
            yield Caption(f"{name}#{counts[name]}", images.path(image), text, split_of(split))
            counts[name] += 1


class _Beside(Images):
    """The images of the hub's ``metadata.csv``, which always lie relative to it."""

    def path(self, name: str) -> str | None:
        return image_inside(self._file.parent, relative_name(name, self._file.parent), self._file)


def _images_of(file: Path, header: _Header, first: list[str], tally: Tally, folders: tuple[str, ...]) -> Images:
    if file.name.startswith("metadata."):
        return _Beside(file, tally)
    images = Images(file, tally, folders)
    if header.image is not None:
        images.look(first)
    return images


def _numbered_rows(file: Path, delimiter: str, tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with the lines that they begin in, as Python's csv reads them."""
    raw: list[str] = []  # the lines of one row

    def remembered() -> Iterator[str]:
        for line in ended_lines(file, ""):
            raw.append(line)
            yield line

    rows = csv.reader(remembered(), delimiter=delimiter)
    begun = 1
    try:
        for row in rows:
            if len(raw) > 1:
                _check_quotes(raw, row, delimiter, file, begun)
            if any(cell.strip() for cell in row):
                yield begun, row
            else:
                tally.skip("blank lines", f"line {begun}", quiet=True)
            begun = rows.line_num + 1
            raw.clear()
    except csv.Error as error:
        raise UserError(f"{file}, line {begun}: no CSV ({error}): close or double its quotes.") from error


def _check_quotes(raw: list[str], row: list[str], delimiter: str, file: Path, line: int) -> None:
    """Refuse a row of several lines whose quotation mark was left open: it would swallow the rows behind it."""
    swallows = len(raw) > _LONGEST or delimiter == "\t" and any("\n" in cell and "\t" in cell for cell in row)
    try:
        closed = list(csv.reader(raw, delimiter=delimiter, strict=True)) == [row]
    except csv.Error:
        closed = False
    if swallows or not closed:
        end = f"is closed only on line {line + len(raw) - 1}" if closed else "is not closed"
        raise UserError(f"{file}, line {line}: a quotation mark {end}: double or remove it.")


# --- lines of a fixed form -------------------------------------------------------------------------------------------


class _Broken:
    """Counts rows that are no caption, and refuses a file of many."""

    def __init__(self, file: Path, shape: str, tally: Tally):
        self._file, self._shape, self._tally = file, shape, tally
        self.bad = self.good = 0

    def row(self, number: int, line: str) -> None:
        if not line.strip():
            self._tally.skip("blank lines", f"line {number}", quiet=True)
            return
        self.bad += 1
        self._tally.skip(f"lines that are not {self._shape}", f"line {number}, {line[:40]!r}")
        if self.bad >= 10:
            self.refuse()

    def refuse(self) -> None:
        if self.bad > _BROKEN_SHARE * (self.bad + self.good) + (1 if self.good else 0):
            raise UserError(
                f"{self._file} has {self.bad} of {self.bad + self.good} rows that are not {self._shape}: pass a file of that form."
            )


def read_tokens(file: Path, tally: Tally, folders: tuple[str, ...] = ()) -> Iterator[Caption]:
    """A token file as Flickr8k and Flickr30K have it: ``1000092795.jpg#0<TAB>Two young guys ...``."""

    def rows() -> Iterator[tuple[str, str, str]]:
        broken = _Broken(file, "`NAME.jpg#0<TAB>caption`", tally)
        for number, line in enumerate(lines(file), 1):
            key, _, text = line.partition("\t")
            name, _, index = key.rpartition("#")
            if not TOKEN.match(line) or not name:
                broken.row(number, line)
                continue
            broken.good += 1
            yield name, index, text.strip()
        broken.refuse()

    yield from _keyed(file, rows(), tally, folders)


def read_pipes(file: Path, tally: Tally, folders: tuple[str, ...] = ()) -> Iterator[Caption]:
    """The Flickr30K mirror's ``results.csv``: ``image_name| comment_number| comment``, whose captions may hold the bar."""

    def rows() -> Iterator[tuple[str, str, str]]:
        broken = _Broken(file, "`image_name| comment_number| comment`", tally)
        for number, line in enumerate(lines(file), 1):
            cells = [cell.strip() for cell in line.split("|", 2)]
            if PIPES.match(line):
                tally.skip("header rows", f"line {number}", quiet=True)
                continue
            if len(cells) == 2:  # the mirror's one broken row: "2199200615.jpg| 4   A dog runs across the grass ."
                index, _, text = cells[1].partition(" ")
                cells = [cells[0], index, text.strip()]
            if len(cells) != 3 or not cells[1].isdecimal() or not cells[0]:
                broken.row(number, line)
                continue
            broken.good += 1
            yield cells[0], cells[1], cells[2]
        broken.refuse()

    yield from _keyed(file, rows(), tally, folders)


def _keyed(file: Path, rows: Iterator[tuple[str, str, str]], tally: Tally, folders: tuple[str, ...]) -> Iterator[Caption]:
    first, rows = peeked(rows)
    images, keys = Images(file, tally, folders), Keys(tally)
    images.look(name for name, _, _ in first)
    for name, index, text in rows:
        # the official file writes a few names as 1000.jpg.jpg#r0: the part before # is the name as it is on disk
        yield Caption(keys.own(f"{name}#{index}"), images.path(name), text, None)


def addresses(rows: Iterator[str]) -> tuple[int, bool]:
    """How many of Conceptual Captions' rows have an address, and whether it is the first column (CC12M) or the second (CC3M)."""
    votes: Counter[bool] = Counter()
    for line in rows:
        left, tab, right = line.partition("\t")
        if tab and bool(URL.match(left.strip())) != bool(URL.match(right.strip())):
            votes[bool(URL.match(left.strip()))] += 1
    return sum(votes.values()), bool(votes) and votes.most_common(1)[0][0]


def read_addressed(file: Path, tally: Tally) -> Iterator[Caption]:
    """Conceptual Captions without a header: ``caption<TAB>url`` or ``url<TAB>caption``, which the first rows tell; text alone.

    The published files know no quotes: a cell is what stands between two tabs.
    """
    first, rows = peeked(lines(file))
    _, is_first = addresses(iter(first))
    broken = _Broken(file, "`caption<TAB>url` or `url<TAB>caption`", tally)
    for number, line in enumerate(rows, 1):
        left, tab, right = line.partition("\t")
        right = right.split("\t", 1)[0]
        text, address = (right, left) if is_first else (left, right)
        if not tab or not URL.match(address.strip()):
            broken.row(number, line)
            continue
        broken.good += 1
        yield Caption(f"{number:09d}#0", None, text.strip(), None)
    broken.refuse()
