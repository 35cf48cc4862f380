"""What a run finds outside its own folder: prompt lists, detector cards and recipes that ship with sd-erase, and the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd_erase import parallel
from sd_erase.errors import UserError, no_file

PACKAGE = Path(__file__).parent
SUFFIXES = {"prompts": (".txt", ".csv", ".tsv", ".jsonl", ".json"), "detectors": (".yaml", ".yml"), "recipes": (".yaml", ".yml")}


def packaged_folder(kind: str) -> Path:
    """Where the copies of `kind` that ship with sd-erase lie: inside the package (in a wheel), or at the top of a checkout."""
    return next(path for path in (PACKAGE / kind, PACKAGE / "_data" / kind, PACKAGE.parent / kind) if path.is_dir())


def names(kind: str) -> list[str]:
    """The names that ship with sd-erase, in order."""
    return sorted(path.stem for path in packaged_folder(kind).glob("*") if path.suffix in SUFFIXES[kind])


def find(kind: str, name: str | Path) -> Path:
    """The file behind `name`: a path of the user's own, then ``KIND/NAME`` in the working folder, then the shipped copy.

    Args:
        kind: a key of `SUFFIXES`.
        name: a path, or a bundled name with or without its folder and suffix ("apple", "prompts/apple.txt").

    Raises:
        UserError: no such file; the bundled names are listed.
    """
    given = Path(os.path.expanduser(name))  # of an unknown user nothing, where pathlib raises
    if os.path.isfile(given):  # False for a text that can be no path, where pathlib raises
        return given
    inner = Path(*given.parts[1:]) if given.parts[:1] == (kind,) else given
    if not given.is_absolute():
        for folder in (Path.cwd() / kind, packaged_folder(kind)):
            for candidate in (inner, *(inner.with_name(inner.name + suffix) for suffix in SUFFIXES[kind] if inner.name)):
                if os.path.isfile(folder / candidate):
                    return folder / candidate
    raise UserError(
        f"{kind.capitalize()} file {str(name)[:200]!r} {no_file(given)}: pass the path of a file, or one of: {', '.join(names(kind)) or 'none'}."
    )


def is_special(path: str | Path) -> bool:
    """Whether `path` is a pipe or a device, whose content is gone once it was read."""
    there = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return there or str(path).startswith(("/dev/", "/proc/"))


def device(name: str) -> Any:
    """The `torch.device` of a configuration's device name; of several processes each has a card of its own.

    Raises:
        UserError: the name is unknown, this machine has no such device, or it has fewer than processes.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Device {name!r} is unknown: pass auto, cpu, cuda or mps.") from error
    missing_cuda = chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"Device {name!r} is not available on this machine: pass --device cpu or --device auto.")
    parallel.check_devices(chosen.type)
    if parallel.size() > 1 and chosen.type == "cuda":
        if ":" in name:
            raise UserError(f"Device {name!r} is one card and {parallel.size()} processes want one each: pass --device cuda.")
        chosen = torch.device("cuda", parallel.local()[0])
        torch.cuda.set_device(chosen)
    return chosen


WIDE = 512  # from this width of a text encoder on, matrix units for bfloat16 pay


def precision(name: str, device: Any, width: int) -> str:
    """Accelerate's mixed precision for training: `name`, or what "auto" stands for.

    On a processor with matrix units for bfloat16 (AMX) a forward and backward pass of an encoder 512, 768 and 1,024 wide took .58, .56
    and .49 of the CPU time that float32 takes, of one 128 wide, as the pocket model's, 1.55 (one thread). The pocket model's default trained
    in bfloat16 (bicycle and chair, one seed) erases and keeps as in float32: listed words 1 of 300 images, unlisted 0 of 80, companions
    98.9 %, untouched prompts 100.2 %, 37.6 dB. On a card "auto" is float32: a step waits there for launches, and bfloat16 has more.

    Args:
        device: the `torch.device` that trains.
        width: of the text encoder's hidden states.
    """
    import torch

    if name != "auto":
        return name
    has_units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # torch 2.9 has no public name for it
    return "bf16" if device.type == "cpu" and width >= WIDE and has_units() else "no"


def free_memory(device: Any) -> int:
    """Bytes that are free on a `torch.device`: of the graphics card, else of this machine."""
    import psutil
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
