"""The main job on the pocket model, as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import last_json

from sd_erase.cli import main
from sd_erase.rundir import RunDir, read_jsonl

PROMPTS = """# target and companions
A bicycle next to a dog in a park
A woman with a bike on the street
An elephant beside a bicycle
A red car near a bicycle
"""


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished demo, smaller than the real one."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "prompts.txt").write_text(PROMPTS)
    stdout = invoke(
        "demo", "--output-root", folder / "outputs", "--train-steps", 40, "--prompts", folder / "prompts.txt",
        "--images-per-prompt", 4, "--device", "cpu", "--json",
    )  # fmt: skip
    return RunDir(last_json(stdout)["run"])


def test_the_concept_goes_and_its_companions_stay(demo: RunDir) -> None:
    rows = {row["role"]: row for row in json.loads((demo.report / "evaluation.json").read_text())["rows"]}
    assert rows["target"]["original"]["rate"] >= 0.8 and rows["target"]["erased"]["rate"] <= 0.2
    assert rows["others"]["erased"]["rate"] >= 0.75


def test_the_run_directory_tells_the_whole_story(demo: RunDir) -> None:
    record = json.loads(demo.run.read_text())
    assert record["status"] == "complete" and set(record["stages"]) == {
        "harvest",
        "train",
        "generate",
        "evaluate",
        "export",
        "report",
    }
    assert all(stage["seconds"] >= 0 for stage in record["stages"].values())
    pairs = list(read_jsonl(demo.pairs))
    shares = [sum(pair["split"] == "train" for pair in pairs if pair["set"] == name) for name in ("forget", "retain")]
    assert shares[0] == pytest.approx(700, abs=70) and shares[1] == pytest.approx(2100, abs=200)
    index = list(read_jsonl(demo.images / "index.jsonl"))
    assert len(index) == 16 and all((demo.images / row[side]).is_file() for row in index for side in ("original", "erased"))


def test_the_page_is_self_contained(demo: RunDir) -> None:
    page = (demo.report / "report.html").read_text()
    assert "bicycle" in page and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_the_exported_encoder_draws_the_same_images_in_diffusers(demo: RunDir) -> None:
    """What a user of diffusers would do with the file, without sd-erase."""
    import numpy
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    from safetensors.torch import load_file

    from sd_erase.bases import POCKET_FOLDER

    (path,) = demo.export.glob("*.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_FOLDER, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    state = load_file(path)
    assert all(key.startswith("text_model.") for key in state)
    bare = not any(key.startswith("text_model.") for key in pipeline.text_encoder.state_dict())
    pipeline.text_encoder.load_state_dict(
        {key.removeprefix("text_model.") if bare else key: value for key, value in state.items()}
    )
    row = next(read_jsonl(demo.images / "index.jsonl"))
    image = pipeline(
        row["prompt"], num_inference_steps=15, guidance_scale=4.0, generator=torch.Generator().manual_seed(row["seed"])
    ).images[0]
    with Image.open(demo.images / row["erased"]) as stored:
        difference = numpy.asarray(image).astype(int) - numpy.asarray(stored.convert("RGB")).astype(int)
    assert abs(difference).mean() < 2.0  # the file is in half precision, the run was not


def test_a_finished_demo_is_not_done_again(demo: RunDir) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in (demo.path / "manifests").iterdir()
        if path.stem not in ("report", "export-comfyui")
    }
    invoke("generate", "--run", demo.path, "--json")
    invoke("evaluate", "--run", demo.path, "--json")
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["apple", "bicycle", "chair", "elephant"])
def test_the_default_settings_meet_the_bars(concept: str, tmp_path: Path) -> None:
    """400 images of each encoder: the target at most 4 %, everything else at least 95 % of its original rate."""
    run = tmp_path / concept
    invoke("train", "--concept", concept, "--run", run)
    invoke("generate", "--run", run, "--prompts", concept, "--images-per-prompt", 8)
    rows = {row["role"]: row for row in last_json(invoke("evaluate", "--run", run, "--json"))["rows"]}
    assert rows["target"]["original"]["rate"] >= 0.9
    assert rows["target"]["erased"]["rate"] <= 0.04
    assert rows["others"]["kept"] >= 0.95
