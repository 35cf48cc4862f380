"""JSON documents of captions, told apart by what they hold: COCO's annotations, Karpathy's lists, plain lists, kohya's metadata."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sd_erase.captions.caption import Caption, Keys, Tally
from sd_erase.captions.columns import TEXT, caption_column, image_name, image_of, split_of, texts_of
from sd_erase.captions.files import IMAGE_SUFFIXES, MAX_TEXT, Images, leaves_folder, opened, peeked, reading, relative_name
from sd_erase.errors import UserError, shortened
from sd_erase.terminal import one_line

FORMS = "COCO's annotations, Karpathy's `images` with `sentences`, a list of objects with a caption, or kohya's path -> caption"
_EVENTS = 20_000  # of the parser, within which a document shows its form


class _Texts:
    """A JSON stream whose texts end: the parser would collect one without end until the memory is full."""

    def __init__(self, stream: IO[bytes], path: Path):
        self._stream, self._path, self._since = stream, path, 0

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        quote = block.rfind(b'"')
        self._since = self._since + len(block) if quote < 0 else len(block) - quote
        if self._since > MAX_TEXT:
            raise UserError(
                f"{self._path} has a value of more than {MAX_TEXT:,} bytes: it is no caption file; pass another with --dataset."
            )
        return block


def parsed(path: Path, how: str, prefix: str = "") -> Iterator[Any]:
    """What ijson's function `how` ("items", "kvitems", "parse") finds in a JSON file, without reading the file as a whole."""
    import ijson

    arguments = [] if how == "parse" else [prefix]
    with reading(path):
        try:
            with opened(path) as stream:
                if stream.read(3) != b"\xef\xbb\xbf":  # JSON forbids a byte order mark, and Windows writes it
                    stream.seek(0)
                yield from getattr(ijson, how)(_Texts(stream, path), *arguments, use_float=True)
        except ijson.JSONError as error:
            why = error.args[0] if error.args else ""  # bytes where the text is not UTF-8
            readable = why.decode("ascii", errors="replace") if isinstance(why, bytes) else str(why)
            advice = "save it as UTF-8" if isinstance(why, bytes) else "download it again"
            raise UserError(f"{path} is no complete JSON file ({' '.join(readable.split())[:120]}): {advice}.") from error


def form_of(path: Path) -> str:
    """What a JSON document holds: "coco", "karpathy", "list" or "kohya".

    Raises:
        UserError: none of these; what it holds instead is named.
    """
    events = itertools.islice(parsed(path, "parse"), _EVENTS)
    names: list[str] = []
    for prefix, event, value in events:
        if not prefix and event == "start_array":
            return "list"
        if not prefix and event == "map_key":
            names.append(str(value))
        if prefix == "annotations" and event == "start_array":
            return "coco"
        if prefix == "images.item" and event == "map_key" and value == "sentences":
            return "karpathy"
        if prefix == "images.item" and event == "end_map":
            return "coco"
        if event == "map_key" and value in ("caption", "tags") and names and prefix == names[-1]:
            return "kohya"
    if "images" in names:
        return "coco"
    what = f"an object with {one_line(', '.join(names[:6])[:120])}" if names else "no list and no object"
    raise UserError(f"{path} is no caption file ({what}): expected {FORMS}.")


def read(file: Path, tally: Tally, folders: tuple[str, ...] = ()) -> Iterator[Caption]:
    """The captions of a JSON document.

    Args:
        folders: names of folders that its images may lie in.

    Raises:
        UserError: it is damaged, or holds no captions.
    """
    form = form_of(file)
    images = Images(file, tally, folders)
    reader = {"coco": _coco, "karpathy": _karpathy, "list": _list, "kohya": _kohya}[form]
    yield from reader(file, images, tally)


def _coco(file: Path, images: Images, tally: Tally) -> Iterator[Caption]:
    """COCO's annotations. Only the table of file names is held in memory."""
    names: dict[int, str] = {}
    for row in parsed(file, "items", "images.item"):
        try:
            names[row["id"]] = row["file_name"] + ""  # a TypeError where it is no text
        except (TypeError, KeyError) as error:
            raise UserError(f"{file} is no COCO file (a bad image: {error}): pass captions_train2017.json or alike.") from error
    if "text_only" not in file.stem:
        images.look(names.values())
    keys = Keys(tally)
    for row in parsed(file, "items", "annotations.item"):
        try:
            number, identifier, text = str(row["id"])[:40], row["image_id"], row["caption"]
            name = names.get(identifier)
        except (TypeError, KeyError) as error:
            raise UserError(f"{file} holds no captions (a bad annotation: {error}): pass captions_*.json.") from error
        if name is None:
            raise UserError(f"{file} has a caption of image {shortened(identifier)}, which it does not list: download it again.")
        for _, one in texts_of(text, f"{file} holds no captions", f"annotation {one_line(number)}", tally):
            yield Caption(keys.own(f"{name}#{number}"), images.path(name), one, None)


def _karpathy(file: Path, images: Images, tally: Tally) -> Iterator[Caption]:
    """Karpathy's lists of Flickr8k, Flickr30K and COCO, whose images lie in the folder that ``filepath`` names."""

    def named(row: Any) -> str:
        if not isinstance(row, dict) or not isinstance(row.get("filename"), str) or not isinstance(row.get("sentences"), list):
            raise UserError(
                f"{file} is not Karpathy's form (a bad image: {str(row)[:60]!r}): pass dataset_flickr30k.json or alike."
            )
        return "/".join(part for part in (row.get("filepath"), row["filename"]) if isinstance(part, str) and part)

    first, rows = peeked(parsed(file, "items", "images.item"))
    images.look([name for row in first for name in (named(row), row["filename"])])
    keys = Keys(tally)
    for row in rows:
        name = named(row)
        if images.root and not leaves_folder(name) and not os.path.isfile(images.root / name):
            name = row["filename"]
        split = split_of(row.get("split"))
        for number, text in texts_of(row["sentences"], file, f"image {one_line(name[:60])}", tally, "sentences"):
            yield Caption(keys.own(f"{row['filename']}#{number}"), images.path(name), text, split)


def _list(file: Path, images: Images, tally: Tally) -> Iterator[Caption]:
    """A list of objects such as LAVIS' ``{"image": "val2014/1.jpg", "caption": "..."}``; a caption may be a list of them."""
    first, rows = peeked(parsed(file, "items", "item"))
    images.look([image_of(row, file, f"entry {number}") or "" for number, row in enumerate(first) if isinstance(row, dict)])
    for number, row in enumerate(rows):
        place = f"entry {number}"
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: no caption; expected an object with one of {', '.join(TEXT)}.")
        column = caption_column(row, file, place, tally)
        if column is None:
            continue
        image = image_of(row, file, place)
        name = image_name(relative_name(image, file.parent)) if image else f"{number:09d}"
        for position, text in texts_of(row[column], file, place, tally, column):
            yield Caption(f"{name}#{number}.{position}", images.path(image) if image else None, text, split_of(row.get("split")))


def _kohya(file: Path, images: Images, tally: Tally) -> Iterator[Caption]:
    """kohya's ``meta_cap.json``: a path, with or without its suffix, and its ``caption`` and ``tags``, each a caption."""
    beside = _Stems(file.parent)
    keys = Keys(tally)
    for path, row in parsed(file, "kvitems"):
        place = f"image {one_line(path[:60])}"
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: expected an object with caption or tags: mend or remove it.")
        columns = [column for column in ("caption", "tags") if column in row]
        if not columns:
            tally.skip("rows without a caption", place)
            continue
        name, image = beside.find(path)
        if image is None:
            tally.keep("images that do not lie beside the file or below it, whose captions are text alone", path)
        texts = [text for column in columns for _, text in texts_of(row[column], file, place, tally, column)]
        for number, text in enumerate(texts):
            yield Caption(keys.own(f"{name}#{number}"), image, text, None)


class _Stems:
    """The images in a folder and below, by the ends of their paths without their suffix."""

    def __init__(self, root: Path):
        self._root = root.absolute()
        self._images: dict[str, list[Path]] = {}
        for current, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(current, name)
                if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    self._images.setdefault(path.stem, []).append(path.absolute())

    def find(self, name: str) -> tuple[str, str | None]:
        """What the image that `name` names is called relative to the folder, and its path, or None where it is not there.

        Paths in the file are those of the machine that wrote it, with or without a suffix: the longest end that fits counts.
        """
        parts = relative_name(name, self._root).split("/")
        last = Path(parts[-1] or "x")
        stem = last.stem if last.suffix.lower() in IMAGE_SUFFIXES else last.name

        def rank(path: Path) -> tuple[int, bool, int]:
            own = path.relative_to(self._root).parts[:-1]
            pairs = zip(reversed(own), reversed(parts[:-1]), strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            return -common, path.name != last.name, len(own)

        best = sorted(self._images.get(stem, []), key=rank)
        if not best or len(best) > 1 and rank(best[0]) == rank(best[1]):
            return name, None
        return best[0].relative_to(self._root).as_posix(), str(best[0])
