"""A folder of images with a caption file beside each, as trainers keep them, or with the hub's ``metadata`` file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import arrow, delimited, jsonl
from sd_erase.captions.caption import Caption, Tally, checked
from sd_erase.captions.files import IMAGE_SUFFIXES, lines
from sd_erase.captions.form import read_file
from sd_erase.errors import UserError

SIDECARS = (".txt", ".caption")  # of most trainers, and kohya's default; both are read where both are there
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}


class Folder:
    """Reads a folder of images and all folders below it.

    A folder with a ``metadata`` file is read by that, with all below it; else every non-empty line of ``NAME.txt`` or
    ``NAME.caption`` (also ``NAME.jpg.txt``) is a caption of ``NAME.jpg``.
    """

    def __call__(
        self, path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, tally: Tally | None = None, **_: Any
    ) -> Iterator[Caption]:
        """The captions.

        Raises:
            UserError: `path` holds none, or a caption file is damaged.
        """
        tally = Tally() if tally is None else tally
        if path.is_file():
            yield from read_file(path, tally, folder, wanted)
            return
        shape = "images with a .txt or .caption file beside each, or a metadata.jsonl or .csv"
        yield from checked(_captions(path, tally, folder, wanted), path, shape, tally)

    def files(self, path: Path) -> Iterator[Path]:
        """The caption files, and the images that they belong to."""
        for current, metadata, sidecars in _walk(path, Tally()):
            if metadata is not None:
                yield metadata
            for image, texts in sidecars:
                yield from (current / text for text in texts)
                yield current / image


read = Folder()

_Folder = tuple[Path, Path | None, list[tuple[str, list[str]]]]


def _walk(root: Path, tally: Tally) -> Iterator[_Folder]:
    """Each folder with its metadata file or, where none is there nor above, its images and their caption files."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename or root} cannot be read ({error.strerror}): check its permissions.") from error

    covered: set[str] = set()  # folders that a metadata file stands for
    seen = {os.path.realpath(root)}
    for current, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(current, name))
            if name.startswith(".") or real in seen:
                tally.skip(
                    "hidden folders" if name.startswith(".") else "folders that are links to another one", name, quiet=True
                )
                continue
            seen.add(real)
            kept.append(name)
        folders[:] = kept
        hidden = [name for name in files if name.startswith(".")]  # such as ._NAME.txt, which macOS leaves on other disks
        for name in hidden:
            tally.skip("hidden files", name, quiet=True)
        here = {name: Path(current, name) for name in sorted(set(files) - set(hidden))}
        metadata = next((here[name] for name in METADATA if name in here), None)
        if metadata is not None or current in covered:
            covered.update(os.path.join(current, name) for name in kept)
            _count_unread(here, tally)
            yield Path(current), metadata, []
        else:
            yield Path(current), None, list(_sidecars(here, Path(current).relative_to(root).as_posix(), tally))


def _count_unread(here: dict[str, Path], tally: Tally) -> None:
    """Count caption files that a metadata file takes the place of."""
    for name, path in here.items():
        if path.suffix.lower() in SIDECARS and any(f"{path.stem}{suffix}" in here for suffix in IMAGE_SUFFIXES):
            tally.skip("caption files beside images that a metadata file describes", name)


def _sidecars(here: dict[str, Path], where: str, tally: Tally) -> Iterator[tuple[str, list[str]]]:
    by_lower: dict[str, list[str]] = {}  # IMG_1.TXT belongs to IMG_1.JPG
    for name, path in here.items():
        if path.suffix.lower() in SIDECARS:
            by_lower.setdefault(f"{path.stem}{path.suffix.lower()}", []).append(name)
    used: set[str] = set()
    for name, path in here.items():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        texts = [text for suffix in SIDECARS for stem in (path.stem, name) for text in by_lower.get(f"{stem}{suffix}", ())]
        used.update(texts)
        if texts:
            yield name, texts
        else:
            tally.skip("images without a caption file", f"{where}/{name}")
    for names in by_lower.values():
        for name in names:
            if name not in used:
                tally.skip("text files without an image of their name", f"{where}/{name}", quiet=not used)


def _captions(root: Path, tally: Tally, folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    for current, metadata, sidecars in _walk(root, tally):
        relative = current.relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        if metadata is not None:
            split = _SPLITS.get(relative.split("/")[0].lower())
            for caption in _described(metadata, tally, folder, wanted):
                yield Caption(f"{prefix}{caption.key}", caption.image, caption.text, caption.split or split)
        for name, texts in sidecars:
            number = 0
            for text in texts:
                for line in lines(current / text):
                    if line.strip():
                        yield Caption(f"{prefix}{name}#{number}", str((current / name).absolute()), line.strip(), None)
                    else:
                        tally.skip("blank lines", text, quiet=True)
                    number += 1


def _described(metadata: Path, tally: Tally, folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    if metadata.suffix == ".jsonl":
        return jsonl.read(metadata, tally)
    if metadata.suffix == ".csv":
        return delimited.read_table(metadata, tally)
    return arrow.read([metadata], tally, folder, wanted)
