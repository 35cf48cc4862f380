"""Whether this machine can do the work: versions, devices, attention, memory, caches and disk, with what is wrong and what to do.

Nothing is downloaded, and nothing trained: a device is asked for a small tensor, an attention for one call.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import provenance, resources
from sd_erase.images import working_attention
from sd_erase.listing import megabytes, size_of

GIB = 2**30
LOW_DISK = 2 * GIB  # bytes: less does not hold one run of SDXL
# GiB of a card that a training with the default objective takes at its peak, by the table in the README ("Training at full size"); on a
# processor it was measured with other settings, so that nothing is said of that
PEAKS = {"Stable Diffusion 1.x": 4.6, "Stable Diffusion 2.x": 5.7, "Stable Diffusion XL": 12.7}


@dataclass
class Examined:
    """What was found, in groups, and what is wrong with it, a sentence each."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine(root: Path) -> Examined:
    """Look at this machine.

    Args:
        root: where runs go.
    """
    found = Examined()
    found.groups["versions"] = {**provenance.versions(), "system": platform.platform()}
    found.problems += outdated(importlib.metadata.requires("sd-erase") or ()) if provenance.version_of("sd-erase") else []
    found.groups["devices"] = _devices(found.problems)
    found.groups["memory"] = _memory()
    found.groups["caches"] = _caches()
    found.groups["disk"] = _disk(root, found.problems)
    return found


def outdated(requirements: Iterable[str]) -> list[str]:
    """What is installed and older than `requirements` ("torch>=2.9") ask for, or missing; extras are left out."""
    from packaging.requirements import Requirement

    faults = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = provenance.version_of(wanted.name)
        if version is None:
            faults.append(f"{wanted.name} is not installed: pip install '{wanted.name}{wanted.specifier}'.")
        elif not wanted.specifier.contains(version, prereleases=True):
            faults.append(f"{wanted.name} {version} is not {wanted.specifier}: pip install '{wanted.name}{wanted.specifier}'.")
    return faults


def _devices(problems: list[str]) -> dict[str, Any]:
    import torch

    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    found: dict[str, Any] = {"auto": str(resources.device("auto"))}
    for name in (*names, "cpu"):
        device = torch.device(name)
        try:
            sums = float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum())
            works = "works" if sums == 64**3 else f"computes wrongly ({sums:g} for {64**3})"
        except (RuntimeError, AssertionError) as error:
            works = f"fails ({str(error).splitlines()[0][:120]})"
        if works != "works":
            problems.append(f"Device {name} {works}: pass --device with another one, or install a torch that fits it.")
        attention = working_attention(device, torch.float16 if device.type == "cuda" else torch.float32)
        found[name] = f"{_called(device)}; {works}; attention: {attention}"
    wide = resources.precision("auto", torch.device("cpu"), resources.WIDE)
    found["training on the cpu"] = "bfloat16 (matrix units)" if wide == "bf16" else "float32"
    return found


def _called(device: Any) -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {resources.free_memory(device) / GIB:.1f} free"
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads" if device.type == "cpu" else "Apple's graphics"


def _memory() -> dict[str, Any]:
    import psutil

    device, memory = resources.device("auto"), psutil.virtual_memory()
    found: dict[str, Any] = {"main": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"}
    for title, peak in PEAKS.items():
        found[title] = f"a training takes {peak} GiB of a card at its peak"
        if device.type == "cuda":
            free = resources.free_memory(device) / GIB
            found[title] += f": {'fits' if free >= peak else 'does not fit'} into {free:.1f} on {device}"
    return found


def _caches() -> dict[str, Any]:
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in hub.glob("models--*"))
    offline = " (offline: nothing is fetched)" if constants.HF_HUB_OFFLINE else ""
    return {
        "hub": f"{hub}: {megabytes(size_of(hub) if hub.is_dir() else 0)}{offline}",
        "models in it": ", ".join(models) or "none",
    }


def _disk(root: Path, problems: list[str]) -> dict[str, Any]:
    from huggingface_hub import constants

    found = {}
    for title, folder in {"runs": root, "temporary": Path(tempfile.gettempdir()), "hub": Path(constants.HF_HUB_CACHE)}.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        found[title] = f"{folder}: {megabytes(free)} free"
        if title != "hub" and not os.access(there, os.W_OK):
            problems.append(f"{there} cannot be written ({title}): {_elsewhere(title)}.")
        elif free < LOW_DISK:
            problems.append(f"{there} has {megabytes(free)} left ({title}): free some, or {_elsewhere(title)}.")
    return found


def _elsewhere(title: str) -> str:
    return {"runs": "pass another --output-root", "temporary": "set TMPDIR", "hub": "set HF_HOME"}[title]
