"""The stages of a run by name, and the one way to run one: with its record in run.json and nothing on stdout."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from sd_erase import catalog, parallel
from sd_erase.config import RunConfig, dump
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress
from sd_erase.provenance import recorded
from sd_erase.rundir import RunDir, write_text_atomic

# name -> "module:function"; each is called with (config, run, progress)
STAGES = {
    "harvest": "sd_erase.pairs:harvest",
    "train": "sd_erase.erasure.stage:train",
    "generate": "sd_erase.images:generate",
    "evaluate": "sd_erase.evaluation:evaluate",
    "attack": "sd_erase.attacks.stage:attack",
    "report": "sd_erase.report:build_report",
}


def write_config(config: RunConfig, run: RunDir) -> None:
    """The resolved settings, into the run's config.yaml, atomically."""
    write_text_atomic(run.config, dump(config))


def writing(config: RunConfig, run: RunDir, about: dict[str, Any] | None = None) -> contextlib.AbstractContextManager[None]:
    """Be the one process that writes to `run`; a new one begins with the settings and says `about` in its mark."""
    return run.writing({run.config.name: dump(config)}, about)


def run_stage(stage: str, config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
    """Run one stage and return its result; ``export`` goes to the row of `catalog.EXPORTS` that the settings name."""
    # the libraries' own messages belong on stderr: stdout holds the result only
    with writing(config, run), recorded(run, stage, config), contextlib.redirect_stdout(sys.stderr):
        parallel.barrier()  # see `assist`
        if stage == "export":
            return catalog.resolve(catalog.EXPORTS, config.export.to, "Export format")(config, run, progress)
        return catalog.resolve(STAGES, stage, "Stage")(config, run, progress)


TOGETHER = ("train", "generate", "evaluate", "attack")  # the stages that several processes can do


def assist(stage: str, config: RunConfig, run: RunDir) -> None:
    """Do this process's share of a stage that the main process runs by `run_stage`; of a stage that is done alone, wait.

    Raises:
        UserError: the run lies where this process does not see it.
    """
    parallel.barrier()
    if not run.config.is_file():
        raise UserError(
            f"Process {parallel.rank()} of {parallel.size()} sees no run {run}: pass --output-root with a folder on a disk that all "
            "machines share."
        )
    if stage in TOGETHER:
        with contextlib.redirect_stdout(sys.stderr):
            catalog.resolve(STAGES, stage, "Stage")(config, run, NoProgress())


def output_of(stage: str, run: RunDir, result: dict[str, Any]) -> Path:
    """The path to show a user when `stage` is done."""
    if stage == "export":
        if "folder" in result:
            return Path(result["folder"])
        files = [Path(file["path"]) for file in result["files"]]
        return files[0] if len(files) == 1 else files[0].parent
    return {
        "harvest": run.pairs,
        "train": run.encoder,
        "generate": run.images / "contact.png",
        "evaluate": run.report / "evaluation.md",
        "attack": run.report / "attack.md",
        "report": run.report / "report.html",
    }[stage]
