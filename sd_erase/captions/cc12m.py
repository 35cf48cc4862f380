"""Conceptual Captions (3M and 12M): the TSV in both column orders, or the webdataset shards that img2dataset writes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sd_erase.captions import MAX_ROW, MAX_TEXT, Caption, find_file, lines, require_some, take_out
from sd_erase.errors import UserError

_URL = re.compile(r"(?:https?|ftp)://|^//", re.IGNORECASE)
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def read(path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, **_: Any) -> Iterator[Caption]:
    """The captions of a TSV (``caption<TAB>url`` or ``url<TAB>caption``; text alone) or of ``*.tar`` shards.

    Raises:
        UserError: no such file, or a malformed one.
    """
    shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    if shards:
        yield from require_some(_shards(shards, folder, wanted), path, "samples with a .txt or .json caption and an image")
        return
    file = find_file(path, ("*.tsv", "*.tsv.gz"), "Conceptual Captions TSV or .tar shards")
    yield from require_some(_rows(file), file, "`caption<TAB>url` or `url<TAB>caption` rows")


def _rows(file: Path) -> Iterator[Caption]:
    url_first: bool | None = None
    bad = 0
    for number, line in enumerate(lines(file), 1):
        left, tab, right = line.partition("\t")
        right = right.split("\t", 1)[0]
        if url_first is None and tab:
            url_first = bool(_URL.match(left)) if bool(_URL.match(left)) != bool(_URL.match(right)) else None
        text = (right if url_first else left).strip()
        if not tab or url_first is None or not text:
            bad += bool(line.strip())
            if bad > 10 and bad > number // 100:
                raise UserError(f"{file}: {bad} of the first {number} lines are not `caption<TAB>url` or `url<TAB>caption`.")
            continue
        yield Caption(f"{number:09d}#0", None, text, None)


def _shards(shards: list[Path], folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    import tarfile

    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise UserError(f"Reading the shard {shards[0]} needs webdataset: run `pip install 'sd-erase[webdataset]'`.") from error
    for shard in shards:
        try:
            # no handler: a damaged archive raises instead of ending early
            for sample in group_by_keys(_members(shard, wanted or ()), handler=_raise):
                text = _caption_of(sample)
                if not text:
                    continue
                suffix = next((suffix for suffix in _IMAGE_SUFFIXES if suffix in sample), None)
                name = f"{shard.stem}/{sample['__key__']}.{suffix}"
                key = f"{name}#0"
                image = None
                if suffix and folder is not None:
                    content = sample[suffix] if wanted is not None and key in wanted else None
                    image = take_out(folder / "images", name, content, shard)
                yield Caption(key, image, text, None)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{shard} is no complete tar archive ({' '.join(str(error).split())[:120]}): download it again."
            ) from error


def _members(shard: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """The files of a plain tar as webdataset groups them; images that nobody wants are passed over, not read."""
    import tarfile

    from webdataset.tariterators import base_plus_ext

    with tarfile.open(shard, "r:") as archive:  # a compressed one could unfold without end
        for member in archive:
            archive.members = []  # type: ignore[assignment]  # else it remembers every file
            base, suffix = base_plus_ext(member.name)
            if not member.isreg() or base is None:
                continue
            is_text = suffix.lower() in ("txt", "json")
            if member.size > (MAX_TEXT if is_text else MAX_ROW):
                raise UserError(
                    f"{shard} holds a file of {member.size:,} bytes ({member.name[:80]!r}): it is no shard of captions."
                )
            take = is_text or f"{shard.stem}/{base}.{suffix.lower()}#0" in wanted
            content = archive.extractfile(member).read() if take else b""  # type: ignore[union-attr]
            yield {"fname": member.name, "data": content, "__url__": str(shard)}


def _raise(error: Exception) -> bool:
    raise error


def _caption_of(sample: dict[str, Any]) -> str:
    if "txt" in sample:
        return sample["txt"].decode("utf-8", errors="replace").strip()
    try:
        values = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):  # one unreadable sample in twelve million is skipped
        return ""
    return str(values.get("caption") or "").strip() if isinstance(values, dict) else ""
