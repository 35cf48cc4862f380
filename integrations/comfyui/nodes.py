"""The two nodes: what ComfyUI asks of a node; what they do is `sd_erase.comfyui`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = ("text_encoders", "loras", "checkpoints")  # where an erasure may lie
KINDS = ["object", "style", "person", "nudity"]
STRENGTH = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": "1: erased, 0: the original."}
_known: dict[tuple[str, int, int], bool] = {}  # whether a file is sd-erase's, by path, size and time


def _is_ours(path: Path) -> bool:
    from sd_erase import comfyui

    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _known:
        _known[key] = comfyui.is_ours(path)
    return _known[key]


def _choices() -> list[str]:
    """``loras/bicycle.safetensors`` and so on: the files of ComfyUI's folders that sd-erase wrote."""
    import folder_paths

    found = []
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if path and name.endswith(".safetensors") and _is_ours(Path(path)):
                found.append(f"{folder}/{name}")
    return found


def _path_of(choice: str) -> Path:
    import folder_paths

    folder, _, name = choice.partition("/")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def _shown(clip: Any, text: str) -> dict[str, Any]:
    for line in text.splitlines():
        if line.startswith("WARNING: "):
            logging.warning("sd-erase: %s", line.removeprefix("WARNING: "))
    return {"ui": {"text": [text]}, "result": (clip, text)}


class _Bar:
    """sd-erase's progress on ComfyUI's bar, a task at a time."""

    @contextlib.contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Any]:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(total or 1)
        yield self

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)


class LoadErasure:
    """A file of sd-erase on the connected CLIP."""

    CATEGORY = "sd-erase"
    DESCRIPTION = "Applies what sd-erase exported (a text encoder, a LoRA or a .diff file) to a CLIP, and says what it erases."
    RETURN_TYPES = ("CLIP", "STRING")
    RETURN_NAMES = ("clip", "about")
    FUNCTION = "load"
    OUTPUT_NODE = True  # so that what the file says is shown without a further node

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "file": (_choices(),), "strength": ("FLOAT", STRENGTH)}}

    @classmethod
    def IS_CHANGED(cls, clip: Any = None, file: str = "", strength: float = 1.0) -> str:
        status = _path_of(file).stat()
        return f"{file} {status.st_size} {status.st_mtime_ns} {strength}"

    def load(self, clip: Any, file: str, strength: float) -> dict[str, Any]:
        from sd_erase import comfyui

        return _shown(*comfyui.load(clip, _path_of(file), strength))


class EraseConcept:
    """The closed form on the connected CLIP; nothing is written."""

    CATEGORY = "sd-erase"
    DESCRIPTION = "Erases a concept from the connected CLIP in closed form. Quick, and easier to break than a training: measure what you rely on."
    RETURN_TYPES = ("CLIP", "STRING")
    RETURN_NAMES = ("clip", "about")
    FUNCTION = "erase"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip": ("CLIP",),
                "concept": ("STRING", {"default": "bicycle", "tooltip": "What is to go; several with commas."}),
                "anchor": ("STRING", {"default": "", "tooltip": "What stands in its place; empty: chosen by CLIP."}),
                "kind": (KINDS,),
                "keep": ("STRING", {"default": "", "tooltip": "Words that must stay, with commas."}),
                "strength": ("FLOAT", STRENGTH),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
            }
        }

    def erase(self, clip: Any, concept: str, anchor: str, kind: str, keep: str, strength: float, seed: int) -> dict[str, Any]:
        from sd_erase import comfyui

        return _shown(*comfyui.erase(clip, concept, anchor, kind, keep, strength, seed, _Bar()))


NODE_CLASS_MAPPINGS = {"SdEraseLoad": LoadErasure, "SdEraseConcept": EraseConcept}
NODE_DISPLAY_NAME_MAPPINGS = {"SdEraseLoad": "Load erasure", "SdEraseConcept": "Erase concept"}
