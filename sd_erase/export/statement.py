"""Where a file lost the statement of what was erased: programs that merge, convert or save again mostly drop the header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

VERSION = "sd_erase.version"
# a key that a program leaves in the header -> what it says of the file
TRACES = (
    ("sd_merge_recipe", "merged by A1111, Forge or SD.Next"),
    ("sd_merge_models", "merged by A1111, Forge or SD.Next"),
    ("modelspec.merged_from", "merged by kohya's sd-scripts"),
    ("mecha_recipe", "merged by sd-mecha"),
    ("merge_recipe", "merged by sd-mecha"),
    ("workflow", "saved by ComfyUI"),
    ("prompt", "saved by ComfyUI"),
    ("ss_network_module", "made by kohya's sd-scripts or for it"),
    ("sshs_model_hash", "saved by kohya's sd-scripts"),
    ("lora_adapter_metadata", "saved by diffusers"),
)
MAX_NAMES = 5


def lost_statement(metadata: Mapping[str, str], has_encoder: bool) -> list[str]:
    """What a header without a statement of ours tells of a file that holds (a change of) a text encoder.

    Returns:
        One note, or none where there is a statement, or nothing that could have been erased.
    """
    if not has_encoder or VERSION in metadata:
        return []
    if "sd_erase.concept" in metadata:
        return ["it is the encoder of a run, which has no hash to check: `sd-erase export` makes files that have one"]
    trace = next((words for key, words in TRACES if key in metadata), "")
    sources = sorted({name for name in _sources(metadata) if "without" in name.lower()})[:MAX_NAMES]
    note = "it states no erasure: whether a concept was erased from it, this file does not tell"
    if trace:
        note += f"; it was {trace}, and such programs drop the statement of their sources"
    if sources:
        note += f"; made from {', '.join(map(repr, sources))}, whose share in it nobody states: measure it"
    return [note]


def _sources(metadata: Mapping[str, str]) -> Iterator[str]:
    """The names of the models that a merge was made from, as far as its header has them."""
    yield from filter(None, (name.strip() for name in metadata.get("modelspec.merged_from", "").split(",")))
    for key in ("sd_merge_models", "sd_merge_recipe"):
        try:
            yield from _strings(json.loads(metadata.get(key, "null")))
        except (ValueError, RecursionError):  # a stranger's header
            continue


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
