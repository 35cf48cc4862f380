"""Contents as digests: which files make a model what it is, and the SHA-256 of each.

What is compared is always content. A command reads a large file once: while it runs, the file's identity (device, inode, size and the
time of its last change, which neither a copy nor ``touch`` can set back) says that nobody wrote to it since. None of that is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sd_erase import onefile
from sd_erase.bases import IMAGE_TEXT, Base
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import fingerprint
from sd_erase.weights import component_files

Contents = dict[str, str]  # name inside the whole -> its SHA-256 in hexadecimal
BLOCK = 1 << 20
LARGE = 1 << 24  # bytes; what is smaller is read again whenever it is asked for
SHOWN = 1 << 28  # bytes that still have to be read, from which on a bar is shown
DESCRIBING = (".json", ".txt", ".model")
UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # components that no image and no encoder depends on

_read: dict[tuple[int, ...], str] = {}


def of_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        advance: told of each megabyte that was read.
    """
    identity = _identity(path)
    if identity in _read:
        return _read[identity]
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
            advance(1)
    if size >= LARGE:
        _read[identity] = digest.hexdigest()
    return digest.hexdigest()


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


def of_files(folder: Path, files: Iterable[Path], progress: Progress | None = None) -> Contents:
    """Path inside `folder` -> SHA-256, in order; a bar is shown where that takes more than a moment."""
    chosen = sorted(files)
    left = sum(path.stat().st_size for path in chosen if _identity(path) not in _read)
    shown = (progress or NoProgress()) if left >= SHOWN else NoProgress()
    with shown("checking contents", -(-left // BLOCK)) as task:
        return {path.relative_to(folder).as_posix(): of_file(path, task.advance) for path in chosen}


def of_base(base: Base, progress: Progress | None = None, *, text_only: bool = False) -> Contents | None:
    """What makes a base model draw as it does, or None where it is not at hand (moved, not fetched).

    Of a hub's model it is what the cache holds, under the names that the hub gives contents.

    Args:
        text_only: of its text encoders and tokenizers alone, where they are files of their own.
    """
    source = Path(base.source).expanduser()
    if source.is_file():
        contents = {"checkpoint": of_files(source.parent, [source], progress)[source.name]}
        beside = "" if text_only else onefile.decided_beside(source)
        return contents | ({"the .yaml beside it": fingerprint(beside)} if beside else {})
    folder = source if source.is_dir() else _snapshot(base.source)
    if folder is None:
        return None
    parts = {name for encoder in base.encoders for name in (encoder.name, encoder.tokenizer)}
    parts = parts if text_only else parts | _components(folder)
    index = [] if text_only else [folder / "model_index.json"]
    files = [file for part in parts for file in _model_files(folder / part)]
    files = _model_files(folder) if base.family in IMAGE_TEXT else [*files, *filter(Path.is_file, index)]
    return of_files(folder, files, progress) if source.is_dir() else _of_cached(folder, files)


def _components(folder: Path) -> set[str]:
    """The parts of a diffusers folder that its index names; folders beside them belong to somebody else."""
    try:
        listed = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the folder says what is wrong with it
        return set()
    return {name for name, value in listed.items() if isinstance(value, list) and any(value)} - UNUSED


def of_clip(base: Base, progress: Progress | None = None) -> Contents | None:
    """What makes the CLIP partner of a base what it is, or None where it is not at hand."""
    folder = Path(base.clip_partner).expanduser()
    if not folder.is_dir():
        cached = _snapshot(base.clip_partner)
        return None if cached is None else _of_cached(cached, _model_files(cached))
    folder = folder / "clip" if (folder / "clip").is_dir() else folder
    return of_files(folder, _model_files(folder), progress)


def _model_files(folder: Path) -> list[Path]:
    """The files of one component that are loaded: what describes it, and the weights in the precision that is chosen."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    weights: list[Path] = []
    for stem in ("model", "diffusion_pytorch_model"):
        with contextlib.suppress(UserError):  # whoever loads the component says what it lacks
            weights += component_files(folder, stem, folder.name)
    return [path for path in files if path.suffix in DESCRIBING] + weights


def _snapshot(identifier: str) -> Path | None:
    """Where the cache holds a hub's model."""
    if identifier.count("/") != 1:
        return None
    import huggingface_hub

    for file in ("model_index.json", "config.json", "text_encoder/config.json"):
        try:
            found = huggingface_hub.try_to_load_from_cache(identifier, file)
        except ValueError:  # no name that a hub could have
            return None
        if isinstance(found, str):
            return Path(found).parents[file.count("/")]
    return None


def _of_cached(folder: Path, files: Sequence[Path]) -> Contents:
    """The contents of a hub's files: the cache names what it holds by content, so that nothing large is read."""
    digests = {}
    for path in sorted(files):
        target = path.resolve()
        digests[path.relative_to(folder).as_posix()] = target.name if target.parent.name == "blobs" else of_file(path)
    return digests


def of_images(paths: Iterable[str]) -> Contents | None:
    """One digest of the contents of image files, or None where one of them is missing."""
    unique = sorted(set(paths))
    if not all(os.path.isfile(path) for path in unique):
        return None
    return {"images": fingerprint([of_file(Path(path)) for path in unique])} if unique else {}


def of_sources(*packages: str) -> str:
    """A short hash of the code that decides: of modules of sd-erase by name ("evaluation", "metrics", "attacks/prefix")."""
    root = Path(__file__).parent
    files: list[Path] = []
    for name in packages:
        files += sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
    return fingerprint([path.relative_to(root).as_posix() for path in files], *files)


def is_local(source: str) -> bool:
    """Whether a model is a file or folder of this machine, all of which is there; else a hub's, of which a part may be."""
    return Path(source).expanduser().exists()


def difference(recorded: Contents, found: Contents) -> str:
    """The first name under which two contents differ, or ""."""
    names: Sequence[str] = sorted(recorded.keys() | found.keys())
    return next((name for name in names if recorded.get(name) != found.get(name)), "")
