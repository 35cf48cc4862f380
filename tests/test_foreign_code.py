"""Code of others runs only where the user of the command line names it: never because a file of settings does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from sd_erase import catalog
from sd_erase.cli import main
from sd_erase.config import RunConfig, TrainConfig, dump
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir

NAME = "stranger_of_a_run:Mine"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that a module in the working folder, as one beside a run that somebody sent, leaves when it is imported."""
    module = NAME.partition(":")[0]
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom sd_erase.erasure.fast import ClosedForm\nclass Mine(ClosedForm): pass\n"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "ran"
    sys.modules.pop(module, None)


def call(*command: str) -> Result:
    return CliRunner().invoke(main, command)


@pytest.fixture
def settings_file(tmp_path: Path) -> str:
    config = RunConfig(concepts=("bicycle",), device="cpu", train=TrainConfig(objective=NAME))
    (tmp_path / "theirs.yaml").write_text(dump(config))
    return str(tmp_path / "theirs.yaml")


def test_a_run_that_names_code_runs_none(run: RunDir, marker: Path, settings_file: str) -> None:
    run.config.write_text(Path(settings_file).read_text())
    for command in ("harvest", "train", "generate", "evaluate", "attack", "export", "report"):
        result = call(command, "--run", str(run))
        assert not marker.exists(), command
        assert result.exit_code in (0, 2) and (result.exception is None or isinstance(result.exception, SystemExit)), command
        if command == "train":
            assert (
                f"Objective '{NAME}' is code of its own" in result.output and f"sd-erase --trust-code {NAME} ..." in result.output
            )
    assert call("merge", str(run), str(run), "--run", "outputs/both").exit_code == 2 and not marker.exists()


def test_a_settings_file_and_a_recipe_run_no_code(tmp_path: Path, marker: Path, settings_file: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"concepts": ["bicycle"], "methods": {"x": {"train.objective": NAME}}}))
    for command in (("train", "--config", settings_file), ("compare", "recipe.yaml")):
        result = call(*command)
        assert result.exit_code == 2 and "is code of its own, which a file of settings names" in result.output, result.output
        assert not marker.exists() and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--concept", "bicycle", "--objective", NAME),
        ("--trust-code", NAME, "train", "--config", "theirs.yaml"),
        ("reproduce", "figure3", "--method", NAME),
        ("sweep", "--concept", "apple", "--over", f"train.objective={NAME},sd"),
        ("sweep", "--concept", "apple", "--set", f"train.objective={NAME}", "--over", "train.batch_size=1,2"),
    ],
)
def test_what_the_user_types_is_run(command: tuple[str, ...], marker: Path, settings_file: str) -> None:
    # something that is wrong with this objective or at all, and said before any work
    wrong = {"reproduce": ("--dataset", "coco:nowhere"), "sweep": ("--set", "train.lora_rank=4")}
    result = call(*command, *wrong.get(command[0], ("--lora-rank", "4")))
    assert result.exit_code == 2 and marker.exists(), result.output
    assert "is code of its own" not in result.output


def test_another_name_than_the_typed_one_is_not_run(tmp_path: Path, marker: Path, settings_file: str) -> None:
    result = call("--trust-code", "another:Mine", "train", "--config", settings_file)
    assert result.exit_code == 2 and not marker.exists()


def test_a_python_program_names_what_it_imports_itself(marker: Path) -> None:
    with catalog.only_trusted(), pytest.raises(UserError, match="nobody asked to run"):
        catalog.resolve(catalog.METHODS, NAME, "Objective")
    assert not marker.exists()
    assert catalog.resolve(catalog.METHODS, NAME, "Objective").__name__ == "Mine" and marker.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json", "config.json"])
def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path: Path, file: str) -> None:
    """transformers would ask on the terminal whether to run what ``auto_map`` names."""
    from sd_erase import bases, components

    folder = tmp_path / "model"
    for path in bases.POCKET_FOLDER.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(bases.POCKET_FOLDER)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(bases.POCKET_FOLDER)).write_bytes(path.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoTokenizer": ["evil.Mine", "evil.Mine"], "AutoModel": "evil.Mine", "AutoImageProcessor": "evil.Mine"}
    for path in folder.rglob(file):
        path.with_name("evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": own, "custom_pipeline": "evil"}))
    components.load_pipeline(bases.resolve(str(folder)))
    assert not (tmp_path / "ran").exists()
