"""Every export of a run whose encoder has two layers of sixteen numbers, in a second each."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import made_as_it_is, replaced
from safetensors.torch import load_file, save_file

from sd_erase import __version__, components, formats
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import checkpoint, diffusers, forge, lora, portable
from sd_erase.export.integrity import data_sha256
from sd_erase.export.job import Erased, Job, _is_intact, sha256
from sd_erase.folders import MARK
from sd_erase.formats import read_header
from sd_erase.lora import add_lora
from sd_erase.rundir import RunDir

PLACE = "cond_stage_model.transformer."
UNET, VAE = "model.diffusion_model.x", "first_stage_model.y"
RANK = 3
MODULES = formats.linear_modules(2)


def told(function: Any, *values: Any) -> str:
    """What the refusal says."""
    with pytest.raises(UserError) as error:
        function(*values)
    return str(error.value)


@pytest.fixture
def original(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The base's own encoder, from which the run's differs by a change of `RANK` in every linear weight."""
    state = load_file(run.encoder / "text_encoder" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for module in MODULES:
        out, inner = state[f"{module}.weight"].shape
        change = torch.randn(out, RANK, generator=generator) @ torch.randn(RANK, inner, generator=generator) / 50
        state[f"{module}.weight"] = state[f"{module}.weight"] - change
    monkeypatch.setattr(components, "text_encoder_state", lambda base, encoder: dict(state))
    return state


@pytest.fixture
def mine(original: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A checkpoint with that encoder in half precision."""
    tensors = {UNET: torch.ones(3, 2, dtype=torch.float16), **{PLACE + key: value.half() for key, value in original.items()}}
    tensors |= {VAE: torch.arange(4.0), f"{PLACE}text_model.embeddings.position_ids": torch.arange(77)[None]}
    about = {
        "modelspec.title": "Mine",
        "author": "me",
        "sshs_model_hash": "1",
        "sshs_legacy_hash": "2",
        "modelspec.architecture": "mine",
    }
    save_file(tensors, tmp_path / "mine.safetensors", about)
    return tmp_path / "mine.safetensors"


def erased_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.encoder / "text_encoder" / "model.safetensors")


def rewrite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Other tensors in the place of a file's; safetensors 0.4 writes into the file, from which the tensors may be mapped."""
    path.unlink()
    save_file(tensors, path, {})


def change_of(run: RunDir, key: str, by: float = 1) -> None:
    """Let the training have changed another tensor too."""
    path = run.encoder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors[key] = tensors[key] + by
    rewrite(tensors, path)
    made_as_it_is(run, "train")


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_the_erased_encoder(settings: RunConfig, run: RunDir, mine: Path) -> None:
    config = replaced(settings, "export", to="a1111", checkpoint=str(mine))
    manifest = checkpoint.export(config, run)
    (entry,) = manifest["files"]
    path = run.export / "mine-without-bicycle.safetensors"
    old, new, erased = load_file(mine), load_file(path), erased_of(run)
    assert list(read_header(path).tensors) == list(read_header(mine).tensors)
    for name, value in new.items():
        key = name.removeprefix(PLACE)
        assert torch.equal(value, erased[key].half() if key in erased else old[name]) and value.dtype == old[name].dtype
    assert 0 < entry.pop("difference") < 0.02
    assert entry == {
        "path": str(path),
        "encoder": "text_encoder",
        "tensors": 39,
        "swapped": 36,
        "changed": 12,  # the linear weights
        "bytes": path.stat().st_size,
        "dtype": "float16",
        "sha256": sha256(path),
        "data_sha256": data_sha256(read_header(path)),
    }
    assert (manifest["checkpoint"], manifest["warnings"]) == ("mine.safetensors", [])
    metadata = read_header(path).metadata
    assert {name: metadata[f"modelspec.{name}"] for name in ("title", "description", "architecture", "implementation")} == {
        "title": "Mine without bicycle",
        "description": "Checkpoint from whose text encoder sd-erase erased bicycle (objective sd).",
        "architecture": "mine",
        "implementation": "https://github.com/Stability-AI/generative-models",
    }
    assert (metadata["author"], metadata["format"], metadata["sd_erase.version"]) == ("me", "pt", __version__)
    assert "sshs_model_hash" not in metadata and "sshs_legacy_hash" not in metadata
    before = path.stat().st_mtime_ns
    assert checkpoint.export(config, run)["files"][0]["sha256"] == entry["sha256"]
    assert path.stat().st_mtime_ns == before  # kept, as nothing changed


def test_a_checkpoint_without_a_title_has_its_files_and_its_encoders_type(settings: RunConfig, run: RunDir, mine: Path) -> None:
    tensors = {name: value.bfloat16() if value.is_floating_point() else value for name, value in load_file(mine).items()}
    tensors[f"{PLACE}text_model.embeddings.position_ids"] = torch.arange(77)[None] + 1
    save_file(tensors, mine.with_name("other.safetensors"))
    manifest = checkpoint.export(replaced(settings, "export", checkpoint=str(mine.with_name("other.safetensors"))), run)
    path = Path(manifest["files"][0]["path"])
    assert manifest["files"][0]["dtype"] == "bfloat16" and path.name == "other-without-bicycle.safetensors"
    metadata = read_header(path).metadata
    assert metadata["modelspec.title"] == "other without bicycle" and metadata["modelspec.architecture"] == "stable-diffusion-v1"
    (warning,) = manifest["warnings"]
    assert warning.startswith(f"{PLACE}text_model.embeddings.position_ids of other.safetensors is not 0 to 76, as some merges")


def test_a_checkpoint_that_does_not_fit_is_refused_in_this_sentence(settings: RunConfig, run: RunDir, mine: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], **values: Any) -> str:
        rewrite(tensors, mine)
        said = told(checkpoint.export, replaced(settings, "export", checkpoint=str(mine), **values), run)
        assert not run.export.exists() or not list(run.export.glob("*.safetensors"))
        return said

    tensors = load_file(mine)
    says = "Base pocket is no one-file checkpoint: pass yours with --checkpoint, for example --checkpoint v1-5-pruned-emaonly.safetensors."
    assert told(checkpoint.export, settings, run) == says
    start = f"Checkpoint {mine}"
    assert refused({"cond_stage_model.model.x": torch.ones(1)}) == (
        f"{start} is Stable Diffusion 2.x, but the encoder was erased from pocket (Stable Diffusion 1.x): pass a checkpoint of that kind."
    )
    what = "no checkpoint with a text encoder of Stable Diffusion"
    assert refused({"x": torch.ones(1)}).startswith(f"{start} is {what}, but the encoder was erased from pocket")
    less = {name: value for name, value in tensors.items() if not name.endswith("layers.0.mlp.fc1.bias")}
    assert refused(less) == (
        f"{start} lacks 1 tensors of its text encoder, first {PLACE}text_model.encoder.layers.0.mlp.fc1.bias: pass a complete one "
        "(A1111 would fill them with zeros)."
    )
    deeper = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in tensors.items()}
    assert refused({**tensors, **deeper}) == (
        f"{start} has 3 layers in its text encoder, the erased one has 2: pass a checkpoint of the same base."
    )
    bias = f"{PLACE}text_model.final_layer_norm.bias"
    assert refused({**tensors, bias: torch.ones(8).half()}) == (
        f"Tensor {bias} of checkpoint {mine} has the shape (8,), the erased encoder's (16,): pass a checkpoint of the same base."
    )
    assert refused({**tensors, bias: tensors[bias].to(torch.float8_e5m2)}) == (
        f"{start} keeps its text encoder as F8_E5M2, which cannot hold the change: pass one in F32, F16 or BF16."
    )
    says = refused({**tensors, bias: tensors[bias] + 0.5, UNET: tensors[UNET]})
    assert re.fullmatch(
        rf"{re.escape(start)} has a text encoder of its own \({re.escape(bias)} differs from pocket's by \S+ %\): train on it with "
        rf"--base {re.escape(str(mine))}, or pass --force to replace it by pocket's\.", says
    )  # fmt: skip
    change_of(run, bias.removeprefix(PLACE), 1e5)
    says = f"Tensor {bias} does not fit float16, the type of {mine}: pass a checkpoint in float32."
    assert refused(tensors) == says
    output = str(mine)
    assert refused(tensors, output=output) == (
        f"Output {mine} is the checkpoint itself, which stays as it is: pass another file with --output."
    )


def test_force_replaces_an_encoder_of_its_own(settings: RunConfig, run: RunDir, mine: Path) -> None:
    tensors = load_file(mine)
    bias = f"{PLACE}text_model.final_layer_norm.bias"
    rewrite({**tensors, bias: tensors[bias] + 0.5}, mine)
    manifest = checkpoint.export(replaced(settings, "export", checkpoint=str(mine), force=True), run)
    assert manifest["files"][0]["changed"] == 13
    assert torch.equal(load_file(Path(manifest["files"][0]["path"]))[bias], erased_of(run)[bias.removeprefix(PLACE)].half())


# --- LoRAs --------------------------------------------------------------------------------------------------------------------


def test_a_lora_of_the_changes_rank_is_the_change(settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor]) -> None:
    config = replaced(settings, "export", to="lora", rank=RANK, dtype="float32")
    (entry,) = lora.export(config, run)["files"]
    path = run.export / "bicycle-pocket-lora-fp32.safetensors"
    found, erased = add_lora({"text_encoder": original}, path)["text_encoder"], erased_of(run)
    assert all(torch.allclose(found[key], erased[key], atol=1e-5) for key in erased)
    header = read_header(path)
    names = [formats.lora_name(module, formats.PLACES["sd1"][0]) for module in MODULES]
    assert list(header.tensors) == [
        f"{name}.{part}" for name in names for part in ("alpha", "lora_up.weight", "lora_down.weight")
    ]
    assert all(header.shape(f"{name}.lora_up.weight")[1] == RANK == header.shape(f"{name}.lora_down.weight")[0] for name in names)
    assert all(float(value) == RANK for name, value in load_file(path).items() if name.endswith(".alpha"))
    assert entry.pop("difference") < 1e-4 and entry.pop("residual") < 1e-3
    assert entry == {
        "path": str(path),
        "encoder": "text_encoder",
        "tensors": 36,
        "bytes": path.stat().st_size,
        "dtype": "float32",
        "sha256": sha256(path),
        "data_sha256": data_sha256(header),
        "rank": RANK,
    }
    metadata = header.metadata
    assert {name: value for name, value in metadata.items() if name.startswith("ss_")} == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": path.stem,
    }
    assert metadata["modelspec.title"] == "bicycle erased from pocket" and metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora" and float(metadata["sd_erase.residual"]) < 1e-3
    says = "LoRA of the CLIP text encoder with which sd-erase erases bicycle (objective sd)."
    assert metadata["modelspec.description"] == says


def test_what_a_smaller_rank_loses(settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor]) -> None:
    """By Eckart and Young the share that rank one loses is that of the other singular values, over all layers together."""
    erased = erased_of(run)
    values = [torch.linalg.svdvals((erased[f"{module}.weight"] - original[f"{module}.weight"]).double()) for module in MODULES]
    lost = [
        float((sum(each[rank:].square().sum() for each in values) / sum(each.square().sum() for each in values)) ** 0.5)
        for rank in (1, 2)
    ]
    assert lost[1] > 0.1
    says = (
        f"A LoRA of rank 1 loses {100 * lost[0]:.0f} % of the change of the weights (limit 10 %): pass --rank 3, --to lora-diff for the "
        "exact change, or --force; or train with --lora-rank."
    )
    assert told(lora.export, replaced(settings, "export", to="lora", rank=1), run) == says
    (entry,) = lora.export(replaced(settings, "export", to="lora", rank=2, force=True, dtype="float32"), run)["files"]
    assert entry["residual"] == pytest.approx(lost[1], rel=1e-3) and entry["rank"] == 2 and entry["difference"] > 1e-4
    assert read_header(Path(entry["path"])).metadata["sd_erase.residual"] == f"{entry['residual']:.6g}"
    (wide,) = lora.export(replaced(settings, "export", to="lora", rank=40, dtype="float32"), run)["files"]
    header = read_header(Path(wide["path"]))
    assert {header.shape(name)[1] for name in header.tensors if name.endswith("up.weight")} == {
        40
    }  # though a layer has 16 values
    assert wide["residual"] == 0 and wide["difference"] < 1e-4
    assert (
        lora.export(replaced(settings, "export", to="lora", output=str(run.export / "d.safetensors")), run)["files"][0]["rank"]
        == 64
    )


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_trained_lora_is_exported_as_it_is(
    settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor], prefix: str
) -> None:
    factors, path = {}, run.encoder / "text_encoder" / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    state = dict(original)
    for module in MODULES:
        out, inner = state[f"{module}.weight"].shape
        up, down = torch.randn(out, 2, generator=generator) / 9, torch.randn(2, inner, generator=generator)
        name = prefix + module.removeprefix("text_model.")
        factors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        state[f"{module}.weight"] = state[f"{module}.weight"] + up @ down
    rewrite(state, path)
    save_file(factors, run.lora("text_encoder"))
    manifest = run.read_manifest("train") or {}
    run.complete("train", "t", {**manifest, "lora_rank": 2})
    made_as_it_is(run, "train")
    (entry,) = lora.export(replaced(settings, "export", to="lora", dtype="float32"), run)["files"]
    assert (entry["rank"], entry["residual"]) == (2, 0.0) and entry["difference"] <= 1e-4
    found = load_file(Path(entry["path"]))
    for module in MODULES:
        own, name = prefix + module.removeprefix("text_model."), formats.lora_name(module, formats.PLACES["sd1"][0])
        assert torch.equal(found[f"{name}.lora_up.weight"], factors[f"{own}.up.weight"])
        assert torch.equal(found[f"{name}.lora_down.weight"], factors[f"{own}.down.weight"])
        assert found[f"{name}.alpha"] == 2
    assert lora.export(replaced(settings, "export", to="lora", rank=3), run)["files"][0]["rank"] == 3  # extracted anew


def test_the_exact_change(settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor]) -> None:
    change_of(run, f"{MODULES[4]}.bias")
    (entry,) = lora.export_diff(replaced(settings, "export", to="lora-diff", dtype="float32"), run)["files"]
    path, erased = run.export / "bicycle-pocket-lora-diff-fp32.safetensors", erased_of(run)
    found = load_file(path)
    names = {module: formats.lora_name(module, formats.PLACES["sd1"][0]) for module in MODULES}
    assert set(found) == {f"{name}.diff" for name in names.values()} | {f"{names[MODULES[4]]}.diff_b"}
    for module, name in names.items():
        assert torch.equal(found[f"{name}.diff"], erased[f"{module}.weight"] - original[f"{module}.weight"])
    assert found[f"{names[MODULES[4]]}.diff_b"].sub(1).abs().max() < 1e-6
    assert (entry["path"], entry["tensors"]) == (str(path), 13) and "rank" not in entry and entry["difference"] <= 1e-4
    metadata = read_header(path).metadata
    says = "Exact change (.diff) of the CLIP text encoder with which sd-erase erases bicycle (objective sd)."
    assert metadata["modelspec.description"] == says and "ss_network_dim" not in metadata


@pytest.mark.parametrize(
    ("to", "key", "count", "kinds"),
    [
        ("lora", "text_model.encoder.layers.0.mlp.fc1.bias", 1, "weights"),
        ("lora-diff", "text_model.final_layer_norm.bias", 1, "weights and biases"),
    ],
)
def test_what_a_lora_cannot_hold_is_said(
    settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor], to: str, key: str, count: int, kinds: str
) -> None:
    change_of(run, key)
    export = lora.export if to == "lora" else lora.export_diff
    assert told(export, replaced(settings, "export", to=to), run) == (
        f"A {to} file cannot hold the change of {count} tensors, first {key} (objective sd changes more than linear {kinds}): "
        "pass --to comfyui, a1111 or diffusers."
    )


def test_a_lora_of_another_base_or_of_nothing_is_refused(
    settings: RunConfig, run: RunDir, original: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replaced(settings, "export", to="lora")
    bias = "text_model.final_layer_norm.bias"
    for other in ({**original, bias: torch.ones(8)}, {key: value for key, value in original.items() if key != bias}):
        with monkeypatch.context() as patch:
            patch.setattr(components, "text_encoder_state", lambda base, encoder, other=other: other)
            assert (
                told(lora.export, config, run)
                == f"Base pocket does not fit the run's text_encoder ({bias}): pass the run's --base."
            )
    monkeypatch.setattr(components, "text_encoder_state", lambda base, encoder: erased_of(run))
    assert (
        told(lora.export, config, run)
        == f"Run {run} changed no weight, so there is nothing to extract: run `sd-erase train --run {run}` with more --steps."
    )
    huge = {key: value - 1e6 if key == f"{MODULES[0]}.weight" else value for key, value in erased_of(run).items()}
    monkeypatch.setattr(components, "text_encoder_state", lambda base, encoder: huge)
    says = "The change of the weights does not fit float16: pass --dtype float32."
    assert told(lora.export_diff, replaced(settings, "export", to="lora-diff"), run) == says


# --- folders and Forge --------------------------------------------------------------------------------------------------------


def test_a_folder_for_from_pretrained(settings: RunConfig, run: RunDir) -> None:
    manifest = diffusers.export(replaced(settings, "export", to="diffusers", dtype="float32"), run)
    folder = run.export / "bicycle-pocket-diffusers-fp32"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {MARK, "README.md", "text_encoder/config.json", "text_encoder/model.safetensors"}
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    own = json.loads((run.encoder / "text_encoder" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "dtype" not in config
    assert {key for key, value in own.items() if key not in config or config[key] != value} <= {
        "dtype",
        "_name_or_path",
        "torch_dtype",
    }
    assert manifest["folder"] == str(folder)
    assert (
        manifest["files"][0]["path"] == str(folder / "text_encoder" / "model.safetensors")
        and manifest["files"][0]["difference"] == 0
    )
    assert manifest["warnings"] and manifest["warnings"][0].startswith("The model card shows no figures: ")
    says = f"Output {folder}.safetensors names a file, but --to diffusers writes a folder: pass one with --output."
    assert told(diffusers.export, replaced(settings, "export", to="diffusers", output=f"{folder}.safetensors"), run) == says
    (folder / "README.md").write_text("mine")
    again = replaced(settings, "export", to="diffusers", output=str(folder))
    assert told(diffusers.export, again, run) == (
        f"Output {folder} was changed since sd-erase wrote it (such as README.md): move that away, pass another folder with --output, or "
        "pass --force to replace the whole folder."
    )
    (run.export / "other").mkdir()
    (run.export / "other" / "x").write_text("")
    other = replaced(settings, "export", to="diffusers", output=str(run.export / "other"), force=True)
    assert told(diffusers.export, other, run) == (
        f"Output {run.export / 'other'} exists and is not an export of sd-erase, so it stays as it is: pass a new or an empty folder with --output."
    )


def test_forges_file_of_two_encoders(settings: RunConfig, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run.encoder / "text_encoder", run.encoder / "text_encoder_2"
    second.mkdir()
    (second / "config.json").write_bytes((first / "config.json").read_bytes())
    tensors, projection = load_file(first / "model.safetensors"), torch.arange(256.0).reshape(16, 16) / 256
    save_file({**tensors, "text_projection.weight": projection}, second / "model.safetensors")
    made_as_it_is(run, "train", "sdxl")
    config = replaced(dataclasses.replace(settings, base="sdxl"), "export", to="forge", dtype="float32")
    sizes: list[int] = []
    monkeypatch.setattr("sd_erase.export.job.check_space", lambda folder, size: sizes.append(size))
    manifest = forge.export(config, run)
    assert sizes == [4 * (2 * sum(tensor.numel() for tensor in tensors.values()) + 256)]
    (entry,) = manifest["files"]
    path = run.export / "bicycle-sdxl-text_encoders-forge-fp32.safetensors"
    found = load_file(path)
    assert torch.equal(found["conditioner.embedders.1.model.text_projection"], projection.T)  # as OpenCLIP keeps it
    layer = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    own = "text_model.encoder.layers.0.self_attn"
    assert torch.equal(found[layer], torch.cat([tensors[f"{own}.{part}_proj.weight"] for part in "qkv"]))
    assert all(torch.equal(found[f"conditioner.embedders.0.transformer.{key}"], value) for key, value in tensors.items())
    assert entry == {
        "path": str(path),
        "encoder": "text_encoder + text_encoder_2",
        "tensors": len(found),
        "bytes": path.stat().st_size,
        "dtype": "float32",
        "sha256": sha256(path),
        "data_sha256": data_sha256(read_header(path)),
        "difference": 0.0,
    }
    metadata = read_header(path).metadata
    assert metadata["modelspec.title"] == "sdxl text encoders without bicycle"
    assert metadata["modelspec.description"] == "CLIP text encoders from which sd-erase erased bicycle (objective sd), for Forge."
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/text-encoder" and metadata["format"] == "pt"
    (other,) = forge.export(replaced(config, "export", output=str(tmp_path / "other.safetensors")), run)["files"]
    assert other["path"] == str(tmp_path / "other.safetensors") and other["sha256"] == sha256(tmp_path / "other.safetensors")


def test_an_erased_encoder_knows_its_tensors(settings: RunConfig, run: RunDir) -> None:
    (erased,) = Job.of(settings, run).encoders
    assert (erased.name, erased.layers, erased.width, erased.tokens, len(erased.keys)) == ("text_encoder", 2, 16, 64, 36)
    assert erased.keys == tuple(sorted(erased.keys)) and set(erased.state()) == set(erased.keys)
    assert isinstance(erased, Erased) and torch.equal(erased.tensor(erased.keys[0]), erased.state()[erased.keys[0]])


def test_a_tokenizer_of_transformers_5_gets_the_files_of_transformers_4(tmp_path: Path) -> None:
    """Of `tokenizer.json` alone; a file that is there stays as it is."""
    vocabulary = {"a</w>": 0, "b": 1, "<|startoftext|>": 2, "<|endoftext|>": 3, "é</w>": 4}
    added = [{"content": "<|endoftext|>", "id": 3}, {"content": "<my-dog>", "id": 5}]
    content = {"model": {"vocab": vocabulary, "merges": [["a", "b</w>"], "b a</w>"]}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": None, "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    portable.complete_tokenizer(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == vocabulary
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\na b</w>\nb a</w>\n"
    assert json.loads((tmp_path / "added_tokens.json").read_text(encoding="utf-8")) == {"<my-dog>": 5}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    assert json.loads((tmp_path / "special_tokens_map.json").read_text(encoding="utf-8")) == special
    names = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
    for name in names:
        (tmp_path / name).write_text("the maker's own", encoding="utf-8")
    portable.complete_tokenizer(tmp_path)
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in names} == {"the maker's own"}


def test_a_tokenizer_without_further_tokens_gets_no_list_of_them(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "a", "id": 0}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    portable.complete_tokenizer(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\n"


def test_an_exported_file_is_intact_in_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"1234")
    file = {"path": str(path), "bytes": 4, "sha256": sha256(path)}
    assert _is_intact(file)
    assert not _is_intact({**file, "bytes": 5}) and not _is_intact({**file, "sha256": "0" * 64})
    path.write_bytes(b"1235")
    assert not _is_intact(file)
    path.unlink()
    assert not _is_intact(file)


# --- what is told along the way, and the card of a hub's model ---------------------------------------------------------------------


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.advances: dict[tuple[str, int | None], list[int]] = {}

    @contextmanager
    def __call__(self, title: str, total: int | None) -> Iterator[Any]:
        own = self.advances.setdefault((title, total), [])
        yield SimpleNamespace(advance=lambda amount=1: own.append(amount))


def test_a_checkpoint_tells_of_its_megabytes(settings: RunConfig, run: RunDir, mine: Path) -> None:
    larger = {**load_file(mine), "first_stage_model.decoder.x": torch.ones(2_000_000)}
    save_file(larger, mine, read_header(mine).metadata)
    told_of, size = Told(), mine.stat().st_size // 10**6
    checkpoint.export(replaced(settings, "export", to="a1111", checkpoint=str(mine)), run, told_of)
    found = {row: sum(amounts) for row, amounts in told_of.advances.items() if "MB" in row[0]}
    assert size == 8 and found == {("writing (MB)", 8): 8, ("reading back (MB)", 8): 8}


def test_the_card_of_a_hubs_model_names_it(settings: RunConfig, run: RunDir) -> None:
    job = Job.of(settings, run)
    named = dataclasses.replace(job, base=dataclasses.replace(job.base, source="owner/name"))
    assert "base_model: owner/name\n" in diffusers.model_card(named) and '    "owner/name",' in diffusers.model_card(named)
    assert "base_model" not in diffusers.model_card(job) and '    "BASE_MODEL",' in diffusers.model_card(job)


def test_a_card_has_the_tables_without_each_prompt(settings: RunConfig, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(Job.of(settings, run).links), "fault", lambda self, stage: None)
    monkeypatch.setattr(diffusers, "stored", lambda run: None)
    monkeypatch.setattr(diffusers, "render_markdown", lambda found: "# Figures\n\n## Each prompt\n\n| a |")
    assert diffusers._measured(Job.of(settings, run)) == "## Figures"
