"""Which form a caption file has, told by what it holds; each form has one reader, whatever data set it comes from."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from sd_erase.captions import arrow, delimited, documents, jsonl, shards
from sd_erase.captions.caption import Caption, Tally, checked
from sd_erase.captions.files import head
from sd_erase.errors import UserError

SHAPES = {
    "arrow": "rows with a caption",
    "shard": "samples with a .txt or .json caption and an image",
    "document": documents.FORMS,
    "json lines": 'lines such as {"image": "1.jpg", "caption": "..."}',
    "tokens": "lines such as `1000092795.jpg#0<TAB>Two young guys ...`",
    "pipes": "rows such as `1000092795.jpg| 0| Two young guys ...`",
    "addressed": "`caption<TAB>url` or `url<TAB>caption` rows",
    "table": "rows such as `image,caption`",
}
FORMS = (
    "JSON of COCO, Karpathy, LAVIS or kohya, JSON Lines, a table with a header such as `image,caption`, `NAME.jpg#0<TAB>caption`, "
    "`caption<TAB>url`, parquet or tar shards"
)
_LINES = 50  # that are looked at
_TAR_MAGIC = slice(257, 262)


def form_of(file: Path) -> str:
    """The form of `file`, a key of `SHAPES`.

    Raises:
        UserError: it is empty, or of none of the forms.
    """
    start = head(file)
    if file.suffix in arrow.SUFFIXES or start[:4] == b"PAR1":
        return "arrow"
    if file.name.endswith((".tar", ".tar.gz", ".tgz")) or start[_TAR_MAGIC] == b"ustar":
        return "shard"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file} is UTF-16 text: save it as UTF-8 (Windows: Save as, Encoding UTF-8).")
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise UserError(f"{file} is empty: pass a file of captions.")
    if text[0] in "[{":
        return _form_of_json(file, text)
    lines = [line for line in re.split("\r\n|\n|\r", text) if line.strip()][:_LINES]
    if delimited.PIPES.match(lines[0]):
        return "pipes"
    if delimited.header_of(lines[0]):
        return "table"
    addressed, is_first = delimited.addresses(iter(lines))
    tokens = sum(delimited.TOKEN.match(line) is not None for line in lines)
    # captions end in "#1" too, and an address may
    if tokens and (tokens > addressed or is_first and tokens == addressed):
        return "tokens"
    if addressed:
        return "addressed"
    if file.name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        return "json lines"  # its reader names the first line that is none
    if file.suffix in (".csv", ".tsv"):
        return "table"  # its reader names the columns that there are
    raise UserError(f"{file} is of no form that is read (its first line is {lines[0][:60]!r}): expected {FORMS}.")


def _form_of_json(file: Path, text: str) -> str:
    if file.name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        return "json lines"
    first, end, rest = text.partition("\n")
    if text[0] == "[" or not end or not rest.lstrip().startswith("{"):
        return "document"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "document"
    return "json lines"  # whatever its name


def read_file(
    file: Path,
    tally: Tally,
    folder: Path | None = None,
    wanted: Collection[str] | None = None,
    folders: tuple[str, ...] = (),
) -> Iterator[Caption]:
    """The captions of one file, by the rules of its form.

    Args:
        folder, wanted: where the images of an archive are written, and of which keys.
        folders: names of folders that its images may lie in.

    Raises:
        UserError: it is damaged, of no form that is read, or holds no caption.
    """
    form = form_of(file)
    captions: Iterator[Caption]
    if form == "arrow":
        captions = arrow.read([file], tally, folder, wanted)
    elif form == "shard":
        captions = shards.read([file], tally, folder, wanted)
    elif form == "document":
        captions = documents.read(file, tally, folders)
    elif form == "json lines":
        captions = jsonl.read(file, tally)
    elif form == "tokens":
        captions = delimited.read_tokens(file, tally, folders)
    elif form == "pipes":
        captions = delimited.read_pipes(file, tally, folders)
    elif form == "addressed":
        captions = delimited.read_addressed(file, tally)
    else:
        captions = delimited.read_table(file, tally, folders)
    yield from checked(captions, file, SHAPES[form], tally)
