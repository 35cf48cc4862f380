"""Captions of a data set, one at a time: each reader yields `Caption` and never holds the data set in memory.

A caption's key is ``IMAGE#NUMBER``, so that an image is known by its key even where only the text is there. Readers whose
images lie inside another file (parquet, tar, CIFAR) name the file under ``folder`` where an image would lie, and write it
only for the keys in ``wanted``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import catalog
from sd_erase.captions.caption import Caption, Tally
from sd_erase.captions.files import near
from sd_erase.errors import UserError

if TYPE_CHECKING:
    from sd_erase.bases import Base
    from sd_erase.concepts import Concept

# where a reader's data set lies on the hub, as parquet: data sets that are scripts are loaded no more
HUB = {"flickr30k": "lmms-lab/flickr30k", "cifar100": "uoft-cs/cifar100"}
WHOLE = 2**30  # bytes up to which a caption file is digested as a whole; of a larger one, samples
_SAMPLES, _BLOCK = 64, 2**16
RENDERED = ("pocket", "pocket-art")  # readers of the embedded worlds' scenes, which are drawn where they are not there yet
MADE = (*RENDERED, "synthetic")  # readers that need no path

__all__ = ["Caption", "Tally", "choose_dataset", "digest", "from_hub", "open_dataset"]


def choose_dataset(spec: str, base: Base, concepts: Iterable[Concept]) -> str:
    """`spec`, or what "auto" stands for: an embedded base's own scenes for what its world holds, else synthetic captions."""
    if spec != "auto":
        return spec
    kinds = {concept.kind for concept in concepts}
    if base.world == "art" and kinds <= {"object", "style", "person"}:
        return "pocket-art"
    return "pocket" if base.pocket and kinds <= {"object"} else "synthetic"


def open_dataset(
    spec: str,
    base: Base,
    folder: Path,
    wanted: Collection[str] | None = None,
    concepts: Sequence[Concept] = (),
    seed: int = 0,
    tally: Tally | None = None,
    device: str = "cpu",
) -> Iterator[Caption]:
    """The captions of ``READER:PATH`` (or of ``auto`` and the readers of `MADE`, which need no path).

    Args:
        base: what "auto" depends on, and what tells the words of synthetic captions apart.
        folder: where a reader may put files (rendered scenes, images taken out of archives).
        wanted: keys whose images are to be taken out of archives; None takes none.
        concepts, seed: what synthetic captions are made of.
        tally: told what is skipped, while the captions are read.
        device: where the base's text encoder reads the words of synthetic captions, as in `RunConfig`.

    Raises:
        UserError: no such reader or path, or, while reading, a file that is malformed.
    """
    spec = choose_dataset(spec, base, concepts)
    reader, path, read = _resolved(spec)
    if reader == "synthetic" and path:
        raise UserError(f"Data set {spec}: synthetic captions are made, not read; pass --dataset synthetic without a path.")
    if reader in MADE and not path:
        return iter(read(folder, concepts=concepts, seed=seed, base=base, device=device))
    return iter(read(_location(spec, reader, path), folder=folder, wanted=wanted, tally=Tally() if tally is None else tally))


def _resolved(spec: str) -> tuple[str, str, Any]:
    """A data set's reader by name, its path, and the reader itself."""
    reader, _, path = spec.partition(":")
    if reader not in catalog.READERS and os.path.exists(os.path.expanduser(spec)):
        names = ", ".join(name for name in catalog.READERS if name not in MADE)
        raise UserError(f"Data set {spec!r} names no reader: pass --dataset READER:{spec} with one of {names}.")
    return reader, path, catalog.resolve(catalog.READERS, reader, "Data set reader")


def _location(spec: str, reader: str, path: str) -> Path:
    """The file or folder of a data set; what only the hub has is fetched."""
    if not path and reader not in HUB:
        raise UserError(f"Data set {spec!r} names no path: pass --dataset {reader}:PATH.")
    location = Path(os.path.expanduser(path))
    there = os.path.exists(location)  # False for a text that can be no path, where pathlib raises
    if reader in HUB and (not path or re.fullmatch(r"[\w\-]+/[\w.\-]+", path) and not there):
        return from_hub(path or HUB[reader])
    if reader not in RENDERED and not there:
        raise UserError(
            f"Data set {spec[:200]}: {str(location)[:200]} does not exist{near(location)}: pass the folder or file that holds the captions."
        )
    if there and not os.path.isfile(location) and not os.path.isdir(location):
        raise UserError(
            f"Data set {spec}: {location} is no file and no folder, and captions are read twice: save them to a file."
        )
    return location


def digest(spec: str) -> list[tuple[str, str]]:
    """What the captions of ``READER:PATH`` depend on: the files that are read, by relative path, and their contents.

    A caption file counts by its content alone, an image by its name; of a file above `WHOLE` bytes samples of its content, its
    size and its time. Empty for what is made (scenes, templates) or fetched from the hub.

    Raises:
        UserError: no such reader, path or caption file.
    """
    reader, path, read = _resolved(spec)
    if not path or reader in MADE:
        return []
    location = Path(os.path.expanduser(path))
    if reader in HUB and re.fullmatch(r"[\w\-]+/[\w.\-]+", path) and not os.path.exists(location):
        return []
    location = _location(spec, reader, path)
    root = location if location.is_dir() else location.parent
    listed = getattr(read, "files", None)
    if location.is_file():
        files: Iterable[Path] = [location]
    else:
        files = listed(location) if listed else sorted(file for file in location.iterdir() if file.is_file())
    return [(os.path.relpath(file, root), _content(file)) for file in files]


def _content(file: Path) -> str:
    from sd_erase.captions.files import IMAGE_SUFFIXES, reading

    if file.suffix.lower() in IMAGE_SUFFIXES:
        return ""
    state = hashlib.blake2b(digest_size=12)
    with reading(file), file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_size <= WHOLE:
            while block := stream.read(1 << 20):
                state.update(block)
        else:
            for number in range(_SAMPLES):
                stream.seek((status.st_size - _BLOCK) * number // (_SAMPLES - 1))
                state.update(stream.read(_BLOCK))
            state.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()


def from_hub(identifier: str) -> Path:
    """The local folder of a hub data set's parquet files, fetched where they are not there yet.

    Raises:
        UserError: the hub cannot be reached, has no such data set, or none of parquet files.
    """
    from huggingface_hub import snapshot_download

    from sd_erase.captions.arrow import files_of

    try:
        folder = Path(snapshot_download(identifier, repo_type="dataset", allow_patterns=["*.parquet"]))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are of these kinds
        raise UserError(
            f"Data set {identifier} is no local path and cannot be fetched from the hub ({type(error).__name__}): pass the folder of "
            "its parquet files."
        ) from error
    if not files_of(folder):
        raise UserError(f"Data set {identifier} of the hub holds no parquet file: pass another one, or a local folder.")
    return folder
