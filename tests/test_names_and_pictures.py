"""Names that are no folder's, and pictures that are none: from recipes and runs of strangers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from conftest import finish_images, made_as_it_is
from PIL import Image

from sd_erase.comparison import _name, read_recipe
from sd_erase.config import RunConfig
from sd_erase.drawing import is_drawn, unreadable
from sd_erase.errors import UserError
from sd_erase.report import build_report
from sd_erase.rundir import RunDir, read_jsonl

HOSTILE = [
    "..",
    ".",
    "../../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "CON",
    "-rf",
    " ",
    "x" * 5000,
    "自転車",
    "犬",
    "a\x1b[2J",
    "~",
    ".hidden",
    "...",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_is_one_folder_below(text: str, tmp_path: Path) -> None:
    folder = tmp_path / _name(text)
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve() and len(folder.name) <= 60 and folder.name[0] not in ".-"


def test_names_of_one_folder_are_told_apart_or_refused(tmp_path: Path) -> None:
    assert _name("自転車") != _name("犬") and _name("x" * 100) != _name("x" * 101)
    assert (_name("cell phone"), _name("van Gogh"), _name("sd-1.5")) == ("cell-phone", "van-gogh", "sd-1.5")
    path = tmp_path / "recipe.yaml"
    path.write_text("concepts: [bicycle]\nmethods: {a b: {}, a-b: {}}")
    with pytest.raises(UserError, match="methods 'a b' and 'a-b' would have one folder"):
        read_recipe(path)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has a billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_a_picture_that_unfolds_without_end_is_damaged(settings: RunConfig, evaluated: RunDir) -> None:
    row = next(read_jsonl(evaluated.images / "index.jsonl"))
    path = evaluated.images / row["erased"]
    bomb(path)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert issubclass(Image.DecompressionBombError, unreadable()) and not is_drawn(path, "stamp")
    finish_images(evaluated)  # a stranger's manifests fit what the stranger wrote
    made_as_it_is(evaluated, "evaluate")
    with pytest.raises(UserError, match="is missing or damaged: run `sd-erase generate` again"):
        build_report(settings, evaluated)
