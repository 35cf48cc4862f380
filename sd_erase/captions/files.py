"""What all readers of caption files share: text that is read line by line, the place of images, and one sentence for what is damaged."""

from __future__ import annotations

import difflib
import gzip
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from sd_erase.captions.caption import Tally
from sd_erase.errors import UserError
from sd_erase.folders import replacing

MAX_TEXT = 2**20  # characters of a line or a text: what is longer is no caption, and could fill the memory
MAX_ROW = 2**28  # bytes of one row or of one file in an archive
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
# what the published data sets call the folder of their images
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
_LOOKED_AT = 20  # rows whose images are looked for, to tell the folder that they lie in


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into one sentence that names it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        # the position is of no use: it counts from the start of a block
        byte = error.object[error.start : error.start + 1]
        raise UserError(f"{path} is not UTF-8 text ({error.reason} {byte!r}): save it as UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or no gzip file ({error}): download it again.") from error
    except OSError as error:
        why = " ".join(str(error.strerror or error).split())[:120]  # pyarrow's reach over several lines
        raise UserError(f"{path} cannot be read ({why}): check the file.") from error


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where it is gzipped."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def ended_lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a UTF-8 text file, gzipped or not, with their ends, which `newline` says as `open` does.

    Raises:
        UserError: the file is damaged, or has a line that no caption file has.
    """
    with reading(path):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as stream:
            for number in itertools.count(1):
                line = stream.readline(MAX_TEXT)
                if len(line) == MAX_TEXT:
                    raise UserError(
                        f"{path}, line {number}, has a line of {MAX_TEXT:,} characters or more: it is no caption file; pass another with --dataset."
                    )
                if not line:
                    return
                yield line


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file without their ends; no control character but the line feed ends one."""
    return (line.rstrip("\r\n") for line in ended_lines(path, "\n"))


def head(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file, unpacked where it is gzipped."""
    with reading(path), opened(path) as stream:
        return stream.read(size)


def leaves_folder(name: str) -> bool:
    """Whether a relative path could lead out of its folder, on any system, or names nothing."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    out = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    return bool(out) or not posix.name or "\0" in name


def image_inside(folder: Path, name: str, source: Path) -> str:
    """The absolute path of image `name` in `folder`.

    Raises:
        UserError: the name leads out of the folder.
    """
    if leaves_folder(name):
        raise UserError(f"{source} names an image outside its folder ({name[:80]!r}): remove that row, the file is not safe.")
    return str(folder.absolute() / name)


def relative_name(name: str, folder: Path) -> str:
    """`name` with slashes where it was written on Windows; of an absolute path in `folder` what it is relative to that."""
    name = name.replace("\\", "/") if "/" not in name else name
    start = f"{folder.absolute().as_posix()}/"
    return name.removeprefix(start) if name.startswith(start) else name


class Images:
    """The folder that holds the images of a list, told by the first ones that the list names.

    Args:
        file: the list; images lie beside it, in a folder beside it, or one folder up.
        folders: further names of such folders.
    """

    def __init__(self, file: Path, tally: Tally, folders: Sequence[str] = ()):
        names = (*folders, *IMAGE_FOLDERS)
        self._file, self._tally = file, tally
        self._named = [root / name for root in (file.parent, file.parent.parent) for name in names]
        self.root: Path | None = None

    def look(self, names: Iterable[str]) -> None:
        """Choose the folder: where one of `names` lies, else one that is called as data sets call theirs, else none."""
        beside = self._file.parent
        first = [relative_name(name, beside) for name in itertools.islice(names, _LOOKED_AT) if name]
        safe = [name for name in first if not leaves_folder(name)]
        for root in (beside, *self._named, beside.parent):
            if any(os.path.isfile(root / name) for name in safe):
                self.root = root
                return
        self.root = next((root for root in self._named if root.is_dir()), None)
        if self.root is None and first:
            self._tally.note(
                f"None of the first images that {self._file} names lies beside it or in a folder images/ there (such as {first[0][:80]!r}): "
                "its captions are read as text alone."
            )

    def path(self, name: str) -> str | None:
        """The absolute path of image `name`, or None where the data set is text alone."""
        return image_inside(self.root, relative_name(name, self._file.parent), self._file) if self.root else None


def peeked(rows: Iterator[Any]) -> tuple[list[Any], Iterator[Any]]:
    """The first of `rows`, and all of them."""
    first = list(itertools.islice(rows, _LOOKED_AT))
    return first, itertools.chain(first, rows)


def find_file(path: Path, names: Iterable[str], what: str, tally: Tally | None = None) -> Path:
    """`path` itself where it is a file, else the first of `names` (globs) that the folder holds.

    Raises:
        UserError: none is there.
    """
    if path.is_file():
        return path
    names = list(names)
    for name in names:
        found = sorted(match for match in path.glob(name) if match.is_file())
        if len(found) > 1 and tally is not None:
            others = ", ".join(match.name for match in found[1:4]) + (" and more" if len(found) > 4 else "")
            tally.note(f"Of {path} is read {found[0].name}, not {others}: pass a file's path for another one.")
        if found:
            return found[0]
    raise UserError(f"{path} holds no {what}: expected {' or '.join(names)} in it.")


def near(path: Path) -> str:
    """ " (did you mean PATH?)" where the folder of a path that does not exist holds something of nearly its name."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    match = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / match[0]}?)" if match else ""


def take_out(folder: Path, name: str, content: bytes | None, source: Path) -> str:
    """Write an archive's image to ``folder/name`` (once) where `content` is given; its path either way."""
    target = Path(image_inside(folder, name, source))
    try:
        if content is not None and not target.is_file():
            with replacing(target) as temporary:
                temporary.write_bytes(content)
    except OSError as error:  # the disk is full, or the archive's names are too long or name a file and a folder alike
        raise UserError(
            f"{target} of {source} cannot be written ({error.strerror or error}): free space there, or correct the folder's permissions."
        ) from error
    return str(target)
