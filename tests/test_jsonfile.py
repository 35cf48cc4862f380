"""The JSON files of a run that came from somebody else, or was damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import made_as_it_is
from PIL import Image

from sd_erase import jsonfile
from sd_erase.concepts import read_concepts
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.report import build_report
from sd_erase.rundir import RunDir, read_jsonl, write_jsonl_atomic

DAMAGED = {
    "cut": '{"a": ', "nested": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "NaN": '{"a": NaN}', "infinite": '{"a": -Infinity}',
    "too large": '{"a": 1e999}', "huge": '{"a": ' + "9" * 5000 + "}", "list": "[1]", "text": '"x"', "no UTF-8": '{"a": "\udcff"}',
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_names_the_command_that_writes_it_again(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index.jsonl"
    path.write_text('{"a": 1}\n' + DAMAGED[kind] + "\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        UserError, match=r"index.jsonl is damaged \(line 2.*delete it and run `sd-erase generate` again"
    ) as caught:
        list(read_jsonl(path))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(set(DAMAGED) - {"list", "text"}))
def test_a_damaged_manifest_counts_as_none_and_other_files_are_named(run: RunDir, kind: str) -> None:
    for path in (run.manifest("train"), run.concepts):
        path.write_text(DAMAGED[kind], encoding="utf-8", errors="surrogateescape")
    assert run.read_manifest("train") is None
    with pytest.raises(UserError, match=r"concepts.json is damaged .*`sd-erase harvest` again"):
        read_concepts(run)


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "3", '[{"nmae": "x"}]', "null"])
def test_concepts_of_another_shape_are_damaged(run: RunDir, text: str) -> None:
    run.concepts.write_text(text)
    with pytest.raises(UserError, match=r"is damaged \(it\S* is missing or is not what stands there\)"):
        read_concepts(run)


def test_a_key_that_a_row_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text('{"prompt": "x"}\n\n{"a": 1}\n')
    first, second = read_jsonl(tmp_path / "index.jsonl")
    assert first["prompt"] == "x" and second.get("prompt") is None
    with pytest.raises(UserError, match=r"index.jsonl is damaged \(line 3 lacks 'prompt'\)"):
        second["prompt"]


def test_a_training_that_diverged_may_have_written_nan(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": NaN}\n')
    (row,) = jsonfile.read_lines(tmp_path / "metrics.jsonl", finite=False)
    assert row["loss"] != row["loss"]


@pytest.mark.parametrize("name", ["../../secret.png", "ABSOLUTE", "original/../../secret.png", "LINK", 5, ["x"]])
def test_a_run_from_a_stranger_shows_no_picture_from_outside_of_it(
    settings: RunConfig, evaluated: RunDir, tmp_path: Path, name: object
) -> None:
    secret = evaluated.path.parent / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    if name == "LINK":
        os.symlink(secret, evaluated.images / "original" / "link.png")
    name = {"ABSOLUTE": str(secret), "LINK": "original/link.png"}.get(str(name), name)
    rows = [{**row, "original": name} for row in read_jsonl(evaluated.images / "index.jsonl")]
    write_jsonl_atomic(evaluated.images / "index.jsonl", rows)
    for stage in ("generate", "evaluate"):
        made_as_it_is(evaluated, stage)  # a stranger's manifests fit what the stranger wrote
    says = (
        "lies outside of the run's images" if isinstance(name, str) else "line 1.original is missing or is not what stands there"
    )
    with pytest.raises(UserError, match=says):
        build_report(settings, evaluated)
