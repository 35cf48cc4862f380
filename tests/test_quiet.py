"""No command looks a host up, sends anything or writes beside the run, unless it fetches a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sd_erase import quiet

REPOSITORY = Path(__file__).parents[1]
# everything is noted before any library is imported; the interpreter itself tells of each look-up, connection and file
WATCHED = """
import json, os, sys

noted = []

def note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect", "socket.sendto"):
        if not (event == "socket.connect" and isinstance(arguments[1], (str, bytes))):  # a socket of this machine
            noted.append(f"{event} {arguments[1:]!r}" if event == "socket.connect" else f"{event} {arguments!r}")

sys.addaudithook(note)
from click.testing import CliRunner
from sd_erase.cli import main

for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    if result.exit_code:
        sys.exit(f"{command}: {result.output} {result.exception!r}")
exec(sys.argv[2])
print(json.dumps(noted))
"""
# what the commands import of the libraries that are known to look hosts up or to write at home
IMPORTS = """
from sd_erase.detection import load_detector
load_detector("pocket")
import diffusers.pipelines.stable_diffusion.pipeline_onnx_stable_diffusion, matplotlib.font_manager
"""


def watched(folder: Path, *commands: list[str], code: str = "") -> None:
    """Run commands in `folder` as a user with an empty home; assert that nothing is looked up and nothing left at home or in temp."""
    places = {"HOME": folder / "home", "TMPDIR": folder / "temporary"}
    for place in (*places.values(), folder / "work"):
        place.mkdir(exist_ok=True)
    left_out = ("XDG_", "HF_", "MPL", "YOLO_", "TORCH", "ORT_", "HUGGINGFACE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {name: str(place) for name, place in places.items()} | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands), code],
        capture_output=True,
        text=True,
        cwd=folder / "work",
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []
    assert [str(path.relative_to(folder)) for place in places.values() for path in place.rglob("*")] == []
    assert {path.name for path in (folder / "work").iterdir()} <= {"outputs", "recipe.yaml", FEW}


def test_the_libraries_look_nothing_up(tmp_path: Path) -> None:
    watched(tmp_path, ["inspect", "--help"], code=f"from sd_erase import quiet\nquiet.figures()\n{IMPORTS}")


@pytest.mark.slow
def test_training_drawing_measuring_and_exporting_look_nothing_up(tmp_path: Path) -> None:
    watched(
        tmp_path,
        ["train", "--concept", "bicycle", "--fast", "--data", "synthetic", "--max-forget", "40", "--max-retain", "80"],
        ["generate", "--prompts", "bicycle", "--images-per-prompt", "1", "--steps", "1"],
        ["evaluate"],
        ["report"],
        ["export", "--to", "diffusers", "--pipeline"],
    )


FEW = "few.txt"  # prompts: each image takes its time


@pytest.mark.slow
def test_attacking_exporting_and_merging_look_nothing_up(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / FEW).write_text("a bicycle next to a dog\na red bicycle on the grass\n")
    watched(
        tmp_path,
        ["demo", "--objective", "fast", "--prompts", FEW, "--images-per-prompt", "1"],
        ["attack", "--prompts", FEW, "--steps", "1", "--images-per-prompt", "1"],
        *(["export", "--to", to, "--force"] for to in ("comfyui", "lora", "lora-diff")),
        ["train", "--concept", "apple", "--fast", "--run", "outputs/apple"],
        ["merge", "outputs/apple", "outputs/bicycle-pocket-0001"],
        ["inspect", "outputs/apple/encoder/text_encoder/model.safetensors"],
    )


@pytest.mark.slow
def test_comparing_searching_and_reproducing_look_nothing_up(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    recipe = {
        "concepts": ["bicycle"], "methods": {"fast": {"train.objective": "fast"}}, "images": {"named": 1, "untouched": 1}, "prompts": 2,
    }  # fmt: skip
    (tmp_path / "work" / "recipe.yaml").write_text(json.dumps(recipe))
    watched(
        tmp_path,
        ["compare", "recipe.yaml"],
        ["sweep", "--concept", "apple", "--set", "train.objective=fast", "--over", "train.weights.preserve=10,20"],
        ["reproduce", "figure5", "cost", "--set", "train.steps=1"],
    )


def test_the_users_own_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*quiet.ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", "YOLO_CONFIG_DIR"):
        monkeypatch.setenv(name, "mine")
    quiet.process()
    with quiet.settings_elsewhere():
        assert all(os.environ[name] == "mine" for name in (*quiet.ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", "YOLO_CONFIG_DIR"))


def test_ultralytics_settings_go_where_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOLO_CONFIG_DIR", raising=False)
    seen: list[Any] = []
    with quiet.settings_elsewhere():
        seen.append(Path(os.environ["YOLO_CONFIG_DIR"]))
        assert seen[0].is_dir()
    assert "YOLO_CONFIG_DIR" not in os.environ and not seen[0].exists()
