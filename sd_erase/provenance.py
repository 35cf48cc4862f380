"""What a run was made with: versions, git state, hardware, time, memory and outcome of each stage, in run.json."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sd_erase
from sd_erase import forms, jsonfile
from sd_erase.config import RunConfig
from sd_erase.folders import is_locked
from sd_erase.rundir import RunDir, write_json_atomic

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "ultralytics", "safetensors")


def versions() -> dict[str, str | None]:
    """Versions of Python, sd-erase and the packages that results depend on (None: not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sd-erase": sd_erase.__version__}
    return found | {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from and whether it has local changes; None outside a checkout."""
    checkout = Path(sd_erase.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None  # a virtual environment inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, memory and, where torch is loaded already, the accelerator."""
    import psutil

    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def forget_peak_memory() -> None:
    """Begin to look for this process's largest resident memory anew, where the system can (Linux): of several trainings each has its own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float | None:
    """The largest resident memory of this process so far (see `forget_peak_memory`), in MB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands what `resource` tells down from the process that started this one
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return round(int(found[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def read_run(run: RunDir) -> dict[str, Any]:
    """run.json, or an empty mapping before the first stage."""
    record: dict[str, Any] = jsonfile.read_as(run.run, forms.RECORD) if run.run.is_file() else {}
    return record


def is_running(run: RunDir) -> bool:
    """Whether another live process is at work on the run: its lock says so, or, where there are no locks, its record.

    A process is told by its number and its start: a container gives the same few numbers again whenever it is started.
    """
    import psutil

    held = is_locked(run.path)
    if held is not None:
        return held
    record = read_run(run)
    if record.get("status") != "running" or record.get("host") != platform.node() or record.get("pid") == os.getpid():
        return False
    try:
        started = psutil.Process(record["pid"]).create_time()
        return abs(started - record["process_started"]) < 2.0  # the system's clock may have been set
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


@contextlib.contextmanager
def recorded(run: RunDir, stage: str, config: RunConfig) -> Iterator[None]:
    """Keep run.json while a stage runs: "running" at its start, then "complete", "failed" or "interrupted" with the error."""
    import psutil

    started = time.monotonic()
    record = read_run(run)
    entry: dict[str, Any] = {"status": "running", "started": _now()}
    earlier, done = record.get("stages", {}).get(stage), len(run.done)
    record.setdefault("created", entry["started"])
    record.update(
        run=run.name,
        concepts=list(config.concepts),
        base=config.base,
        seed=config.seed,
        host=platform.node(),
        pid=os.getpid(),
        process_started=round(psutil.Process().create_time(), 2),
        versions=versions(),
        git=git_state(),
    )

    def write(status: str, error: BaseException | None = None) -> None:
        entry.update(status=status, seconds=round(time.monotonic() - started, 2), peak_memory_mb=peak_memory_mb())
        if error is not None:
            entry["error"] = f"{type(error).__name__}: {error}"
        record.update(status=status, error=entry.get("error"), hardware=hardware(), updated=_now())
        # a stage that had nothing to do took the time that it took when it did it
        kept = earlier if status == "complete" and len(run.done) == done and earlier else entry
        record.setdefault("stages", {})[stage] = kept
        write_json_atomic(run.run, record)

    write("running")
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error)
        raise
    write("complete")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
