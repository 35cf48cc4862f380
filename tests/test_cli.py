from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import last_json

from sd_erase import stages
from sd_erase.cli import main
from sd_erase.config import RunConfig, load
from sd_erase.errors import UserError
from sd_erase.flags import resolve_config
from sd_erase.rundir import RunDir

ABOUT_NO_RUN = (
    "audit",
    "compare",
    "config",
    "doctor",
    "inspect",
    "list",
    "merge",
    "names",
    "reproduce",
    "sweep",
)  # about files, several runs, or many
COMMANDS = sorted(set(main.commands) - set(ABOUT_NO_RUN))
calls: list[tuple[str, RunConfig]] = []
failure: list[BaseException] = []
HARVESTED = {
    "dataset": "jsonl:captions.jsonl", "statistics": {"captions": 9}, "seconds": 1.0, "splits": "by image, 70% train",
    "counts": {"forget": {"train": 2, "validation": 1}, "retain": {"train": 4, "validation": 2}},
    "reasons": {"forget": {"word: bicycle": 3}, "retain": {f"names: {number}": 1 for number in range(8)}},
    "sample": {"forget": [{"caption": "A bicycle.", "reason": "word: bicycle"}], "retain": []},
}  # fmt: skip


def stage_of(name: str) -> Any:
    def stage(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
        calls.append((name, config))
        print("a library talks")
        if failure and name == "train":
            raise failure[0]
        found = HARVESTED if name == "harvest" else {"pairs": 3}
        return run.complete(name, "inputs", {**found, "warnings": ["a warning"]})

    return stage


harvest, train, generate, evaluate, attack, report = map(
    stage_of, ("harvest", "train", "generate", "evaluate", "attack", "report")
)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output root, with stages that only write their manifests."""
    calls.clear()
    failure.clear()
    monkeypatch.setattr(stages, "STAGES", {name: f"{__name__}:{name}" for name in stages.STAGES})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", [*COMMANDS, *ABOUT_NO_RUN])
def test_help_has_an_example_that_names_the_command(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout
    assert f"sd-erase {command}" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_stage_has_the_common_flags(command: str) -> None:
    flags = {name for parameter in main.commands[command].params for name in parameter.opts}
    assert {"--json", "--config", "--run", "--output-root", "--base", "--seed", "--device"} <= flags


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--objective", "best"),
        ("train", "--steps", "-1"),
        ("train", "--weight", "retain"),
        ("train", "--weight", "retain=much"),
        ("train", "--device", "tpu"),
        ("harvest", "--kind", "thing"),
        ("harvest", "--train-share", "1.5"),
        ("export", "--to", "paint"),
        ("export", "--dtype", "int8"),
        ("generate", "--unknown", "1"),
        ("paint",),
    ],
)
def test_an_unknown_value_exits_with_2(arguments: tuple[str, ...], outputs: Path) -> None:
    assert invoke(*arguments).exit_code == 2
    assert not outputs.exists()


def test_flags_override_the_file_and_the_file_the_run(tmp_path: Path) -> None:
    stored, file = tmp_path / "stored.yaml", tmp_path / "file.yaml"
    stored.write_text("concepts: [dog]\nseed: 1\ntrain: {steps: 1, batch_size: 8, weights: {forget: 1, retain: 1}}\n")
    file.write_text("seed: 2\ntrain: {steps: 2, weights: {retain: 2}}\n")
    flags = {"config_file": file, "train__steps": 3, "train__batch_size": None, "concepts": ()}
    config = resolve_config(flags, stored)
    assert (config.concepts, config.seed, config.train.steps, config.train.batch_size) == (("dog",), 2, 3, 8)
    assert config.train.weights == {"forget": 1.0, "retain": 2.0}


def test_train_harvests_first_and_stores_its_settings(outputs: Path) -> None:
    result = invoke(
        "train", "--concept", "bicycle", "--concept", "teddy bear", "--weight", "preserve=2", "--anchor", "", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert [name for name, _ in calls] == ["harvest", "train"]
    found = last_json(result.stdout)
    assert "a library talks" in result.stderr and "Warning: a warning" in result.stderr
    run = RunDir(found["run"])
    assert run.name == "bicycle-teddy-bear-pocket-0001"
    config = load(run.config)
    assert config == calls[-1][1]
    assert (config.concepts, config.anchor, config.train.weights) == (("bicycle", "teddy bear"), "", {"preserve": 2.0})


def test_later_commands_take_the_latest_trained_run_and_merge_their_flags(outputs: Path) -> None:
    invoke("train", "--concept", "bicycle", "--seed", 5)
    result = invoke("generate", "--prompts", "apple", "--steps", 7, "--height", 64)
    assert result.exit_code == 0, result.stderr
    name, config = calls[-1]
    assert (name, config.seed, config.generate.prompts, config.generate.steps) == ("generate", 5, ("apple",), 7)
    assert load(RunDir.latest(outputs, "train").config) == config
    assert result.stdout.strip().endswith("contact.png")


def test_a_later_command_without_a_run_says_what_to_do(outputs: Path) -> None:
    result = invoke("evaluate")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: No run with a finished train stage")
    assert "Traceback" not in result.stderr


def test_run_json_tells_versions_hardware_and_outcome(outputs: Path) -> None:
    invoke("train", "--concept", "bicycle")
    record = json.loads(RunDir.latest(outputs, "train").run.read_text())
    assert record["status"] == "complete" and record["error"] is None
    assert {stage["status"] for stage in record["stages"].values()} == {"complete"}
    assert {"python", "torch", "diffusers", "transformers", "ultralytics"} <= set(record["versions"])
    assert record["hardware"]["cores"] == os.cpu_count()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("Concept 'bicyle' matches no caption."), 2, "Error: Concept 'bicyle' matches no caption."),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/model.safetensors"),
            2,
            "Error: no space left on /x/model.safetensors",
        ),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), 2, "Error: no space left on"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Error: /x may not be written"),
        (KeyboardInterrupt(), 130, "Interrupted; run the same command again to resume"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(outputs: Path, error: BaseException, code: int, words: str) -> None:
    failure.append(error)
    result = invoke("train", "--concept", "bicycle")
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    record = json.loads((outputs / "bicycle-pocket-0001" / "run.json").read_text())
    assert record["status"] == ("interrupted" if code == 130 else "failed")


def test_the_same_command_resumes_what_was_interrupted(outputs: Path) -> None:
    failure.append(KeyboardInterrupt())
    invoke("train", "--concept", "bicycle")
    failure.clear()
    invoke("train", "--concept", "bicycle", "--seed", 1)  # other settings: another run
    assert invoke("train", "--concept", "bicycle", "--json").exit_code == 0
    invoke("train", "--concept", "bicycle")  # nothing left to resume: a new run
    names = ["bicycle-pocket-0001", "bicycle-pocket-0002", "bicycle-pocket-0003"]
    assert sorted(path.name for path in outputs.iterdir()) == names
    assert all(RunDir(outputs / name).read_manifest("train") for name in names)


def test_harvest_shows_counts_reasons_and_a_sample(outputs: Path) -> None:
    shown = invoke("harvest", "--concept", "bicycle").stdout
    assert "forget: 2 to train on, 1 to validate (word: bicycle 3)" in shown
    assert "    A bicycle.  [word: bicycle]" in shown
    assert "names: 5 1 and 2 more)" in shown


def test_data_is_another_spelling_of_dataset(outputs: Path) -> None:
    invoke("train", "--concept", "bicycle", "--data", "synthetic")
    assert calls[-1][1].harvest.dataset == "synthetic"


def test_harvest_writes_prompts_where_it_is_asked_to(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(config: RunConfig, run: RunDir, path: Path, count: int, progress: Any) -> dict[str, Any]:
        asked.append((path, count))
        return {"prompts": count, "prompts_file": str(path), "warnings": ["few"]}

    monkeypatch.setattr("sd_erase.pairs.write_prompts", write)
    arguments = ("harvest", "--concept", "bicycle", "--write-prompts", "held-out.txt", "-n", 7)
    result = invoke(*arguments)
    assert result.stdout.splitlines()[-1] == "held-out.txt" and "Warning: few" in result.stderr
    assert last_json(invoke(*arguments, "--json").stdout)["prompts_file"] == "held-out.txt"
    assert asked == [(Path("held-out.txt"), 7)] * 2


def test_train_goes_on_with_what_harvest_gathered(outputs: Path) -> None:
    invoke("harvest", "--concept", "bicycle")
    invoke("train", "--concept", "bicycle", "--steps", 3)
    assert [path.name for path in outputs.iterdir()] == ["bicycle-pocket-0001"]


def test_wrong_input_leaves_nothing_half_written(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "harvest", refuse)
        assert invoke("train", "--concept", "bicyle").exit_code == 2
    assert not list(outputs.glob("*"))
    invoke("train", "--concept", "bicycle")
    run = RunDir.latest(outputs, "train")
    before = run.config.read_text()
    monkeypatch.setattr(sys.modules[__name__], "generate", refuse)
    assert invoke("generate", "--prompts", "missing.txt").exit_code == 2
    assert run.config.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "No concept is given"),
        (("train", "--concept", "dog", "--base", "nowhere"), "Base 'nowhere' is unknown"),
        (("train", "--concept", "dog", "--config", "none.yaml"), "none.yaml does not exist"),
        (("generate", "--run", "nowhere"), "has no config.yaml"),
        (("inspect", "none.safetensors"), "does not exist"),
    ],
)
def test_bad_input_is_named(outputs: Path, arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert not outputs.exists()


def test_export_and_inspect(run: RunDir) -> None:
    result = invoke("export", "--run", run, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    path = Path(last_json(result.stdout)["output"])
    assert path.name == "bicycle-pocket-text_encoder-fp32.safetensors"
    found = last_json(invoke("inspect", path, "--json").stdout)
    assert (found["concept"], found["hash"], found["dtypes"]) == ("bicycle", "matches", ["F32"])
    assert "concept: bicycle" in invoke("inspect", path).stdout
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    damaged = invoke("inspect", path)
    assert damaged.exit_code == 2
    assert "is damaged" in damaged.stderr


def test_demo_runs_every_stage_for_bicycle(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_erase.demo.STAGES", ("harvest", "train", "generate", "evaluate", "report"))
    result = invoke("demo", "--train-steps", 9, "--json")
    assert result.exit_code == 0, result.stderr
    assert [name for name, _ in calls] == ["harvest", "train", "generate", "evaluate", "report"]
    config = calls[0][1]
    assert (config.concepts, config.base, config.train.steps, config.generate.images_per_prompt) == (("bicycle",), "pocket", 9, 2)
    assert last_json(result.stdout)["output"].endswith("report.html")


def test_python_m_sd_erase_runs() -> None:
    result = subprocess.run([sys.executable, "-m", "sd_erase", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("sd-erase, version ")


def test_figures_and_what_belongs_to_a_name_read_differently() -> None:
    from sd_erase.cli import summary

    told = summary(
        "train", {"stage": "train", "steps": 3, "anchor": {"bicycle": "object"}, "terms": {"redirect": 0.0711234, "n": 12345}}
    )
    assert told.splitlines() == ["steps: 3", "anchor: bicycle \u2192 object", "terms: redirect 0.07112, n 12345"]
