"""Webdataset shards, as img2dataset writes them: tar files with a caption (``.txt``, or in ``.json``) beside each image."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_erase.captions.caption import Caption, Tally
from sd_erase.captions.columns import TEXT, column_of
from sd_erase.captions.files import MAX_ROW, MAX_TEXT, reading, take_out
from sd_erase.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_TEXTS = ("txt", "json", "caption", "text")


def read(files: Sequence[Path], tally: Tally, folder: Path | None, wanted: Collection[str] | None) -> Iterator[Caption]:
    """The captions of shards; their images are written where `wanted` names their keys.

    Raises:
        UserError: a shard is damaged or unsafe, or webdataset is not installed.
    """
    import tarfile

    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise UserError(f"Reading the shard {files[0]} needs webdataset: run `pip install 'sd-erase[webdataset]'`.") from error
    for shard in files:
        try:
            # no handler: a damaged archive raises instead of ending early
            for sample in group_by_keys(_members(shard, wanted or (), tally), handler=_raise):
                yield from _captions(shard, sample, tally, folder, wanted)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{shard} is no complete tar archive ({' '.join(str(error).split())[:120]}): download it again."
            ) from error


def _captions(
    shard: Path, sample: dict[str, Any], tally: Tally, folder: Path | None, wanted: Collection[str] | None
) -> Iterator[Caption]:
    place = f"{shard.stem}/{sample['__key__']}"
    text = _caption_of(sample, place, tally)
    if text is None:
        tally.skip("samples without a caption", place)
        return
    suffix = next((suffix for suffix in _IMAGES if suffix in sample), None)
    name = f"{place}.{suffix}"
    image = None
    if suffix and folder is not None:
        content = sample[suffix] if wanted is not None and f"{name}#0" in wanted else None
        image = take_out(folder / "images", name, content, shard)
    yield Caption(f"{name}#0", image, text, None)


def _members(shard: Path, wanted: Collection[str], tally: Tally) -> Iterator[dict[str, Any]]:
    """The files of a plain tar as webdataset groups them; images that nobody wants are passed over, not read."""
    import tarfile

    from webdataset.tariterators import base_plus_ext

    with reading(shard), open(shard, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":  # a compressed one could unfold without end
            raise UserError(f"{shard} is compressed, and no complete tar archive as it is: unpack it with gunzip.")
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it remembers every file
            base, suffix = base_plus_ext(member.name)
            if not member.isreg() or base is None:
                if not member.isdir():
                    tally.skip("members that are no sample's files", f"{shard.name}, {member.name}", quiet=member.isreg())
                continue
            is_text = suffix.lower() in _TEXTS
            if member.size > (MAX_TEXT if is_text else MAX_ROW):
                raise UserError(
                    f"{shard} holds a file of {member.size:,} bytes ({member.name[:80]!r}): it is no shard of captions; pass another with --dataset."
                )
            take = is_text or f"{shard.stem}/{base}.{suffix.lower()}#0" in wanted
            content = archive.extractfile(member).read() if take else b""  # type: ignore[union-attr]  # a regular file has one
            yield {"fname": member.name, "data": content, "__url__": str(shard)}
        archive.fileobj.seek(archive.offset)
        if len(archive.fileobj.read(512)) < 512:
            tally.note(
                f"{shard} ends without the mark that closes a tar archive: it may be cut short; download or write it again."
            )


def _raise(error: Exception) -> bool:
    raise error


def _caption_of(sample: dict[str, Any], place: str, tally: Tally) -> str | None:
    """A sample's caption, or None where it has none."""
    for suffix in ("txt", "caption", "text"):
        if sample.get(suffix, b"").strip():
            text = str(sample[suffix].decode("utf-8", errors="replace")).strip()
            if "\ufffd" in text:
                tally.keep("captions with letters that are not UTF-8", place)
            return text
    try:
        values = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):  # one unreadable sample in twelve million is skipped
        tally.skip("samples whose .json is none", place)
        return None
    column = column_of([name for name in values if isinstance(values[name], str)], TEXT) if isinstance(values, dict) else None
    return values[column].strip() or None if column is not None else None
