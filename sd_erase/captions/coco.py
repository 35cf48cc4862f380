"""COCO captions: ``captions_*.json`` with its image folder beside it, or text alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import Caption, find_file, image_folder, image_inside, json_items, require_some
from sd_erase.errors import UserError


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """The captions of a COCO annotation file, or of the first one in a folder.

    Only the table of file names is held in memory. Images are looked for in ``train2017/`` (as the file's name says) and
    ``images/``, beside the file and one folder up.

    Raises:
        UserError: no such file, or a malformed one.
    """
    file = find_file(path, ("captions_*.json", "annotations/captions_*.json", "*.json"), "COCO captions")
    year = file.stem.replace("captions_", "").split("_text")[0]
    images = image_folder(
        root / name for root in (file.parent, file.parent.parent) for name in (year, "images", f"images/{year}")
    )
    if "text_only" in file.stem:
        images = None
    names: dict[int, str] = {}
    for row in json_items(file, "images.item"):
        try:
            names[row["id"]] = row["file_name"] + ""  # a TypeError where it is no text
        except (TypeError, KeyError) as error:
            raise UserError(f"{file} is no COCO file (a bad image: {error}): pass captions_train2017.json or alike.") from error

    def captions() -> Iterator[Caption]:
        for row in json_items(file, "annotations.item"):
            try:
                number, identifier, text = row["id"], row["image_id"], row["caption"].strip()
                name = names.get(identifier)
            except (TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{file} holds no captions (a bad annotation: {error}): pass captions_*.json.") from error
            if name is None:
                raise UserError(f"{file} has a caption of image {identifier}, which it does not list: download it again.")
            if text:
                yield Caption(f"{name}#{number}", image_inside(images, name, file) if images else None, text, None)

    yield from require_some(captions(), file, '"images" and "annotations" with captions')
