"""What the latest run is, which run goes on, which is finished, and what an earlier command left in its settings.

A run that is begun is found again by its settings: an unfinished one goes on, a finished one is taken once more, whose stages then find nothing
to do. What a later command was told stays in the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_erase import chain
from sd_erase.config import SECTIONS, RunConfig, load
from sd_erase.errors import UserError, is_full_disk
from sd_erase.folders import Busy
from sd_erase.provenance import is_running
from sd_erase.rundir import RunDir, write_text_atomic
from sd_erase.stages import write_config, writing

# the stages that a command does which begins a run, by its last one
STARTING = {
    "harvest": ("harvest",),
    "train": ("harvest", "train"),
    "report": ("harvest", "train", "generate", "evaluate", "export", "report"),
}
# the sections that only later commands read
LATER = {"harvest": tuple(SECTIONS)[1:], "train": tuple(SECTIONS)[2:]}


def runs_in(root: Path) -> Iterator[tuple[RunDir, RunConfig]]:
    """The runs of a folder with their settings, the newest first."""
    for path in sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):  # a broken run of the past is not this command's business
            if RunDir(path.parent).is_ours():
                yield RunDir(path.parent), load(path)


def differs(stored: RunConfig, config: RunConfig, last_stage: str, free: tuple[str, ...] = ()) -> bool:
    """Whether two configurations differ in what matters up to `last_stage`; `free`: sections that do not."""
    ignored = (*free, *LATER.get(last_stage, ()))
    names = [field.name for field in dataclasses.fields(config) if field.name not in ignored]
    return any(getattr(stored, name) != getattr(config, name) for name in names)


def with_later(config: RunConfig, run: RunDir, last_stage: str) -> RunConfig:
    """`config` with what the run's later commands left in its settings, where nothing else is asked for."""
    stored, later = load(run.config), LATER.get(last_stage, ())
    kept = {name: getattr(stored, name) for name in later if getattr(config, name) == SECTIONS[name]()}
    return dataclasses.replace(config, **kept)


def finished_run(root: Path, config: RunConfig, last_stage: str) -> RunDir | None:
    """The newest run that is done up to `last_stage` with these settings and whose captions and cards are as they were."""
    from sd_erase.pairs import is_harvested

    for run, stored in runs_in(root):
        if run.read_manifest(last_stage) is None or differs(stored, config, last_stage):
            continue
        if is_harvested(with_later(config, run, last_stage), run):
            return run
    return None


def unfinished_run(root: Path, config: RunConfig, last_stage: str) -> RunDir | None:
    """The newest run with the same settings whose `last_stage` is not complete.

    Raises:
        UserError: another process works on it.
    """

    def goes_on(stored: RunConfig, run: RunDir) -> bool:
        """Whether it is the same in what matters; a run that only harvested may be trained in any way."""
        free = ("train",) if not run.metrics.exists() and last_stage == "train" else ()
        return run.read_manifest(last_stage) is None and not differs(stored, config, last_stage, free)

    run = next((run for run, stored in runs_in(root) if goes_on(stored, run)), None)
    if run is None:
        return None
    if is_running(run):
        raise Busy(
            f"Run {run} has these settings and is being worked on by another sd-erase process: wait until that has ended, or pass "
            "--run with a folder of its own."
        )
    return run


def check_place(path: Path | None, new: bool) -> None:
    """Refuse a folder that may not become the run, or one beside a new run; raises `UserError`."""
    if path is not None and new:
        raise UserError("--new begins a run of its own and --run names one: pass one of the two.")
    if path is not None:
        RunDir(path).check_ours()


def begin(
    config: RunConfig, last_stage: str, root: Path, path: Path | None, new: bool, names: Mapping[str, str]
) -> tuple[RunConfig, RunDir]:
    """Settings and run of what may start one: the run at `path`, one with the same settings, or a new one.

    An unfinished run goes on; a finished one is taken again, whose stages then find nothing to do, unless `new`.

    Args:
        last_stage: a key of `STARTING`.
        root: where runs are looked for and begun.
        names: how the settings that were just given are called in a sentence, by dotted name.

    Raises:
        UserError: no concept, settings that cannot be worked with, or a run that has erased something else.
    """
    from sd_erase.bases import resolve
    from sd_erase.concepts import load_concepts
    from sd_erase.preflight import check

    if not config.concepts and not config.concept_file:
        raise UserError("No concept is given: pass --concept, for example --concept bicycle, or --concept-file.")
    load_concepts(config)  # names and cards are refused, or asked about, before a run is begun
    base = resolve(config.base)
    check(config, STARTING[last_stage], names)
    if path is not None:
        check_same_concept(config, RunDir(path))
        return config, RunDir(path)
    concept = "-".join(config.concepts) or Path(config.concept_file).stem
    run = unfinished_run(root, config, last_stage) or (None if new else finished_run(root, config, last_stage))
    return (config, RunDir.next(root, concept, base.name)) if run is None else (with_later(config, run, last_stage), run)


def trained(root: Path, path: Path | None) -> RunDir:
    """The run at `path`, or the one under `root` whose training ended last.

    Raises:
        UserError: there is none.
    """
    run = RunDir(path) if path is not None else RunDir.latest(root, "train")
    if not run.config.is_file():
        raise UserError(f"Run {run} has no config.yaml: pass the folder of a run with --run, or run `sd-erase train` first.")
    return run


def check_stage(config: RunConfig, run: RunDir, stage: str, names: Mapping[str, str]) -> None:
    """Refuse settings that `stage` could not work with on this run; raises `UserError`."""
    from sd_erase.preflight import check

    # what only reads what was drawn needs no base
    check(config, (stage,), names, chain.base_of(run, config) if stage in ("evaluate", "report") else None)


def check_same_concept(config: RunConfig, run: RunDir) -> None:
    """Refuse to train away what a run has erased: another concept is another run; raises `UserError`."""
    if run.read_manifest("train") is None or not run.config.is_file():
        return
    stored = load(run.config)
    if (stored.concepts, stored.concept_file) != (config.concepts, config.concept_file):
        erased = ", ".join(stored.concepts) or stored.concept_file
        raise UserError(f"Run {run} has erased {erased}, and would lose that: pass a new folder with --run for another concept.")


@contextlib.contextmanager
def working_on(config: RunConfig, run: RunDir, store: bool = True, about: dict[str, Any] | None = None) -> Iterator[None]:
    """Be the one process that writes to the run, and keep the settings in it: of a run that is begun first, of others once it went well.

    What fails is not kept, but what a full disk ended is; and where the input was wrong nothing is left of a new run. Of a new run in a folder that was there before, the folder stays; of one whose harvest names a file of what it missed, all.
    """
    is_new, is_made = not run.config.exists(), not run.path.exists()
    is_begun = not run.manifest("train").exists()  # what is begun must be found again after an interruption
    with writing(config, run, about):
        stored = None if is_new else load(run.config)
        before = "" if is_new else run.config.read_text(encoding="utf-8")
        written_first = store and not is_new and is_begun
        if written_first:
            write_config(config, run)
        try:
            yield
        except Exception as error:  # but no interruption
            if is_full_disk(error) and run.config.exists():  # the settings are right: the same command goes on with them
                raise
            if written_first:
                write_text_atomic(run.config, before)
            elif is_new and run.manifest("harvest").exists():
                write_config(without_failed(config, run), run)
            elif is_new and isinstance(error, UserError) and str(run.missing) not in str(error):
                run.discard(is_made)
            raise
        if store and stored is not None and not is_begun:
            # a seed or a device for one command is not what the run was made with
            kept = dataclasses.replace(config, seed=stored.seed, device=stored.device)
            if kept != stored:
                write_config(kept, run)


def without_failed(config: RunConfig, run: RunDir) -> RunConfig:
    """`config` with the default settings of the first stage that the run did not complete."""
    failed = next((name for name in SECTIONS if not run.manifest(name).exists()), None)
    return config if failed is None else dataclasses.replace(config, **{failed: SECTIONS[failed]()})
