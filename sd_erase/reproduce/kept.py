"""Finished experiments and sweeps: known again by the content of all that they were made from, and then not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sd_erase import chain, digests, resources
from sd_erase.config import load
from sd_erase.detection import load_detector
from sd_erase.errors import UserError
from sd_erase.evaluation import decides
from sd_erase.reproduce.bench import Bench
from sd_erase.rundir import RunDir, fingerprint, read_json, write_json_atomic


def key_of(bench: Bench, asked: Any, sides: Iterable[str], *, draws: bool, detects: bool) -> str:
    """A fingerprint of all that an experiment depends on beside its runs: what is asked, the base, the data and the code.

    Args:
        asked: as JSON has it.
        sides: the data that it reads.
        draws: whether more of the base than its text encoders decides.
        detects: whether the base's detector does.
    """
    base = digests.of_base(bench.base, bench.progress, text_only=not draws)
    data = {side: (bench.stamp(side), bench.content(side)) for side in sides}
    found = decides(load_detector(bench.base.detector, device=resources.device(bench.device))) if detects else ""
    models = (bench.base.source, base, digests.of_clip(bench.base, bench.progress))
    return fingerprint(asked, bench.exact, bench.device, models, data, found, digests.of_sources(""))


def known(path: Path, key: str, bench: Bench) -> dict[str, Any] | None:
    """What `write` left in `path`, where it is of this key and neither it, nor its files, nor its runs changed since; else None."""
    try:
        result = read_json(path)
        kept = result.pop("kept")
        if kept["key"] != key or kept["seal"] != fingerprint(result):
            return None
        files = {name: digests.of_file(path.parent / name) for name in kept["files"]}
        runs = {name: _stamp(RunDir(bench.folder / name)) for name in kept["runs"]}
    # of a version that kept nothing, damaged, or a file or a run is gone
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if (files, runs) == (kept["files"], kept["runs"]) else None


def write(path: Path, key: str, result: dict[str, Any], files: Sequence[Path], bench: Bench) -> dict[str, Any]:
    """Write `result` with what it was made from, and return it as it will be read."""
    result = json.loads(json.dumps(result))
    kept = {
        "key": key,
        "seal": fingerprint(result),
        "files": {file.relative_to(path.parent).as_posix(): digests.of_file(file) for file in files},
        "runs": {os.path.relpath(run.path, bench.folder): _stamp(run) for run in bench.used.values()},
    }
    write_json_atomic(path, {**result, "kept": kept})
    return result


def _stamp(run: RunDir) -> str:
    """The contents of a run on which figures were measured: its settings, pairs, encoder and models.

    Raises:
        UserError: the run is gone or its settings cannot be read.
    """
    config = load(run.config)
    links = chain.Chain(run, config)
    contents = [links.now(name) for name in ("pairs", "concepts", "encoder", "text", "clip")]
    manifest = run.read_manifest("train") or {}  # what a training cost stands there
    if not contents[0]:
        raise UserError(f"Run {run} has no pairs: run the same command again.")
    return fingerprint(run.config.read_bytes().hex(), contents, manifest)
