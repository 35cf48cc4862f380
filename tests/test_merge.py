"""Two separate erasures made one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from sd_erase import bases, chain
from sd_erase.captions.pocket import render
from sd_erase.cli import main
from sd_erase.clip import load_towers, prefixed
from sd_erase.concepts import read_concepts
from sd_erase.config import load
from sd_erase.erasure.merge import merged_config
from sd_erase.pairs import read_pairs
from sd_erase.rundir import RunDir, write_json_atomic


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    root = tmp_path_factory.mktemp("merge")
    render(root / "scenes", scenes=150)
    made = []
    for concept in ("bicycle", "elephant"):
        made.append(RunDir(root / concept))
        result = CliRunner().invoke(
            main,
            [
                "train",
                "--fast",
                "--concept",
                concept,
                "--dataset",
                f"pocket:{root / 'scenes'}",
                "--run",
                str(made[-1]),
                "--device",
                "cpu",
            ],
        )
        assert result.exit_code == 0, result.output
    return made


def test_the_merged_encoder_is_the_original_plus_both_changes(runs: list[RunDir], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["merge", *map(str, runs), "--run", str(tmp_path / "both")])
    assert result.exit_code == 0, result.output
    assert "bicycle: redirect" in result.output
    run = RunDir(tmp_path / "both")
    original = prefixed(load_towers(bases.resolve("pocket"), "cpu", need_images=False).text.state_dict())
    parts = [load_file(part.encoder / "text_encoder" / "model.safetensors") for part in (*runs, run)]
    for key, value in original.items():
        assert (parts[2][key] - (parts[0][key] + parts[1][key] - value)).abs().max() < 1e-5, key
    assert [concept.name for concept in read_concepts(run)] == ["bicycle", "elephant"]
    concepts = read_concepts(run)
    for pair in read_pairs(run):
        assert (pair.set == "forget") or not any(concept.find(pair.caption) for concept in concepts)
    manifest = run.require("train", "train")
    for row in manifest["interference"]:
        assert row["alone"]["redirect"] < 0.5  # the closed form erased each
        assert row["merged"]["redirect"] < 1.0
        assert row["merged"]["preserve"] > 0
    assert manifest["anchor"].keys() == {"bicycle", "elephant"}
    assert "nothing was done" not in result.stderr
    written = (run.encoder / "text_encoder" / "model.safetensors").stat().st_mtime_ns
    again = CliRunner().invoke(main, ["merge", *map(str, runs), "--run", str(tmp_path / "both")])
    assert again.exit_code == 0 and "nothing was done again." in again.stderr and "bicycle: redirect" in again.stdout
    assert (run.encoder / "text_encoder" / "model.safetensors").stat().st_mtime_ns == written


def test_a_merge_of_a_name_that_was_asked_about_is_not_asked_about_again(runs: list[RunDir], tmp_path: Path) -> None:
    part = RunDir(shutil.copytree(runs[0].path, tmp_path / "part"))
    part.config.write_text(part.config.read_text().replace("exact: false", "exact: true"))
    config = merged_config([part, runs[1]])
    assert config.exact and config.concepts == ("bicycle", "elephant")


def test_runs_that_do_not_fit_together_are_refused(runs: list[RunDir], tmp_path: Path) -> None:
    for arguments, words in (
        ([runs[0]], "Only one run"),
        ([runs[0], runs[0]], "'bicycle' is erased by more than one"),
        ([runs[0], tmp_path / "none"], "no finished train stage"),
        ([runs[0], runs[1], "--run", runs[0]], "exists"),
    ):
        result = CliRunner().invoke(main, ["merge", *map(str, arguments), "--output-root", str(tmp_path / "outputs")])
        assert result.exit_code == 2, result.output
        assert words in result.output
    assert not list(tmp_path.glob("outputs/*"))


def test_a_merged_run_that_changed_is_mended_by_merging_again(runs: list[RunDir], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "both")
    assert CliRunner().invoke(main, ["merge", *map(str, runs), "--run", str(run)]).exit_code == 0
    config = load(run.config)
    assert chain.Chain(run, config).fault("train") is None
    path = run.encoder / "text_encoder" / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-3] + bytes([kept[-3] ^ 1]) + kept[-2:])
    refused = CliRunner().invoke(main, ["generate", "--run", str(run), "--prompts", "bicycle"])
    (command,) = re.findall(r"`sd-erase (merge [^`]+)`", refused.output)
    assert refused.exit_code == 2
    assert CliRunner().invoke(main, shlex.split(command)).exit_code == 0
    assert path.read_bytes() == kept and chain.Chain(run, config).fault("train") is None
    undone = CliRunner().invoke(main, ["train", "--run", str(run)])
    assert undone.exit_code == 2 and "was merged from" in undone.output and path.read_bytes() == kept


def test_an_encoder_of_another_base_is_not_merged(runs: list[RunDir], tmp_path: Path) -> None:
    """A difference from a base that is no longer there would be added to another one."""
    part = RunDir(shutil.copytree(runs[0].path, tmp_path / "part"))
    manifest = part.read_manifest("train")
    assert manifest is not None
    manifest["from"]["text"]["text_encoder/model.safetensors"] = "0" * 64
    write_json_atomic(part.manifest("train"), manifest)
    result = CliRunner().invoke(main, ["merge", str(part), str(runs[1]), "--run", str(tmp_path / "both")])
    assert result.exit_code == 2 and f"`sd-erase train --run {part}`" in result.output
