"""What `inspect` says of a file that another program saved again, merged, converted or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_export_formats import export, made, path_of, run_of

from sd_erase.export.integrity import ordered_sha256
from sd_erase.export.metadata import inspect_file
from sd_erase.formats import CONTENT, HASH, read_header


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file a format, of one run, and LoRAs of other kinds by what they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        folder = tmp_path_factory.mktemp("exports")
        _, source = made("sd15", folder, patch)
        settings, run = run_of(source, folder)
        found = {to: path_of(export(settings, run, to)) for to in ("lora", "lora-diff", "comfyui", "a1111")}
        settings, run = run_of(source, folder / "full", lora=False)
        for rank in (2, 5):
            output = str(folder / f"extracted{rank}.safetensors")
            found[f"extracted {rank}"] = path_of(export(settings, run, "lora", rank=rank, output=output))
    return found


def resaved(path: Path, folder: Path, change: Any = lambda tensors: tensors, drop: tuple[str, ...] = ()) -> Path:
    """The file as another program saves it: the header kept, the tensors in safetensors' own order."""
    metadata = {key: value for key, value in read_header(path).metadata.items() if key not in drop}
    target = folder / f"again-{path.name}"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), target, metadata)
    return target


@pytest.mark.parametrize("to", ["lora", "lora-diff", "comfyui", "a1111"])
def test_a_file_that_was_saved_again_is_intact(files: dict[str, Path], tmp_path: Path, to: str) -> None:
    path = files[to]
    again = resaved(path, tmp_path)
    found = inspect_file(again)
    assert (found["hash"], found["problems"]) == ("matches", [])
    if list(read_header(again).tensors) != list(read_header(path).tensors):
        assert any("saved again by another program" in note for note in found["notes"])
    assert to not in ("lora", "lora-diff") or list(read_header(again).tensors) != list(read_header(path).tensors)


LORAS = {"lora": 2, "extracted 2": 2, "extracted 5": 5}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_stands_as_alpha_up_down(files: dict[str, Path], kind: str) -> None:
    """InvokeAI tells a LoRA of SDXL by the first tensors; in another order it calls it unknown."""
    names = list(read_header(files[kind]).tensors)
    modules = [name.partition(".")[0] for name in names[::3]]
    assert names == [f"{module}.{part}" for module in modules for part in ("alpha", "lora_up.weight", "lora_down.weight")]


@pytest.mark.parametrize(("kind", "rank"), LORAS.items())
def test_alpha_is_the_rank_in_every_lora(files: dict[str, Path], kind: str, rank: int) -> None:
    """OpenVINO GenAI ignores a file's alpha: only where it equals the rank is the scale right there too."""
    tensors = safetensors.torch.load_file(files[kind])
    alphas = [name for name in tensors if name.endswith(".alpha")]
    assert len(alphas) == 12
    assert {float(tensors[name]) for name in alphas} == {rank}
    assert {len(tensors[name.replace(".alpha", ".lora_down.weight")]) for name in alphas} == {rank}


@pytest.mark.parametrize("to", ["lora", "comfyui", "a1111"])
def test_other_numbers_under_our_statement_are_a_problem(files: dict[str, Path], tmp_path: Path, to: str) -> None:
    """A merge that keeps the header would otherwise call itself erased."""
    path = files[to]

    def merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value * 0.5 if value.is_floating_point() else value for key, value in tensors.items()}

    for drop in ((), (HASH,)):  # with and without ModelSpec's own
        found = inspect_file(resaved(path, tmp_path, merged, drop))
        assert found["hash"] == "does not match" and "what its header says of an erasure does not hold" in found["problems"][0]


def test_another_autoencoder_leaves_the_encoder_intact(files: dict[str, Path], tmp_path: Path) -> None:
    path = files["a1111"]

    def baked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value + 1 if key.startswith("first_stage_model.") else value for key, value in tensors.items()}

    (problem,) = inspect_file(resaved(path, tmp_path, baked))["problems"]
    assert "tensors beside the text encoder" in problem and problem.endswith("the text encoder is.")


def test_files_of_the_former_version_still_open(files: dict[str, Path], tmp_path: Path) -> None:
    """They have ModelSpec's hash alone, over tensors in the order up, down, alpha."""
    path = files["lora"]
    header = read_header(path)
    layers = [name.removesuffix(".alpha") for name in header.tensors if name.endswith(".alpha")]
    order = [f"{layer}.{part}" for layer in layers for part in ("lora_up.weight", "lora_down.weight", "alpha")]
    metadata = {key: value for key, value in header.metadata.items() if key != CONTENT}
    metadata[HASH] = f"0x{ordered_sha256(header, order)}"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert inspect_file(tmp_path / "old.safetensors")["problems"] == []
    tensors[order[0]][0, 0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert "they were changed, damaged, or saved again" in inspect_file(tmp_path / "old.safetensors")["problems"][0]


def test_a_strangers_stale_hash_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"lora_unet_x.alpha": torch.tensor(1.0)}, path, {HASH: f"0x{64 * '0'}", "format": "pt"})
    found = inspect_file(path)
    assert found["hash"] == "does not match" and "kept the header" in found["notes"][-1]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ["this file does not tell"]),
        ({"prompt": "", "workflow": "{}"}, ["saved by ComfyUI", "drop the statement"]),
        ({"modelspec.merged_from": "My model without bicycle, other"}, ["merged by kohya's sd-scripts", "'My model without bicycle'"]),
        (
            {"sd_merge_recipe": "{}", "sd_merge_models": json.dumps({"ab": {"name": "v1-5-without-bicycle.safetensors"}, "cd": {"name": "x"}})},
            ["merged by A1111", "made from 'v1-5-without-bicycle.safetensors', whose share"],
        ),
        ({"sd_merge_models": "{not json"}, ["merged by A1111"]),
    ],
)  # fmt: skip
def test_a_lost_statement_is_said(files: dict[str, Path], tmp_path: Path, metadata: dict[str, str], words: list[str]) -> None:
    path = tmp_path / "merged.safetensors"
    for kind in ("a1111", "comfyui", "lora", "lora-diff"):
        safetensors.torch.save_file(safetensors.torch.load_file(files[kind]), path, {"format": "pt", **metadata})
        (note,) = [note for note in inspect_file(path)["notes"] if "states no erasure" in note]
        assert all(word in note for word in words)


def test_what_states_its_erasure_or_holds_no_encoder_has_no_such_note(files: dict[str, Path], tmp_path: Path) -> None:
    safetensors.torch.save_file({"decoder.x": torch.ones(2)}, tmp_path / "vae.safetensors")
    safetensors.torch.save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "unet.safetensors")
    for path in (*files.values(), tmp_path / "vae.safetensors", tmp_path / "unet.safetensors"):
        assert not any("states no erasure" in note for note in inspect_file(path)["notes"]), path
