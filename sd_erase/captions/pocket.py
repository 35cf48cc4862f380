"""The embedded worlds' scenes as data sets, rendered to disk in Flickr30K's own layout and read from there like the real one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions.caption import Caption
from sd_erase.captions.named import flickr30k
from sd_erase.errors import UserError
from sd_erase.folders import entries, staging

SCENES = 3000  # each class stands in about 270 of them
CAPTIONS = 5  # an image, as Flickr30K has
FIRST_SEED = 7_000_000  # scenes that no component of a pocket model was trained on
TOKEN_FILE = "results_20130124.token"
IMAGES = "flickr30k-images"


def read(
    path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, world: str = "pocket", **_: Any
) -> Iterator[Caption]:
    """The captions of a world (of `pocket.worlds.WORLDS`) in `path`; the scenes are rendered there first where they are not yet."""
    if path.exists() and not path.is_dir():
        raise UserError(
            f"Data set {'pocket' if world == 'pocket' else 'pocket-art'}:{path} is a file: pass a folder for the rendered scenes."
        )
    if not (path / TOKEN_FILE).is_file():
        if folder is not None:  # named by the user: not the run's own
            check_free(path)
        render(path, world=world)
    yield from flickr30k(path, folder, wanted)


def read_art(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """`read` of the art world."""
    yield from read(path, folder, wanted, world="art")


def check_free(path: Path) -> None:
    """Refuse a folder for the scenes that holds anything but scenes; raises `UserError`."""
    own = re.compile(rf"{FIRST_SEED // 10**6:04d}\d{{6}}\.jpg")
    images = path / IMAGES
    others = [name for name in entries(path) if name not in (IMAGES, TOKEN_FILE)]
    if (path / TOKEN_FILE).is_file() and not (path / TOKEN_FILE).read_bytes().startswith(f"{FIRST_SEED:010d}.jpg#0\t".encode()):
        others.insert(0, TOKEN_FILE)
    others += [f"{IMAGES}/{name}" for name in entries(images) if not own.fullmatch(name)] if images.is_dir() else []
    if others:
        raise UserError(
            f"Scenes are to be rendered into {path}, which holds other files (such as {others[0]}): pass a new or an empty folder, or "
            "the reader of what is there."
        )


def render(
    folder: Path, scenes: int = SCENES, first_seed: int = FIRST_SEED, progress: Any = None, *, world: str = "pocket"
) -> Path:
    """Draw `scenes` scenes into ``folder/flickr30k-images`` and write ``results_20130124.token`` last.

    Args:
        folder: where the data set goes.
        scenes: how many images.
        first_seed: number of the first scene; the same number gives the same data set on every machine.
        progress: told of each scene.
        world: of `pocket.worlds.WORLDS`.

    Returns:
        The token file: ``NAME.jpg#k<TAB>caption`` with five captions an image.
    """
    from sd_erase.pocket.worlds import WORLDS
    from sd_erase.progress import NoProgress

    own = WORLDS[world]

    images = folder / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    # two processes may render into one folder: each image and the list appear whole
    with staging(folder) as place, (progress or NoProgress())("rendering scenes", scenes) as task:
        for number in range(scenes):
            scene = own.sample(first_seed + number, noise=False)
            name = f"{first_seed + number:010d}.jpg"
            # little compression: the sprites are small
            own.render(scene)[0].save(place / name, quality=95, subsampling=0)
            os.replace(place / name, images / name)
            captions = [scene.caption, *own.captions(scene, CAPTIONS - 1)]
            rows += [f"{name}#{index}\t{caption}" for index, caption in enumerate(captions)]
            task.advance()
        (place / TOKEN_FILE).write_text("\n".join(rows) + "\n", encoding="utf-8")
        os.replace(place / TOKEN_FILE, folder / TOKEN_FILE)
    return folder / TOKEN_FILE
