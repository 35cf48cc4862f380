"""The runs of a folder: what each erased, what of it is done, and how much room it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_erase.config import RunConfig, load
from sd_erase.errors import UserError
from sd_erase.provenance import is_running
from sd_erase.rundir import RunDir
from sd_erase.stages import STAGES


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        done: stages that are complete, in order; an export by its form ("export-comfyui").
        state: "running", "unfinished" (begun, not trained), "done", or "damaged".
        fault: what is wrong with its settings, a sentence; "" for nothing.
        completed: when its last stage was, in ISO 8601 UTC; "" if none.
        bytes: of all its files; images may be most of it.
    """

    name: str
    path: str
    concepts: tuple[str, ...]
    base: str
    objective: str
    done: tuple[str, ...]
    state: str
    fault: str
    completed: str
    bytes: int


def listed(root: Path) -> list[Listed]:
    """The runs right below `root`, the one whose work ended last first; what is no run is left out.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: pass --output-root with the one that holds runs, or run `sd-erase train` first.")
    found = [_listed(RunDir(path)) for path in sorted(root.iterdir()) if path.is_dir() and RunDir(path).is_ours()]
    return sorted(found, key=lambda one: one.completed, reverse=True)


def _listed(run: RunDir) -> Listed:
    done = [stage for stage in STAGES if run.read_manifest(stage) is not None]
    exports = sorted(
        path.stem for path in (run.path / "manifests").glob("export-*.json") if run.read_manifest(path.stem) is not None
    )
    config, fault = RunConfig(), ""
    try:
        config = load(run.config)
    except UserError as error:
        fault = str(error)
    state = "running" if is_running(run) else "done" if "train" in done else "unfinished"
    return Listed(
        run.name, str(run), config.concepts or ((config.concept_file,) if config.concept_file else ()), config.base, config.train.objective,
        (*done, *exports), "damaged" if fault else state, fault, max((run.completed(stage) for stage in done), default=""), size_of(run.path),
    )  # fmt: skip


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; what goes while it is looked at counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except OSError:
            continue
    return total


def megabytes(size: float) -> str:
    """For reading."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
