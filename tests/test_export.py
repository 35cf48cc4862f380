from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import made_as_it_is, replaced

from sd_erase import bases, catalog
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export.compare import largest_difference
from sd_erase.export.metadata import inspect_file
from sd_erase.export.text_encoder import export
from sd_erase.formats import read_header, text_encoder_keys
from sd_erase.rundir import RunDir


def exported(settings: RunConfig, run: RunDir, **values: str) -> tuple[Path, dict]:
    (file,) = export(replaced(settings, "export", **values), run)["files"]
    return Path(file["path"]), file


def test_clip_l_has_196_tensors() -> None:
    assert len(text_encoder_keys(12)) == 196
    assert len(text_encoder_keys(12, projection=True)) == 197


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.0), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_the_file_holds_the_erased_encoder(settings: RunConfig, run: RunDir, dtype: str, limit: float) -> None:
    path, file = exported(settings, run, dtype=dtype)
    tensors = safetensors.torch.load_file(path)
    original = safetensors.torch.load_file(run.encoder / "text_encoder" / "model.safetensors")
    assert set(tensors) == text_encoder_keys(2)
    assert all(torch.equal(tensors[key], original[key].to(getattr(torch, dtype))) for key in tensors)
    assert file["difference"] <= limit
    assert dtype == "float32" or file["difference"] > 0
    assert list(path.parent.iterdir()) == [path]


def test_a_file_states_what_was_measured_before_it(settings: RunConfig, evaluated: RunDir) -> None:
    metadata = read_header(exported(settings, evaluated)[0]).metadata
    figures = json.loads(metadata["sd_erase.figures"])
    assert figures["bicycle"] == {"original": [98, 100], "erased": [2, 100]}
    assert figures["others (mean over named objects)"]["erased"] == [80, 100]
    (evaluated.images / "original" / "0000-seed0.png").write_bytes(
        b"another image"
    )  # the figures no longer belong to what lies there
    metadata = read_header(exported(settings, evaluated)[0]).metadata
    assert "sd_erase.figures" not in metadata


def test_an_independent_loader_reads_it(settings: RunConfig, run: RunDir, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    path, _ = exported(settings, run, dtype="float32")
    folder = tmp_path / "loaded"
    folder.mkdir()
    (folder / "config.json").write_bytes((run.encoder / "text_encoder" / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(path.read_bytes())
    ids = torch.tensor([[62, 5, 7, 63]])
    states = [CLIPTextModel.from_pretrained(place)(ids).last_hidden_state for place in (folder, run.encoder / "text_encoder")]
    assert torch.equal(*states)
    assert not torch.equal(states[0], CLIPTextModel(CLIPTextModel.from_pretrained(folder).config)(ids).last_hidden_state)


def test_the_header_says_what_the_file_is(settings: RunConfig, run: RunDir) -> None:
    path, file = exported(settings, run)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata["format"] == "pt"
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert {"architecture", "implementation", "title", "description", "author", "date"} <= {
        key.removeprefix("modelspec.") for key in metadata
    }
    assert [metadata[f"sd_erase.{key}"] for key in ("concept", "base", "objective")] == ["bicycle", "pocket", "sd"]
    assert json.loads(metadata["sd_erase.anchor"]) == {"bicycle": "something"}
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert str(run.path.parent) not in str(metadata)  # a shared file tells nothing of its maker's disk


def test_position_ids_and_foreign_buffers_stay_out(settings: RunConfig, run: RunDir) -> None:
    source = run.encoder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(source)
    safetensors.torch.save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, source)
    made_as_it_is(run, "train")
    path, _ = exported(settings, run)
    assert set(safetensors.torch.load_file(path)) == set(tensors)


def test_output_may_be_a_file_or_a_folder(settings: RunConfig, run: RunDir, tmp_path: Path) -> None:
    mine = tmp_path / "here" / "mine.safetensors"
    assert exported(settings, run, output=str(mine))[0] == mine
    assert exported(settings, run, output=str(tmp_path / "there"))[0].parent == tmp_path / "there"
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match="neither a folder nor"):
        exported(settings, run, output=str(tmp_path / "text"))
    with pytest.raises(UserError, match="cannot be written"):
        exported(settings, run, output=str(tmp_path / "text" / "x.safetensors"))


def test_a_finished_export_is_kept_and_a_damaged_one_made_again(settings: RunConfig, run: RunDir) -> None:
    path, _ = exported(settings, run)
    os.utime(path, (1, 1))
    exported(settings, run)
    assert path.stat().st_mtime == 1
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    exported(settings, run)
    assert inspect_file(path)["hash"] == "matches"


def test_nothing_is_written_where_there_is_no_space(settings: RunConfig, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="no space left on"):
        exported(settings, run)
    assert not list(run.export.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(settings: RunConfig, run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        exported(settings, run, output=str(tmp_path / "locked"))


def test_an_encoder_that_overflows_half_precision_is_refused(settings: RunConfig, run: RunDir) -> None:
    source = run.encoder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(source)
    tensors["text_model.final_layer_norm.weight"][0] = 1e6
    safetensors.torch.save_file(tensors, source)
    made_as_it_is(run, "train")
    with pytest.raises(UserError, match="--dtype float32"):
        exported(settings, run)
    assert not run.export.exists()
    assert exported(settings, run, dtype="float32")[1]["difference"] == 0


def test_a_lossy_copy_is_not_given_its_name(settings: RunConfig, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_erase.export.compare.TOLERANCE", {"float16": 1e-9})
    with pytest.raises(UserError, match="changes by"):
        exported(settings, run)
    assert not list(run.export.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "no prefix", "absent"])
def test_a_broken_encoder_is_refused(settings: RunConfig, run: RunDir, damage: str) -> None:
    source = run.encoder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(source)
    if damage == "truncated":
        source.write_bytes(source.read_bytes()[:-10])
    elif damage == "missing tensor":
        del tensors["text_model.encoder.layers.0.mlp.fc1.bias"]
        safetensors.torch.save_file(tensors, source)
    elif damage == "no prefix":
        safetensors.torch.save_file({key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}, source)
    else:
        source.unlink()
    with pytest.raises(UserError, match="run `sd-erase train --run"):  # it is no longer what the training made
        exported(settings, run)
    made_as_it_is(run, "train")
    with pytest.raises(UserError, match="run `sd-erase train --run .* again"):  # nor would such a one be taken
        exported(settings, run)


def test_xl_exports_two_files_and_keeps_the_projection(settings: RunConfig, run: RunDir) -> None:
    first, second = run.encoder / "text_encoder", run.encoder / "text_encoder_2"
    second.mkdir()
    (second / "config.json").write_bytes((first / "config.json").read_bytes())
    tensors = safetensors.torch.load_file(first / "model.safetensors")
    safetensors.torch.save_file({**tensors, "text_projection.weight": torch.eye(16)}, second / "model.safetensors")
    settings = dataclasses.replace(settings, base="sdxl")
    made_as_it_is(run, "train", "sdxl")
    files = export(settings, run)["files"]
    assert [file["tensors"] for file in files] == [len(tensors), len(tensors) + 1]
    with pytest.raises(UserError, match="2 text encoders"):
        exported(settings, run, output="one.safetensors")


def test_largest_difference_by_hand() -> None:
    expected, found = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.5], [1.0, 0.25]])
    assert largest_difference([expected], [found]) == pytest.approx(0.25)


def test_inspect_tells_a_good_file_from_a_damaged_one(settings: RunConfig, run: RunDir) -> None:
    path, _ = exported(settings, run)
    found = inspect_file(path)
    assert (found["concept"], found["base"], found["layers"], found["hash"]) == ("bicycle", "pocket", 2, "matches")
    assert (found["problems"], found["dtypes"]) == ([], ["F16"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert inspect_file(path)["hash"] == "does not match"
    assert inspect_file(path)["problems"]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.x"], "checkpoint (Stable Diffusion 1.x)"),
        (["cond_stage_model.model.x"], "checkpoint (Stable Diffusion 2.x)"),
        (["conditioner.embedders.1.model.x"], "checkpoint (Stable Diffusion XL)"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "LoRA that changes the text encoder"),
        (["lora_unet_x.lora_up.weight"], "LoRA without a text encoder part"),
        (["encoder.layers.0.mlp.fc1.bias", "final_layer_norm.weight"], "CLIP text encoder without the prefix text_model."),
        (["down_blocks.0.x"], "UNet (diffusers)"),
        (["decoder.x"], "autoencoder"),
        (["something"], "unknown"),
    ],
)
def test_inspect_recognises_foreign_files(tmp_path: Path, keys: list[str], kind: str) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2) for key in keys}, path)
    found = inspect_file(path)
    assert (found["kind"], found["hash"], found["sd_erase"]) == (kind, "absent", None)


def test_inspect_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    pickle, truncated = tmp_path / "x.ckpt", tmp_path / "x.safetensors"
    pickle.write_bytes(b"")
    truncated.write_bytes(safetensors.torch.save({"a": torch.zeros(9)})[:-1])
    for path, message in ((pickle, "pickle"), (truncated, "no complete"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=message):
            inspect_file(path)


# --- what is there already ----------------------------------------------------------------------------------------------------


def export_to(settings: RunConfig, run: RunDir, to: str, output: Path, **values: Any) -> dict[str, Any]:
    config = replaced(settings, "export", to=to, output=str(output), **values)
    return catalog.resolve(catalog.EXPORTS, to, "Export")(config, run)


@pytest.mark.parametrize("to", ["comfyui", "lora", "lora-diff"])
def test_a_file_that_is_not_ours_or_was_changed_is_refused_before_any_work(
    settings: RunConfig, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    target = tmp_path / "mine.safetensors"
    other = {"lora": torch.zeros(3)}
    safetensors.torch.save_file(other, target)
    before = target.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sd_erase.export.lora._original", lambda *_: pytest.fail("it worked first"))
        patch.setattr("sd_erase.export.text_encoder.rounded", lambda *_: pytest.fail("it worked first"))
        with pytest.raises(UserError, match="was not written by sd-erase, or was changed since.* --force"):
            export_to(settings, run, to, target)
    assert target.read_bytes() == before
    assert export_to(settings, run, "comfyui", target, force=True)["files"][0]["path"] == str(target)
    export_to(settings, run, "comfyui", target, dtype="float32")  # its own, as it was written
    tensors = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(target).items()}
    safetensors.torch.save_file(
        tensors, target, read_header(target).metadata
    )  # another program's, which kept what we said of ours
    with pytest.raises(UserError, match="was changed since"):
        export_to(settings, run, "comfyui", target)


def test_no_export_hits_the_run_s_files_or_the_base(settings: RunConfig, run: RunDir) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for place in (
        run.encoder / "text_encoder" / "model.safetensors", run.encoder / "new.safetensors", run.path / "cache",
        bases.POCKET_FOLDER / "unet" / "diffusion_pytorch_model.safetensors", bases.POCKET_FOLDER / "new.safetensors",
    ):  # fmt: skip
        with pytest.raises(UserError, match="stay as they are|stays as it is"):
            export_to(settings, run, "comfyui", place, force=True)
    with pytest.raises(UserError, match="stay as they are|stays as it is"):
        export_to(settings, run, "diffusers", run.images, force=True)
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_an_exported_folder_is_replaced_only_as_it_was_written(settings: RunConfig, run: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "model"
    for dtype in ("float16", "float32"):
        export_to(settings, run, "diffusers", target, dtype=dtype)
    assert (
        read_header(target / "text_encoder" / "model.safetensors").tensors["text_model.final_layer_norm.bias"]["dtype"] == "F32"
    )
    (target / "samples").mkdir()
    (target / "samples" / "1.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"was changed since sd-erase wrote it \(such as samples/1.png\)"):
        export_to(settings, run, "diffusers", target)
    assert (target / "samples" / "1.png").read_bytes() == b"mine"
    export_to(settings, run, "diffusers", target, force=True)
    assert not (target / "samples").exists()
    (tmp_path / "home" / "photos").mkdir(parents=True)
    for folder in (tmp_path / "home", run.path.parent):
        with pytest.raises(UserError, match="is not an export of sd-erase"):
            export_to(settings, run, "diffusers", folder, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model", "outputs"]
