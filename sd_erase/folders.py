"""What is ours on a disk: the mark of a folder, the lock of the one process that writes to it, and how a file gets its name.

Nothing that sd-erase did not make is deleted or overwritten. Its own folders (runs, and those of compare, reproduce and sweep) carry a
mark; whoever writes to one holds its lock, which the system drops when the process ends in any way. Files are written under a
temporary name first. In a locked folder that name's prefix alone tells a killed process's leftovers, because no other process writes
there; beside somebody else's files they lie in a hidden folder with a lock of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import __version__
from sd_erase.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

MARK = ".sd-erase.json"
LOCK = ".sd-erase.lock"
TEMPORARY = ".sd-erase-tmp-"
OWN = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{16}}")  # see `_temporary`
DESKTOP = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in a folder that looks empty
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# temporaries of the version before the marks, by the names of the files that they were to become
EARLIER = re.compile(
    r"\.((config\.yaml|(run|concepts|evaluation|attack|report|harvest|train|generate|evaluate|export-[a-z0-9-]+|probes)\.json"
    r"|(pairs|missing|metrics(-\w+)?|index|original|erased|prefix)\.jsonl|(evaluation|attack)\.md|report\.html|inputs\.txt"
    r"|results_20130124\.token|contact\.png|\d{4,}-seed\d+\.png)\.[a-z0-9_]{8}|(last|best|model)\.safetensors\.tmp)"
)


class Busy(UserError):
    """Another process writes to the folder."""


# --- files ------------------------------------------------------------------------------------------------------------------


def umask_mode(*, folder: bool = False) -> int:
    """The permissions that this process's umask gives a new file (or folder).

    Temporary files are private; what takes a lasting name gets these instead, as if it had been opened anew.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def _temporary(folder: Path) -> Path:
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


def lasting(path: Path | str) -> Path:
    """`path`, or the folder that stays of one inside a temporary: what a sentence may name."""
    whole = Path(path)
    return next((each for each in (whole, *whole.parents) if not any(OWN.fullmatch(part) for part in each.parts)), whole)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which lies in a folder of ours; it becomes `path` when the block ends well.

    What is written there may be a folder, if there is none yet. A file gets the permissions that the umask gives to new files. The name
    lies in a hidden folder of its own: safetensors 0.8 writes another temporary file beside the one that it is asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = _temporary(path.parent)
    place.mkdir()
    try:
        temporary = place / f"new{path.suffix}"
        yield temporary
        if temporary.is_file():
            temporary.chmod(umask_mode())  # some libraries make theirs private (safetensors, tempfile)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, beside files of others, to make something in and rename it into place; removed in the end.

    What killed processes left there in this way is removed too: their locks are free.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep_staging(parent)
    place, lock = _stage(parent)
    try:
        yield place
    finally:
        _remove(place, lock)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file that goes beside files of others."""
    with staging(path.parent) as place:
        temporary = place / f"new{path.suffix}"
        yield temporary
        temporary.chmod(umask_mode(folder=temporary.is_dir()))
        os.replace(temporary, path)


def _stage(parent: Path) -> tuple[Path, BaseFileLock | None]:
    """A new hidden folder in `parent` and its lock, held."""
    for _ in range(10):
        place = _temporary(parent)
        place.mkdir()
        with contextlib.suppress(FileNotFoundError, Busy):  # another process's sweep was faster
            return place, _acquire(place)
    raise Busy(f"{parent} is being swept by another sd-erase process again and again: try again.")


def _remove(place: Path, lock: BaseFileLock | None) -> None:
    if os.name == "nt" and lock is not None:  # an open file cannot be removed there
        lock.release()
    shutil.rmtree(place, ignore_errors=True)
    if lock is not None:
        lock.release()


def sweep_staging(parent: Path) -> None:
    """Remove the hidden folders that killed processes left in `parent`."""
    for place in parent.glob(f"{TEMPORARY}*"):
        if place.is_symlink() or not place.is_dir():
            continue
        if not (place / LOCK).is_file():
            with contextlib.suppress(OSError):
                place.rmdir()  # killed before it was locked; one with files in it stays
            continue
        with contextlib.suppress(Busy, OSError):
            _remove(place, _acquire(place))


def sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`, whose lock this process holds; folders inside with a lock of their own stay."""
    for place, inner, names in os.walk(folder):
        if begun := [Path(place) / name for name in inner if name.startswith(TEMPORARY)]:
            sweep_staging(Path(place))
            for each in begun:
                if OWN.fullmatch(each.name) and not each.is_symlink() and not (each / LOCK).is_file():  # of `replacing`
                    shutil.rmtree(each, ignore_errors=True)
        inner[:] = [name for name in inner if not os.path.exists(os.path.join(place, name, LOCK))]
        for name in names:
            if name.startswith(TEMPORARY) or EARLIER.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(place, name))


def check_new_file(path: Path, force: bool, own: bool = False, protected: Mapping[Path, str] | None = None) -> None:
    """Whether `path` may be written.

    Args:
        force: whether the user said that an existing file may be replaced.
        own: whether the file that is there is one of ours, unchanged.
        protected: file or folder -> what it is, that must never be hit.

    Raises:
        UserError: a folder, something protected, or somebody else's file without `force`.
    """
    target = path.expanduser().resolve()
    for place, what in (protected or {}).items():
        place = place.expanduser().resolve()
        if target == place or (place in target.parents and (place.is_dir() or target.exists())):
            raise UserError(f"{path} belongs to {what}, which stays as it is: name another file.")
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is no file: name one, in a folder that you may write to.")
    if target.exists() and not (force or own):
        raise UserError(f"{path} exists and sd-erase did not write it: name another file, or pass --force to replace it.")


# --- folders ----------------------------------------------------------------------------------------------------------------


def mark_of(folder: Path) -> dict[str, Any] | None:
    """What the mark of one of our folders says ("kind": "run", "comparison", ...); None where there is none."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def mark(folder: Path, kind: str, about: Mapping[str, Any] | None = None) -> None:
    """Say that `folder` is ours."""
    with replacing(folder / MARK) as temporary:
        text = json.dumps({"made by": "sd-erase", "version": __version__, "kind": kind, **(about or {})})
        temporary.write_text(text + "\n", encoding="utf-8")


def entries(folder: Path) -> list[str]:
    """The names in `folder`, sorted, without what this module and file managers put there; none where it does not exist."""
    if not folder.exists():
        return []
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if name not in {*DESKTOP, MARK, LOCK} and not name.startswith(TEMPORARY))


def create(folder: Path, kind: str, files: Mapping[str, str], about: Mapping[str, Any] | None = None) -> Hold:
    """Make a folder of ours with its mark and first `files` (name -> text) elsewhere, and rename it into place.

    Returns:
        Its lock, held.

    Raises:
        FileExistsError: there is something of that name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_staging(folder.parent)
    place, lock = _stage(folder.parent)
    try:
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8")
        mark(place, kind, about)
        if folder.exists():  # an empty folder would be replaced
            raise FileExistsError(errno.EEXIST, "exists", str(folder))
        if os.name == "nt" and lock is not None:  # a folder with an open file cannot be renamed there
            lock.release()
        try:
            os.rename(place, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "exists", str(folder)) from error
            raise
        if os.name == "nt" and lock is not None:
            lock = _acquire(folder)
    except BaseException:
        _remove(place, lock)
        raise
    return Hold.of(folder, lock)


# --- locks ------------------------------------------------------------------------------------------------------------------


def _acquire(folder: Path, wait: bool = False) -> BaseFileLock | None:
    """The lock of `folder`, held; None where the file system has no locks.

    Raises:
        Busy: another process holds it.
        OSError: the folder is missing or may not be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / LOCK), thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise Busy(
            f"{folder} is being written by another sd-erase process: wait until that has ended, or name another folder."
        ) from None
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return lock


class Hold:
    """The lock of a folder as this process holds it, however often it asked for it."""

    _held: dict[Path, Hold] = {}

    def __init__(self, key: Path, lock: BaseFileLock | None):
        self.key, self.lock, self.times = key, lock, 1

    @classmethod
    def of(cls, folder: Path, lock: BaseFileLock | None) -> Hold:
        """Note that this process holds `lock`."""
        hold = cls(folder.resolve(), lock)
        cls._held[hold.key] = hold
        return hold

    @classmethod
    def take(cls, folder: Path, wait: bool = False) -> Hold:
        """Hold the lock of an existing folder; raises as `_acquire`. Leftovers are removed when it is taken for the first time."""
        hold = cls._held.get(folder.resolve())
        if hold is not None:
            hold.times += 1
            return hold
        hold = cls.of(folder, _acquire(folder, wait))
        sweep(folder)
        return hold

    def release(self) -> None:
        """Give it back; the lock itself is dropped by whoever took it first."""
        self.times -= 1
        if not self.times:
            self._held.pop(self.key, None)
            if self.lock is not None:
                self.lock.release()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the one process that writes to `folder`, which is ours; `wait` for another one to end, or raise `Busy` at once."""
    hold = Hold.take(folder, wait)
    try:
        yield
    finally:
        hold.release()


def is_locked(folder: Path) -> bool | None:
    """Whether another process writes to `folder`; None where no lock tells it."""
    if folder.resolve() in Hold._held:
        return False
    if not (folder / LOCK).is_file():
        return None
    try:
        lock = _acquire(folder)
    except Busy:
        return True
    except OSError:
        return None
    if lock is None:
        return None
    lock.release()
    return False


@contextlib.contextmanager
def working_in(folder: Path, kind: str, earlier: Sequence[str], flag: str = "--output") -> Iterator[None]:
    """Work in a folder of many runs, `kind` "comparison" or "bench", alone; it is made where it is not there.

    Args:
        earlier: globs, one of which finds something in such a folder of a version that left no mark.
        flag: the option that names the folder.

    Raises:
        UserError: the folder holds what is not ours, or another process works in it.
    """
    claim(folder, kind, earlier, flag)
    try:
        hold = Hold.take(folder)
    except Busy:
        raise Busy(
            f"Folder {folder} is being worked on by another sd-erase process: wait until that has ended, or pass another folder "
            f"with {flag}."
        ) from None
    try:
        yield
    finally:
        hold.release()


def claim(folder: Path, kind: str, earlier: Sequence[str], flag: str = "--output") -> None:
    """Make `folder` one of ours; raises and takes its arguments as `working_in` does."""
    if is_claimed(folder, kind, earlier, flag):
        return
    if folder.exists():
        mark(folder, kind)
        return
    with contextlib.suppress(FileExistsError):  # another process was faster: then it is marked
        create(folder, kind, {}).release()


def is_claimed(folder: Path, kind: str, earlier: Sequence[str], flag: str = "--output") -> bool:
    """Whether `folder` carries our mark already; raises as `claim` does where it may not."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: pass a folder with {flag}.")
    found = mark_of(folder)
    if found is not None:
        if found.get("kind") != kind:
            raise UserError(
                f"Folder {folder} is another command's ({found.get('kind')}): pass a new or an empty folder with {flag}."
            )
        return True
    others = entries(folder)
    if others and not any(any(folder.glob(pattern)) for pattern in earlier):
        raise UserError(
            f"Folder {folder} holds what sd-erase did not make (such as {others[0]}): pass a new or an empty folder with {flag}."
        )
    return False
