"""A folder of images with sidecar ``.txt`` captions, as LoRA trainers keep them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import Caption, lines, require_some
from sd_erase.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """One caption a non-empty line of ``NAME.txt`` beside each image ``NAME.jpg``, also in folders below; images without one are skipped.

    Raises:
        UserError: `path` is no folder, or a caption file is not UTF-8.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: pass a folder of images with a .txt caption beside each.")
    yield from require_some(_captions(path), path, "images with a .txt caption beside each")


def _captions(root: Path) -> Iterator[Caption]:
    for current, folders, files in os.walk(root):
        folders.sort()
        here = set(files)
        for name in sorted(files):
            image = Path(current, name)
            if image.suffix.lower() not in _SUFFIXES:
                continue
            sidecar = next((text for text in (f"{image.stem}.txt", f"{name}.txt") if text in here), None)
            if sidecar is None:
                continue
            relative = image.relative_to(root).as_posix()
            for number, line in enumerate(lines(Path(current, sidecar))):
                if line.strip():
                    yield Caption(f"{relative}#{number}", str(image.absolute()), line.strip(), None)
