"""Whether a file's numbers are those that its header speaks of, and where it lost the statement of what was erased."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sd_erase import formats
from sd_erase.formats import CONTENT, ENCODER_CONTENT, HASH, Header, content_sha256

BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Integrity:
    """What the hashes in a header say about the file's numbers."""

    state: str  # "matches", "does not match", "absent"
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def data_sha256(header: Header) -> str:
    """SHA-256 of all bytes after the header of a safetensors file, in hexadecimal, as ModelSpec defines it."""
    return ordered_sha256(header, header.tensors)


def ordered_sha256(header: Header, names: Iterable[str]) -> str:
    """The same, had the tensors stood in this order."""
    digest = hashlib.sha256()
    for name in names:
        for block in _blocks(header, name):
            digest.update(block)
    return digest.hexdigest()


def stored_content(header: Header, names: Iterable[str] | None = None) -> str:
    """The hash of a file's tensors (or of those with these names) that does not depend on their order."""
    digests = {}
    for name in header.tensors if names is None else names:
        digest = hashlib.sha256()
        for block in _blocks(header, name):
            digest.update(block)
        digests[name] = digest.hexdigest()
    return content_sha256(header.tensors, digests)


def _blocks(header: Header, name: str) -> Iterator[bytes]:
    start, end = header.tensors[name]["data_offsets"]
    with header.path.open("rb") as stream:
        stream.seek(header.start + start)
        while start < end and (block := stream.read(min(BLOCK, end - start))):
            start += len(block)
            yield block


def check(header: Header) -> Integrity:
    """Compare the numbers with the hashes that the header states.

    ModelSpec's hash depends on the order of the tensors, which every program that saves a file again may change; ours does not.
    """
    metadata = header.metadata
    stated = metadata.get(HASH, "").lower()
    if stated and stated == f"0x{data_sha256(header)}":
        return Integrity("matches")
    if content := metadata.get(CONTENT):
        return _check_content(header, content)
    if not stated:
        return Integrity("absent")
    if "sd_erase.version" not in metadata:
        return Integrity(
            "does not match",
            (f"{HASH} is not that of its numbers in their order: a program changed them, or their order, and kept the header",),
        )
    if stated == f"0x{ordered_sha256(header, _former_order(header))}":
        return _saved_again()
    return Integrity(
        "does not match",
        problems=(
            "its numbers do not have the hash that its header states: they were changed, damaged, or saved again in another order; "
            "export or download it again.",
        ),
    )


def _check_content(header: Header, content: str) -> Integrity:
    if content == stored_content(header):
        return _saved_again()
    own = header.metadata.get(ENCODER_CONTENT)
    if own and own == stored_content(header, formats.encoder_names(header.tensors)):
        problem = (
            "tensors beside the text encoder are not those that were exported (damaged, or changed by another program, such as "
            "another VAE); the text encoder is."
        )
    else:
        problem = (
            "its numbers are not those that sd-erase exported: it was merged, converted or damaged since, so what its header says of "
            "an erasure does not hold for it; export or download it again."
        )
    return Integrity("does not match", problems=(problem,))


def _saved_again() -> Integrity:
    return Integrity("matches", ("saved again by another program, in another order: the numbers are those that were exported",))


def _former_order(header: Header) -> list[str]:
    """The order of a LoRA's tensors in files of sd-erase 0.1.0, which had no other hash."""
    layers = [part.replace(".", "_") for part in formats.LINEARS]
    parts = ["lora_up.weight", "lora_down.weight", "alpha", "diff", "diff_b"]

    def place(name: str) -> tuple[str, int, int, int]:
        module, _, part = name.partition(".")
        encoder, _, rest = module.partition("_text_model_encoder_layers_")
        number, _, layer = rest.partition("_")
        known = number.isdigit() and layer in layers and part in parts
        return (encoder, int(number), layers.index(layer), parts.index(part)) if known else (name, 0, 0, 0)

    return sorted(header.tensors, key=place)
