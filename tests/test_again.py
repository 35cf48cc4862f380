"""What a command takes from an earlier one, what it leaves behind when it fails, and what happens when it is given again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sd_erase import catalog, stages
from sd_erase.cli import main
from sd_erase.config import RunConfig, load, to_dict
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir, fingerprint

failure: dict[str, BaseException] = {}
ran: list[str] = []


def stage_of(name: str) -> Any:
    """A stage that does its work once for the same settings, or fails as it is told to."""

    def stage(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
        inputs = fingerprint(to_dict(config)[name] if name != "report" else "", config.seed)
        if run.is_complete(name, inputs):
            return run.read_manifest(name) or {}
        if name in failure:
            raise failure[name]
        ran.append(name)
        if name == "harvest":
            run.pairs.write_text("")
            found = {"dataset": "x", "statistics": {"captions": 1}, "seconds": 1.0, "splits": "x"}
            sets = {"forget": {"train": 1, "validation": 1}, "retain": {"train": 1, "validation": 1}}
            return run.complete(
                name, inputs, {**found, "counts": sets, "reasons": {k: {} for k in sets}, "sample": {k: [] for k in sets}}
            )
        extra = {"files": [], "folder": str(run.path)} if name == "export" else {}
        return run.complete(name, inputs, {"pairs": 3, **extra})

    return stage


STAGES = ("harvest", "train", "generate", "evaluate", "report")
harvest, train, generate, evaluate, report = map(stage_of, STAGES)
export = stage_of("export")


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    failure.clear()
    ran.clear()
    monkeypatch.setattr(stages, "STAGES", {name: f"{__name__}:{name}" for name in STAGES})
    monkeypatch.setitem(catalog.EXPORTS, "comfyui", f"{__name__}:export")
    monkeypatch.setattr("sd_erase.pairs.is_harvested", lambda config, run: run.pairs.is_file())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


TRAIN = ("train", "--concept", "bicycle", "--device", "cpu")


def test_a_finished_command_given_again_does_nothing_and_says_so(outputs: Path) -> None:
    invoke(*TRAIN)
    again = invoke(*TRAIN, "--json")
    assert ran == ["harvest", "train"] and [path.name for path in outputs.iterdir()] == ["bicycle-pocket-0001"]
    assert "has finished this with these settings: nothing was done again; for another run pass --new" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["run"] == "outputs/bicycle-pocket-0001"
    for command in (("generate", "--prompts", "apple"), ("report",), ("export",)):
        assert "nothing was done" not in invoke(*command).stderr
        said = invoke(*command).stderr
        assert "nothing was done again." in said and "--new" not in said
    assert "nothing was done again" in invoke("harvest", "--concept", "bicycle", "--device", "cpu").stderr


def test_a_finished_demo_given_again_does_nothing_and_says_so(outputs: Path) -> None:
    demo = ("demo", "--device", "cpu", "--json")
    assert "nothing was done" not in invoke(*demo).stderr
    first = list(ran)
    assert sorted(first) == sorted((*STAGES, "export"))
    assert "nothing was done again; for another run pass --new" in invoke(*demo).stderr
    assert ran == first and len(list(outputs.iterdir())) == 1
    assert "nothing was done" not in invoke(*demo, "--train-steps", 7).stderr and len(list(outputs.iterdir())) == 2


def test_a_training_given_again_leaves_what_later_commands_were_told(outputs: Path) -> None:
    invoke(*TRAIN)
    invoke("generate", "--prompts", "apple", "--steps", 2)
    for again in (TRAIN, ("harvest", "--concept", "bicycle", "--device", "cpu")):
        invoke(*again)
        assert load(outputs / "bicycle-pocket-0001" / "config.yaml").generate.steps == 2
    assert ran == ["harvest", "train", "generate"]


def test_new_another_seed_or_other_settings_begin_another_run(outputs: Path) -> None:
    invoke(*TRAIN)
    for number, more in enumerate((("--new",), ("--seed", 3), ("--steps", 7)), 2):
        assert "nothing was done" not in invoke(*TRAIN, *more).stderr
        assert len(list(outputs.iterdir())) == number
    assert "pass one of the two" in invoke(*TRAIN, "--new", "--run", "outputs/bicycle-pocket-0001", code=2).stderr
    failure["train"] = KeyboardInterrupt()
    invoke(*TRAIN, "--new", code=130)
    failure.clear()
    invoke(*TRAIN, "--new")  # the interrupted one goes on
    assert len(list(outputs.iterdir())) == 5


def test_a_card_or_captions_that_changed_begin_another_run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke(*TRAIN)
    monkeypatch.setattr("sd_erase.pairs.is_harvested", lambda config, run: False)
    invoke(*TRAIN)
    assert len(list(outputs.iterdir())) == 2


def test_a_stage_with_nothing_to_do_keeps_the_record_of_its_work(outputs: Path) -> None:
    invoke(*TRAIN)
    run = RunDir("outputs/bicycle-pocket-0001")
    before = json.loads(run.run.read_text())["stages"]
    invoke(*TRAIN)
    assert json.loads(run.run.read_text())["stages"] == before


def test_what_a_command_inherits_is_said_in_one_line(outputs: Path) -> None:
    invoke(*TRAIN)
    first = invoke("generate", "--prompts", "apple", "--steps", 2, "--guidance", 1.5, "--negative-prompt", "fog").stderr
    assert "From " not in first.replace("device cpu", "") or "steps" not in first
    (line,) = [line for line in invoke("generate").stderr.splitlines() if line.startswith("From ")]
    assert line.startswith("From outputs/bicycle-pocket-0001/config.yaml: ")
    assert "steps 2 (--steps 0 for the default)" in line and "guidance 1.5 (--guidance -1 for the default)" in line
    assert (
        "prompts apple (--prompts for another)" in line and "negative prompt fog (--negative-prompt '' for the default)" in line
    )
    assert "concept" not in line and "base" not in line
    (line,) = [line for line in invoke("generate", "--steps", 0).stderr.splitlines() if line.startswith("From ")]
    assert "steps" not in line and "guidance" in line
    assert "steps" not in "".join(line for line in invoke("generate").stderr.splitlines() if line.startswith("From "))


def test_a_seed_for_one_command_is_not_what_the_run_was_made_with(outputs: Path) -> None:
    invoke(*TRAIN)
    invoke("generate", "--prompts", "apple", "--seed", 9, "--steps", 4)
    config = load(outputs / "bicycle-pocket-0001" / "config.yaml")
    assert (config.seed, config.device, config.generate.steps) == (0, "cpu", 4)
    invoke(*TRAIN)
    assert len(list(outputs.iterdir())) == 1


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("a bug"), OSError(5, "disk"), KeyboardInterrupt()])
def test_what_fails_is_not_kept(outputs: Path, error: BaseException) -> None:
    invoke(*TRAIN)
    run = RunDir("outputs/bicycle-pocket-0001")
    run.config.write_text("# mine\n" + run.config.read_text())
    before = run.config.read_bytes()
    for command, name in (
        (("generate", "--prompts", "apple", "--steps", 2), "generate"),
        (("train", "--run", run, "--steps", 3), "train"),
    ):
        failure[name] = error
        result = CliRunner().invoke(main, [str(argument) for argument in command])
        assert result.exit_code != 0
        assert run.config.read_bytes() == before
    failure.clear()
    invoke("generate", "--prompts", "apple")
    assert load(run.config).generate.steps == 0


def test_of_a_new_run_only_what_went_well_is_kept(outputs: Path) -> None:
    failure["train"] = UserError("Loss term 'redirect' is not finite")
    invoke(*TRAIN, "--max-forget", 20, "--learning-rate", 90, code=2)
    config = load(outputs / "bicycle-pocket-0001" / "config.yaml")
    assert (config.harvest.max_forget, config.train.learning_rate) == (20, 0.0)
    failure.clear()
    invoke(*TRAIN, "--max-forget", 20)  # goes on with what was harvested
    assert ran == ["harvest", "train"] and len(list(outputs.iterdir())) == 1


@pytest.mark.parametrize("harvested", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), 2),
    ],
)
def test_an_interrupted_training_is_found_again_with_its_settings(
    outputs: Path, error: BaseException, code: int, harvested: bool
) -> None:
    if harvested:
        invoke("harvest", "--concept", "bicycle", "--device", "cpu")
    failure["train"] = error
    invoke(*TRAIN, "--steps", 3, code=code)
    RunDir("outputs/bicycle-pocket-0001").metrics.write_text("{}\n")
    failure.clear()
    invoke(*TRAIN, "--steps", 3)
    assert len(list(outputs.iterdir())) == 1 and os.path.exists(outputs)
