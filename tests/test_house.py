"""``list``, ``doctor``, ``config`` and ``evaluate --fail-over``."""

from __future__ import annotations

import dataclasses
import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import last_json, replaced

from sd_erase import doctor, launch, listing, stages, template
from sd_erase.cli import main
from sd_erase.config import RunConfig, dump, load
from sd_erase.errors import OVER
from sd_erase.flags import FLAGS, spelling
from sd_erase.metrics.rates import row
from sd_erase.metrics.verdicts import over_limit
from sd_erase.provenance import version_of
from sd_erase.rundir import RunDir


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


# --- list ---------------------------------------------------------------------------------------------------------------------


def test_a_run_is_listed_with_what_is_done(evaluated: RunDir) -> None:
    root = evaluated.path.parent
    (root / "notes").mkdir()  # somebody's own folder
    begun = RunDir.create(root, "apple", "pocket")
    begun.config.write_text(dump(RunConfig(concepts=("apple",))), encoding="utf-8")
    broken = RunDir.create(root, "cat", "pocket")
    broken.config.write_text("train: {stepz: 3}", encoding="utf-8")
    result = invoke("list", "--output-root", root, "--json")
    found = last_json(result.stdout)
    first, *others = found["runs"]
    assert (first["name"], first["concepts"], first["state"]) == (evaluated.name, ["bicycle"], "done")
    assert first["done"] == ["harvest", "train", "generate", "evaluate"]
    assert first["bytes"] == sum(path.stat().st_size for path in evaluated.path.rglob("*") if path.is_file())
    assert found["bytes"] == sum(one["bytes"] for one in found["runs"])
    states = {one["name"]: one["state"] for one in others}
    assert states == {begun.name: "unfinished", broken.name: "damaged"}
    text = invoke("list", "--output-root", root)
    assert all(word in text.stdout for word in ("bicycle-pocket-0001", "generate,", "UNFINISHED", "DAMAGED", "3 runs in"))
    assert "stepz" in text.stderr


def test_a_run_that_is_worked_on_says_so(evaluated: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "is_running", lambda run: True)
    (found,) = listing.listed(evaluated.path.parent)
    assert found.state == "running"


def test_a_narrow_terminal_keeps_the_names_of_runs(evaluated: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = invoke("list", "--output-root", evaluated.path.parent).stdout.splitlines()
    assert any(line.startswith(evaluated.name) for line in lines) and max(map(len, lines[:-1])) <= 60


def test_no_folder_of_runs_is_one_sentence(tmp_path: Path) -> None:
    result = invoke("list", "--output-root", tmp_path / "none")
    assert result.exit_code == 2 and "is no folder: pass --output-root" in result.stderr


# --- config -------------------------------------------------------------------------------------------------------------------


def test_the_template_is_read_back_as_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    assert invoke("config", "--output", file).exit_code == 0
    assert load(file) == RunConfig()
    again = invoke("config", "--output", file)
    assert again.exit_code == 2 and "exists, and may hold settings of yours" in again.stderr
    nowhere = invoke("config", "--output", tmp_path / "none" / "settings.yaml")
    assert nowhere.exit_code == 2 and "none does not exist: make it" in nowhere.stderr
    assert invoke("config").stdout == file.read_text(encoding="utf-8")


def test_the_template_explains_every_setting_by_its_range_and_flag() -> None:
    text = template.template()
    flat = " ".join(line.lstrip(" #") for line in text.splitlines())
    for dotted, flag in FLAGS.items():
        assert f"({spelling(dotted)})" in flat or dotted == template.CONSENT
        assert flag.help in flat or dotted == template.CONSENT
    assert "A whole number from 0 to 10000000. (--steps)" in flat and "One of text, both. (--towers)" in flat
    assert max(map(len, text.splitlines())) <= template.WIDTH + 40  # a long word is not broken


def test_the_template_holds_a_runs_settings(run: RunDir, settings: RunConfig) -> None:
    changed = replaced(dataclasses.replace(settings, anchor="", seed=7), "train", weights={"preserve": 2.0}, steps=40)
    run.config.write_text(dump(changed), encoding="utf-8")
    text = invoke("config", "--run", run.path).stdout
    values = yaml.safe_load(text)
    assert (values["seed"], values["anchor"], values["train"]["weights"]) == (7, "", {"preserve": 2.0})
    file = run.path.parent / "again.yaml"
    file.write_text(text, encoding="utf-8")
    assert load(file) == changed
    assert last_json(invoke("config", "--run", run.path, "--json").stdout)["settings"]["train"]["steps"] == 40


def test_the_example_is_true() -> None:
    found = doctest.testmod(template)
    assert found.attempted and not found.failed


# --- doctor -------------------------------------------------------------------------------------------------------------------


def test_a_machine_that_works_has_no_problem(tmp_path: Path) -> None:
    result = invoke("doctor", "--output-root", tmp_path, "--json")
    found = last_json(result.stdout)
    assert set(found["groups"]) == {"versions", "devices", "memory", "caches", "disk"}
    assert found["groups"]["versions"]["torch"] == version_of("torch")
    assert "; works; attention: PyTorch SDPA" in found["groups"]["devices"]["cpu"]
    assert result.exit_code == (1 if found["problems"] else 0)


def test_what_is_old_missing_full_or_closed_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.outdated(["click>=8", "click>=99; extra == 'dev'"]) == []
    old, missing = doctor.outdated(["click>=99", "no-such-package-of-ours>=1"])
    assert old == f"click {version_of('click')} is not >=99: pip install 'click>=99'."
    assert missing == "no-such-package-of-ours is not installed: pip install 'no-such-package-of-ours>=1'."
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1_000_000))
    monkeypatch.setattr("os.access", lambda path, mode: "closed" not in str(path))
    (tmp_path / "closed").mkdir()
    found = doctor.examine(tmp_path / "closed" / "outputs")
    assert f"{tmp_path / 'closed'} cannot be written (runs): pass another --output-root." in found.problems
    assert any("has 1 MB left (temporary): free some, or set TMPDIR." in problem for problem in found.problems)
    text = invoke("doctor", "--output-root", tmp_path / "closed" / "outputs")
    assert text.exit_code == 1 and "Problem: " in text.stderr and "problems" in text.stdout


# --- evaluate --fail-over -----------------------------------------------------------------------------------------------------


def evaluation(found: int, images: int, original: int | None = None) -> dict[str, Any]:
    before = images if original is None else original
    return {
        "rows": [
            row("bicycle", "target", [True] * before + [False] * (images - before), [True] * found + [False] * (images - found))
        ]
    }


@pytest.mark.parametrize(
    ("found", "images", "passes"),
    [(0, 189, True), (0, 188, False), (2, 400, True), (3, 400, False), (0, 50, False), (40, 400, False)],
)
def test_the_upper_end_of_the_interval_decides(found: int, images: int, passes: bool) -> None:
    assert (over_limit(evaluation(found, images), 0.02) == []) is passes


def test_why_a_limit_is_not_kept_is_said() -> None:
    assert over_limit(evaluation(40, 400), 0.02) == [
        "bicycle is in 40 of 400 images (10%, with 95 % confidence up to 13.3 %), the limit is 2%."
    ]
    assert over_limit(evaluation(0, 50), 0.02)[0].endswith("not surely below: draw more images (--images-per-prompt, --prompts).")
    assert "its absence says nothing" in over_limit(evaluation(0, 400, original=10), 0.02)[0]
    without = {"rows": [row("bicycle", "target", [True] * 9, None)]}
    assert "no image of an erased model" in over_limit(without, 0.02)[0]
    blind = {**evaluation(0, 400), "detector": {"calibration": {"bicycle": {"blind": True}}}}
    assert "the judge cannot tell bicycle" in over_limit(blind, 0.02)[0]  # its zero is no zero
    assert over_limit({**evaluation(0, 400), "naming": {"bicycle": 0}}, 0.02)[0].startswith("nothing tells")


def test_a_blind_judge_and_images_of_a_single_colour_do_not_pass() -> None:
    blind = {"calibration": {"bicycle": {"blind": True}}}
    assert "the judge cannot tell bicycle" in over_limit({**evaluation(0, 400), "detector": blind}, 0.02)[0]
    overflowed = {**evaluation(0, 400), "images": 400, "left_out": 100, "flat": {"original": 0, "erased": 100}}
    assert over_limit(overflowed, 0.02) == [
        "nothing tells how often bicycle is left: too many of the erased images are a single colour."
    ]
    assert over_limit({**overflowed, "flat": {"original": 0, "erased": 10}, "left_out": 10}, 0.02) == []


@pytest.mark.parametrize(("limit", "code"), [("2%", OVER), ("0.02", OVER), ("8%", 0), ("0.0711", OVER), ("7.2 %", 0)])
def test_the_exit_code_says_it(run: RunDir, monkeypatch: pytest.MonkeyPatch, limit: str, code: int) -> None:
    def evaluate(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
        return run.complete("evaluate", "e", {**evaluation(0, 50), "warnings": []})

    monkeypatch.setattr(stages, "STAGES", {**stages.STAGES, "evaluate": f"{__name__}:evaluate_stage"})
    monkeypatch.setitem(globals(), "evaluate_stage", evaluate)
    monkeypatch.setattr("sd_erase.preflight._check_detector", lambda *_, **__: None)
    monkeypatch.setattr("sd_erase.cli.summary", lambda *_: "")
    result = invoke("evaluate", "--run", run.path, "--fail-over", limit)
    assert result.exit_code == code
    assert ("Over --fail-over: bicycle is in 0 of 50 images" in result.stderr) is bool(code)
    assert json.loads(invoke("evaluate", "--run", run.path, "--json").stdout)["rows"]  # without it the code is 0


@pytest.mark.parametrize("limit", ["", "2 percent", "nan%", "0", "100%", "-1%", "1.5"])
def test_a_limit_that_is_no_share_is_refused(run: RunDir, limit: str) -> None:
    result = invoke("evaluate", "--run", run.path, "--fail-over", limit)
    assert result.exit_code == 2 and "is no share: pass 2% or 0.02" in result.stderr


def test_several_processes_hand_the_code_on() -> None:
    assert launch.explain([OVER, 0]) == OVER and launch.explain([2, OVER]) == 2


def test_a_peak_is_that_of_a_card_and_nothing_is_said_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("fit" not in text for text in doctor._memory().values())
    monkeypatch.setattr(doctor.resources, "device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(doctor.resources, "free_memory", lambda _: 5 * 2**30)
    told = doctor._memory()
    assert "fits into 5.0 on cuda" in told["Stable Diffusion 1.x"] and "does not fit into 5.0" in told["Stable Diffusion XL"]
