"""Every link of a finished run broken in every way: no figure is shown, and the command that the sentence names mends it."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import last_json
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_erase import bases, chain, digests
from sd_erase.captions.pocket import render
from sd_erase.cli import main
from sd_erase.config import dump, load, override
from sd_erase.export.diffusers import _measured
from sd_erase.export.job import Job
from sd_erase.resources import packaged_folder
from sd_erase.rundir import RunDir, read_json, read_jsonl, write_json_atomic, write_jsonl_atomic


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


PROMPTS = "A bicycle next to a dog in a park\nA red car near a bicycle\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of all stages with two prompts."""
    folder = tmp_path_factory.mktemp("chain")
    render(folder / "scenes", scenes=150)
    (folder / "prompts.txt").write_text(PROMPTS)
    run = RunDir(folder / "run")
    own = ("--run", run, "--device", "cpu")
    data = ("--dataset", f"pocket:{folder / 'scenes'}", "--max-forget", 30, "--max-retain", 30)
    invoke("train", "--concept", "bicycle", "--objective", "token", *data, *own)
    invoke("generate", "--prompts", folder / "prompts.txt", "--images-per-prompt", 1, "--steps", 2, *own)
    invoke("evaluate", *own)
    invoke("export", *own)
    shown = last_json(invoke("report", *own, "--json").stdout)
    assert shown["gone"] != "Not measured yet" and shown["pairs_shown"] == 2
    return run


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the finished run with a list of prompts of its own."""
    run = RunDir(shutil.copytree(finished.path, tmp_path / "run"))
    (name,) = load(finished.config).generate.prompts
    shutil.copyfile(name, tmp_path / "prompts.txt")
    for file in (run.config, run.manifest("generate")):
        file.write_text(file.read_text().replace(name, str(tmp_path / "prompts.txt")))
    return run


def own_base(run: RunDir) -> Path:
    """A copy of the run's base, which is the same to the chain: contents count, not places."""
    base = run.path.parent / "base"
    shutil.copytree(bases.POCKET_FOLDER, base, ignore=shutil.ignore_patterns("detector"))
    config = override(load(run.config), {"base": str(base)})
    run.config.write_text(dump(config))
    assert chain.Chain(run, config).fault("evaluate") is None
    return base


def first(run: RunDir, side: str = "erased") -> Path:
    return sorted((run.images / side).glob("*.png"))[0]


def lost_image(run: RunDir) -> None:
    first(run).unlink()


def truncated_image(run: RunDir) -> None:
    path = first(run, "original")
    path.write_bytes(path.read_bytes()[:-30])


def saved_again(run: RunDir) -> None:
    """By an editor that keeps a PNG's text."""
    with Image.open(first(run)) as image:
        image.load()
        text = PngInfo()
        for key, value in image.info.items():
            text.add_text(key, value)
        image.putpixel((3, 3), (1, 2, 3))
        image.save(first(run), pnginfo=text)


def images_of_the_other_side(run: RunDir) -> None:
    for path in (run.images / "original").glob("*.png"):
        shutil.copyfile(path, run.images / "erased" / path.name)


def edited_index(run: RunDir) -> None:
    path = run.images / "index.jsonl"
    path.write_text(path.read_text().replace("bicycle", "unicycle"))


def empty_index(run: RunDir) -> None:
    (run.images / "index.jsonl").write_text("not JSON\n")


def edited_detections(run: RunDir) -> None:
    rows = [{**row, "detections": []} for row in read_jsonl(run.detections / "erased.jsonl")]
    write_jsonl_atomic(run.detections / "erased.jsonl", rows)


def detections_of_the_other_side(run: RunDir) -> None:
    shutil.copyfile(run.detections / "original.jsonl", run.detections / "erased.jsonl")


def edited_figures(run: RunDir) -> None:
    values = read_json(run.report / "evaluation.json")
    values["rows"][0]["erased"]["rate"] = 0.123
    write_json_atomic(run.report / "evaluation.json", values)


def edited_table(run: RunDir) -> None:
    path = run.report / "evaluation.md"
    path.write_text(path.read_text() + "\nAll gone.\n")


def edited_concepts(run: RunDir) -> None:
    run.concepts.write_text(run.concepts.read_text().replace('"bicycle"', '"unicycle"'))


def edited_pairs(run: RunDir) -> None:
    rows = list(read_jsonl(run.pairs))
    write_jsonl_atomic(run.pairs, rows[: len(rows) // 2])


def another_encoder(run: RunDir) -> None:
    shutil.copyfile(
        bases.POCKET_FOLDER / "text_encoder" / "model.safetensors", run.encoder / "text_encoder" / "model.safetensors"
    )


def lost_encoder(run: RunDir) -> None:
    shutil.rmtree(run.encoder)


def edited_curves(run: RunDir) -> None:
    run.metrics.write_text(run.metrics.read_text().replace("0.", "0.0"))


def another_denoiser(run: RunDir) -> None:
    flip(own_base(run) / "unet" / "diffusion_pytorch_model.safetensors")


def another_scheduler(run: RunDir) -> None:
    path = own_base(run) / "scheduler" / "scheduler_config.json"
    write_json_atomic(path, {**read_json(path), "beta_start": 0.01})


def another_text_encoder(run: RunDir) -> None:
    flip(own_base(run) / "text_encoder" / "model.safetensors")


def another_clip(run: RunDir) -> None:
    base = own_base(run)
    run.config.write_text(dump(override(load(run.config), {"base": "pocket", "train.clip": str(base)})))
    flip(base / "clip" / "model.safetensors")


def flip(path: Path) -> None:
    """Change one number of a safetensors file, with its size and its time as they were."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def other_prompts(run: RunDir) -> None:
    (name,) = load(run.config).generate.prompts
    Path(name).write_text(Path(name).read_text() + "A bicycle and a cat\n")


def damaged_manifest(run: RunDir) -> None:
    run.manifest("evaluate").write_text('{"inputs": ')


def lost_manifest(run: RunDir) -> None:
    run.manifest("generate").unlink()


def trained_otherwise(run: RunDir) -> None:
    invoke("train", "--run", run, "--anchor", "a thing")


def earlier_version(run: RunDir) -> None:
    for stage in ("harvest", "train", "generate", "evaluate"):
        kept = {key: value for key, value in run.read_manifest(stage).items() if key not in ("from", "made", "completed")}
        write_json_atomic(run.manifest(stage), kept)


# how a link is broken, the first command that mends it, and whether its mending is tried in the quick tests
BREAKS: list[tuple[Callable[[RunDir], None], str, bool]] = [
    (lost_image, "generate", True),
    (truncated_image, "generate", False),
    (saved_again, "generate", False),
    (images_of_the_other_side, "generate", False),
    (edited_index, "generate", False),
    (empty_index, "generate", False),
    (lost_manifest, "generate", False),
    (other_prompts, "generate", False),
    (another_denoiser, "generate", False),
    (another_scheduler, "generate", False),
    (earlier_version, "generate", False),
    (edited_detections, "evaluate", True),
    (detections_of_the_other_side, "evaluate", False),
    (edited_figures, "evaluate", False),
    (edited_table, "evaluate", False),
    (damaged_manifest, "evaluate", False),
    (edited_concepts, "train", False),
    (edited_pairs, "train", False),
    (another_encoder, "train", False),
    (lost_encoder, "train", False),
    (edited_curves, "train", False),
    (another_text_encoder, "train", False),
    (another_clip, "train", False),
    (trained_otherwise, "generate", False),
]


@pytest.mark.parametrize(("damage", "command"), [pytest.param(*each[:2], id=each[0].__name__) for each in BREAKS])
def test_no_figure_of_a_broken_chain_is_shown(run: RunDir, damage: Callable[[RunDir], None], command: str) -> None:
    damage(run)
    result = last_json(invoke("report", "--run", run, "--json").stdout)
    assert (result["gone"], result["broken"]) == ("Not measured yet", "Not measured yet")
    assert read_json(run.report / "report.json")["rows"] == []
    if command != "evaluate":  # pictures of other weights, or nobody knows of which
        assert result["pairs_shown"] == 0
    assert f"`sd-erase {command} --run {run}`" in result["warnings"][0]
    page = (run.report / "report.html").read_text()
    assert f"sd-erase {command} --run" in page and "Found by the detector" not in page
    if command != "evaluate":
        invoke("evaluate", "--run", run, "--confidence", 0.3, code=2)
    config = load(run.config)
    fault = chain.Chain(run, config).fault("evaluate")
    assert fault is not None and chain.check(run, config) != []
    if chain.Chain(run, config).fault("train") is None:
        card = _measured(Job.of(config, run))
        assert card.startswith("No figures") and f"`sd-erase {command}`" in card and str(run) not in card
    else:
        assert f"sd-erase {command} --run" in invoke("export", "--run", run, code=2).stderr


@pytest.mark.parametrize(
    ("damage", "command"),
    [pytest.param(*each[:2], id=each[0].__name__, marks=[] if each[2] else [pytest.mark.slow]) for each in BREAKS],
)
def test_the_command_that_is_named_mends_the_chain(run: RunDir, damage: Callable[[RunDir], None], command: str) -> None:
    before = {path.name: digests.of_file(path) for path in (run.images / "erased").glob("*.png")}
    damage(run)
    said = last_json(invoke("report", "--run", run, "--json").stdout)["warnings"][0]
    commands = re.findall(r"`sd-erase ([^`]+)`", said)
    assert [each.split()[0] for each in commands] == {
        "train": ["train", "generate", "evaluate", "report"],
        "generate": ["generate", "evaluate", "report"],
        "evaluate": ["evaluate", "report"],
    }[command]
    for each in commands:
        shown = invoke(*shlex.split(each), "--json")
        if each.startswith("generate") and damage in (lost_image, truncated_image, saved_again):
            assert last_json(shown.stdout)["drawn"] == 1  # that one alone
    result = last_json(shown.stdout)
    assert result["gone"] != "Not measured yet" and not any("`sd-erase" in text for text in result["warnings"])
    unknown = ("harvest", "train") if damage is earlier_version else ()  # how it was trained, nobody wrote down
    states = {link.stage: link.state for link in chain.check(run, load(run.config))}
    assert {stage for stage, state in states.items() if state != chain.OK} == {*unknown, "attack"}
    if damage in (lost_image, saved_again):
        (redrawn, other) = sorted((run.images / "erased").glob("*.png"))
        assert digests.of_file(other) == before[other.name] and redrawn == first(run)


def test_what_belongs_to_an_encoder_that_is_gone_is_put_aside(run: RunDir) -> None:
    old = (run.report / "evaluation.md").read_text()
    (name,) = [path.name for path in run.export.glob("*.safetensors")]
    invoke("report", "--run", run)
    assert name in (run.report / "report.html").read_text()
    trained_otherwise(run)
    assert not any((run.report / name).exists() for name in ("evaluation.md", "evaluation.json", "report.html"))
    (kept,) = (run.report / "earlier").glob("evaluate-*/evaluation.md")
    assert kept.read_text() == old
    invoke("report", "--run", run)  # the exported file holds the encoder of before
    assert name not in (run.report / "report.html").read_text() and (run.export / name).is_file()


def test_pairs_that_somebody_edited_are_not_lost(run: RunDir) -> None:
    edited_pairs(run)
    edited = run.pairs.read_text()
    assert "kept as pairs-changed.jsonl" in invoke("train", "--run", run).stderr
    assert (run.path / "pairs-changed.jsonl").read_text() == edited
    assert (
        len(list(read_jsonl(run.pairs))) == 2 * len(edited.splitlines())
        and chain.Chain(run, load(run.config)).fault("train") is None
    )


def test_a_detector_whose_weights_change_is_another_one(tmp_path: Path) -> None:
    from sd_erase.detection import load_detector
    from sd_erase.evaluation import decides

    shutil.copytree(bases.POCKET_FOLDER / "detector", tmp_path / "detector")
    card = tmp_path / "mine.yaml"
    text = (packaged_folder("detectors") / "pocket.yaml").read_text()
    card.write_text(re.sub(r"(weights|architecture): \S*/detector/", rf"\1: {tmp_path}/detector/", text))
    assert str(tmp_path) in card.read_text()
    before = decides(load_detector(card))
    assert decides(load_detector(card)) == before
    flip(tmp_path / "detector" / "model.safetensors")
    changed = decides(load_detector(card))
    card.write_text(card.read_text().replace("confidence: 0.", "confidence: 0.1"))
    assert len({before, changed, decides(load_detector(card))}) == 3
