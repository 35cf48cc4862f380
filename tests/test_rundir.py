from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sd_erase.errors import UserError
from sd_erase.rundir import RunDir, fingerprint, read_jsonl, umask_mode, write_json_atomic, write_jsonl_atomic, write_text_atomic


def test_runs_are_numbered_and_named_after_concept_and_base(tmp_path: Path) -> None:
    names = [RunDir.create(tmp_path, "Teddy Bear", "sd/15").name for _ in range(2)]
    assert names == ["teddy-bear-sd-15-0001", "teddy-bear-sd-15-0002"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stage_is_complete_only_for_its_inputs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not run.is_complete("train", "a")
    run.complete("train", "a", {"steps": 3})
    assert run.is_complete("train", "a")
    assert not run.is_complete("train", "b")
    assert run.require("train", "train")["steps"] == 3
    run.reopen("train")
    with pytest.raises(UserError, match="run `sd-erase train --run "):
        run.require("train", "train")


def test_a_missing_stage_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    with pytest.raises(UserError, match=f"run `sd-erase train --run '{re.escape(str(run.path))}'` first"):
        run.require("train", "train")


def test_latest_is_the_run_whose_stage_was_completed_last(tmp_path: Path) -> None:
    first, second, older = (RunDir.create(tmp_path, "a", "b") for _ in range(3))
    for age, run in ((20, second), (10, first)):
        run.complete("train", "x", {})
        os.utime(run.manifest("train"), (age, age))  # what a copy does to the times of files
    assert RunDir.latest(tmp_path, "train").path == first.path
    write_json_atomic(older.manifest("train"), {"inputs": "x"})  # an older version's
    write_json_atomic(older.run, {"updated": "2024-05-01T12:00:00+00:00"})
    assert RunDir.latest(tmp_path, "train").path == first.path
    assert older.completed("train").startswith("2024-05-01")
    first.manifest("train").write_text('{"inputs": ')
    assert first.read_manifest("train") is None and RunDir.latest(tmp_path, "train").path == second.path
    with pytest.raises(UserError, match="No run with a finished evaluate"):
        RunDir.latest(tmp_path, "evaluate")


def test_fingerprint_reads_files_and_ignores_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    before = fingerprint({"x": 1, "y": 2}, path)
    assert before == fingerprint({"y": 2, "x": 1}, path)
    path.write_text("2")
    assert before != fingerprint({"x": 1, "y": 2}, path)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_json_lines_round_trip(tmp_path: Path) -> None:
    rows = [{"caption": "naïve\nbike"}, {"caption": "dog"}]
    write_jsonl_atomic(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_what_is_written_is_readable_by_the_umasks_rule(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        write_text_atomic(tmp_path / "x", "text")
        assert (umask_mode(), umask_mode(folder=True)) == (file, folder)
        assert (tmp_path / "x").stat().st_mode & 0o777 == file
        assert os.umask(mask) == mask  # reading it changed nothing
    finally:
        os.umask(before)
