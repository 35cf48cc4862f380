"""The files that other programs load: full checkpoints, LoRAs, diffusers folders; each loaded by somebody else's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from conftest import replaced
from erased import RANK, erased_run
from ldm import checkpoint
from narrow import build, narrow

import sd_erase
from sd_erase import bases, catalog, components
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export.metadata import inspect_file
from sd_erase.formats import read_header, text_encoder_keys
from sd_erase.pipeline import erased_pipeline
from sd_erase.rundir import RunDir

FAMILIES = ["sd15", "sd21", "sdxl"]


def export(settings: RunConfig, run: RunDir, to: str, **values: Any) -> dict[str, Any]:
    settings = replaced(settings, "export", to=to, **values)
    return catalog.resolve(catalog.EXPORTS, to, "Export format")(settings, run)


def path_of(manifest: dict[str, Any]) -> Path:
    (file,) = manifest["files"]
    return Path(file["path"])


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A pipeline with random weights and its one-file checkpoint in half precision."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made(request.param, tmp_path, monkeypatch)


@pytest.fixture
def sd15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made("sd15", tmp_path, monkeypatch)


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    pipeline, path = build(narrow(name, folder, monkeypatch)), folder / "my-model.safetensors"
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in checkpoint(pipeline).items()}
    safetensors.torch.save_file(tensors, path, {"modelspec.title": "My model", "format": "pt"})
    return pipeline, path


def run_of(path: Path, folder: Path, **options: Any) -> tuple[RunConfig, RunDir]:
    return erased_run(folder, bases.resolve(str(path)), str(path), **options)


def encoders(run: RunDir) -> dict[str, dict[str, torch.Tensor]]:
    return {
        folder.name: safetensors.torch.load_file(folder / "model.safetensors")
        for folder in sorted(run.encoder.iterdir())
        if folder.is_dir()
    }


# --- a1111 ------------------------------------------------------------------------------------------------------------------


def test_only_the_encoder_of_a_checkpoint_is_swapped(model: tuple[Any, Path], tmp_path: Path) -> None:
    original, source = model
    settings, run = run_of(source, tmp_path)
    before = source.read_bytes()
    manifest = export(settings, run, "a1111")
    (file,) = manifest["files"]
    assert source.read_bytes() == before
    old, new = safetensors.torch.load_file(source), safetensors.torch.load_file(file["path"])
    assert list(read_header(source).tensors) == list(read_header(Path(file["path"])).tensors)
    assert {key: value.dtype for key, value in old.items()} == {key: value.dtype for key, value in new.items()}
    differing = {key for key in old if not torch.equal(old[key], new[key])}
    own = [key for key in old if key.startswith(("cond_stage_model.", "conditioner.embedders."))]
    assert differing < set(own) and file["changed"] == len(differing)
    # transformers' q, k and v are one tensor in OpenCLIP's layout: four weights a layer for six
    layers = {
        name: 1 + max(int(key.split(".")[3]) for key in state if ".layers." in key) for name, state in encoders(run).items()
    }
    open_clip = {"text_encoder"} if original.text_encoder.config.hidden_act == "gelu" else {"text_encoder_2"}
    assert len(differing) == sum(count * (4 if name in open_clip else 6) for name, count in layers.items())
    assert manifest["warnings"] == [] and file["difference"] < 2e-3

    loaded = components.load_pipeline(bases.resolve(file["path"]))  # diffusers' own reader of such files
    for name, state in encoders(run).items():
        found = {key.removeprefix("text_model."): value for key, value in getattr(loaded, name).state_dict().items()}
        assert found.keys() == {key.removeprefix("text_model.") for key in state}
        assert all(torch.equal(found[key.removeprefix("text_model.")], value.half().float()) for key, value in state.items())
    found = inspect_file(Path(file["path"]))
    assert (found["problems"], found["hash"], found["concept"], found["notes"]) == ([], "matches", "bicycle", [])
    assert found["metadata"]["modelspec.title"] == "My model without bicycle"
    assert list(run.export.iterdir()) == [Path(file["path"])]


def test_a_finished_checkpoint_is_kept(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    path = path_of(export(settings, run, "a1111"))
    before = path.stat().st_mtime_ns
    assert path_of(export(settings, run, "a1111")).stat().st_mtime_ns == before


def test_the_metadata_of_others_stays_but_for_hashes(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    tensors = safetensors.torch.load_file(sd15[1])
    safetensors.torch.save_file(tensors, sd15[1], {"author": "me", "sshs_model_hash": "1", "modelspec.hash_sha256": "0x1"})
    found = inspect_file(path_of(export(settings, run, "a1111")))
    assert found["metadata"]["author"] == "me" and "sshs_model_hash" not in found["metadata"] and found["hash"] == "matches"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("none", "is no one-file checkpoint: pass yours with --checkpoint"),
        ("other base", "is Stable Diffusion 2.x, but the encoder was erased from"),
        ("other file", "is no checkpoint with a text encoder"),
        ("missing", "lacks 1 tensors of its text encoder, first cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"),
        ("layers", "has 3 layers in its text encoder, the erased one has 2"),
        ("width", "has the shape .*pass a checkpoint of the same base"),
        ("fine-tune", "has a text encoder of its own .*train on it with --base"),
        ("float8", "which cannot hold the change"),
        ("pickle", "is a pickle"),
        ("truncated", "is no complete safetensors file"),
        ("absent", "does not exist"),
        ("itself", "is the checkpoint itself"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(sd15: tuple[Any, Path], tmp_path: Path, damage: str, words: str) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    given = tmp_path / "given.safetensors"
    tensors = safetensors.torch.load_file(sd15[1])
    prefix = "cond_stage_model.transformer.text_model."
    options = {"checkpoint": str(given)}
    if damage == "none":
        settings, options = replaced_base(settings, str(bases.POCKET_FOLDER)), {}
        (run.encoder / "text_encoder" / "config.json").write_bytes((run.encoder / "text_encoder" / "config.json").read_bytes())
    elif damage == "other base":
        tensors = {"cond_stage_model.model.ln_final.weight": torch.zeros(32)}
    elif damage == "other file":
        tensors = {"decoder.x": torch.zeros(2)}
    elif damage == "missing":
        del tensors[f"{prefix}encoder.layers.0.mlp.fc1.bias"]
    elif damage == "layers":
        tensors |= {key.replace("layers.1", "layers.2"): value.clone() for key, value in tensors.items() if "layers.1" in key}
    elif damage == "width":
        tensors[f"{prefix}encoder.layers.0.mlp.fc1.weight"] = torch.zeros(64, 48)
    elif damage == "fine-tune":
        tensors[f"{prefix}encoder.layers.0.mlp.fc1.weight"] *= 1.02
    elif damage == "float8":
        tensors = {key: value.to(torch.float8_e4m3fn) if "fc1" in key else value for key, value in tensors.items()}
    elif damage == "pickle":
        options = {"checkpoint": str(tmp_path / "model.ckpt")}
    if damage == "itself":
        options = {"output": str(sd15[1])}
    elif damage == "truncated":
        given.write_bytes(sd15[1].read_bytes()[:-3])
    elif damage not in {"none", "absent", "pickle"}:
        safetensors.torch.save_file(tensors, given)
    before = sd15[1].read_bytes()
    with pytest.raises(UserError, match=words):
        export(settings, run, "a1111", **options)
    assert sd15[1].read_bytes() == before and not run.export.exists()


def replaced_base(settings: RunConfig, base: str) -> RunConfig:
    import dataclasses

    return dataclasses.replace(settings, base=base)


def test_force_replaces_a_fine_tunes_encoder(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    tensors = safetensors.torch.load_file(sd15[1])
    tensors["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"] *= 1.02
    safetensors.torch.save_file(tensors, tmp_path / "fine.safetensors")
    manifest = export(settings, run, "a1111", checkpoint=str(tmp_path / "fine.safetensors"), force=True)
    assert manifest["files"][0]["difference"] < 2e-3


def test_position_ids_stay_and_broken_ones_are_named(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    tensors = safetensors.torch.load_file(sd15[1])
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    tensors[name] = tensors[name].half()
    tensors[name][0, 41] = 40
    safetensors.torch.save_file(tensors, sd15[1])
    manifest = export(settings, run, "a1111")
    assert torch.equal(safetensors.torch.load_file(path_of(manifest))[name], tensors[name])
    assert "position_ids of my-model.safetensors is not 0 to 76" in manifest["warnings"][0]
    assert any("is not 0 to 76" in problem for problem in inspect_file(sd15[1])["problems"])


def test_old_names_without_text_model_are_kept(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    tensors = safetensors.torch.load_file(sd15[1])
    old = {key.replace("transformer.text_model.", "transformer."): value for key, value in tensors.items()}
    safetensors.torch.save_file(old, tmp_path / "old.safetensors")
    manifest = export(settings, run, "a1111", checkpoint=str(tmp_path / "old.safetensors"))
    assert set(safetensors.torch.load_file(path_of(manifest))) == set(old)


@pytest.mark.parametrize("to", ["comfyui", "a1111", "lora", "lora-diff", "diffusers"])
def test_no_space_leaves_nothing_behind(sd15: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(UserError, match="no space left on"):
        export(settings, run, to)
    assert not list(run.export.iterdir())


@pytest.mark.parametrize("to", ["comfyui", "a1111", "lora", "lora-diff", "diffusers"])
def test_a_target_that_cannot_be_written_is_refused(sd15: tuple[Any, Path], tmp_path: Path, to: str) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    (tmp_path / "file").write_text("x")  # root may write into a read-only folder, but not below a file
    with pytest.raises(UserError, match="cannot be written"):
        export(settings, run, to, output=str(tmp_path / "file" / "x"))


def test_a_file_of_somebody_elses_is_not_overwritten(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(sd15[1].read_bytes())
    for to in ("comfyui", "a1111", "lora"):
        with pytest.raises(UserError, match="was not written by sd-erase"):
            export(settings, run, to, output=str(other))
    assert other.read_bytes() == sd15[1].read_bytes()


def test_an_interrupted_copy_leaves_nothing_behind(
    sd15: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = run_of(sd15[1], tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sd_erase.export.checkpoint._read_back", stop)
    with pytest.raises(KeyboardInterrupt):
        export(settings, run, "a1111")
    assert not list(run.export.iterdir())


# --- lora -------------------------------------------------------------------------------------------------------------------


def test_a_trained_lora_is_exported_exactly_under_kohyas_names(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    (file,) = export(settings, run, "lora", dtype="float32")["files"]
    tensors = safetensors.torch.load_file(file["path"])
    factors = safetensors.torch.load_file(run.encoder / "lora.safetensors")
    assert len(tensors) == 3 * 12 and file["residual"] == 0 and file["difference"] == 0
    for layer in range(2):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            name = f"lora_te_text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
            module = f"encoder.layers.{layer}.{part}"
            assert torch.equal(tensors[f"{name}.lora_up.weight"], factors[f"{module}.up.weight"])
            assert torch.equal(tensors[f"{name}.lora_down.weight"], factors[f"{module}.down.weight"])
            assert tensors[f"{name}.alpha"].shape == () and float(tensors[f"{name}.alpha"]) == RANK
    found = inspect_file(Path(file["path"]))
    assert (found["kind"], found["rank"], found["problems"], found["hash"]) == (
        "LoRA that changes the text encoder", RANK, [], "matches",
    )  # fmt: skip
    expected = {
        "modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1", "ss_v2": "False", "format": "pt",
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2", "sd_erase.concept": "bicycle",
    }  # fmt: skip
    assert {key: found["metadata"][key] for key in expected} == expected


def test_extraction_finds_the_rank_of_a_full_run(model: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(model[1], tmp_path, lora=False)
    (file,) = export(settings, run, "lora", rank=RANK, dtype="float32")["files"]
    assert file["residual"] < 1e-6 and file["difference"] < 1e-5
    names = set(safetensors.torch.load_file(file["path"]))
    prefixes = {"lora_te1_", "lora_te2_"} if len(encoders(run)) == 2 else {"lora_te_"}
    assert {name.partition("text_model")[0] for name in names} == prefixes


def test_a_rank_that_loses_much_is_refused_with_the_one_that_does_not(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path, lora=False, rank=6)
    with pytest.raises(UserError, match=r"rank 3 loses \d\d % of the change of the weights \(limit 10 %\): pass --rank 6"):
        export(settings, run, "lora", rank=3)
    assert not run.export.exists()
    (file,) = export(settings, run, "lora", rank=3, force=True)["files"]
    state = safetensors.torch.load_file(run.encoder / "text_encoder" / "model.safetensors")
    original = components.text_encoder_state(bases.resolve(str(sd15[1])), bases.resolve(str(sd15[1])).encoders[0])
    tensors = safetensors.torch.load_file(file["path"])
    lost = total = 0.0
    for key in state:
        name = f"lora_te_{key.removesuffix('.weight').replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            change = state[key] - original[key].float()
            rest = change - tensors[f"{name}.lora_up.weight"].float() @ tensors[f"{name}.lora_down.weight"].float()
            lost, total = lost + float(rest.square().sum()), total + float(change.square().sum())
            singular = torch.linalg.svdvals(change)
            assert float(rest.norm()) == pytest.approx(float(singular[3:].norm()), rel=0.02)  # the best of its rank
    assert file["residual"] == pytest.approx((lost / total) ** 0.5, rel=0.01)


@pytest.mark.parametrize("to", ["lora", "lora-diff"])
def test_what_a_lora_cannot_hold_is_refused(sd15: tuple[Any, Path], tmp_path: Path, to: str) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    path = run.encoder / "text_encoder" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["text_model.embeddings.token_embedding.weight"][0] += 1
    safetensors.torch.save_file(state, path)
    with pytest.raises(
        UserError, match="cannot hold the change of 1 tensors, first text_model.embeddings.token_embedding.weight"
    ):
        export(settings, run, to)


def test_the_exact_form_holds_biases_that_changed(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    path = run.encoder / "text_encoder" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["text_model.encoder.layers.1.mlp.fc1.bias"] += 0.1
    safetensors.torch.save_file(state, path)
    (file,) = export(settings, run, "lora-diff", dtype="float32")["files"]
    names = set(safetensors.torch.load_file(file["path"]))
    assert {name for name in names if name.endswith("diff_b")} == {"lora_te_text_model_encoder_layers_1_mlp_fc1.diff_b"}
    assert len(names) == 13 and file["difference"] < 1e-6
    assert inspect_file(Path(file["path"]))["kind"] == "Exact change of weights (.diff) that changes the text encoder"
    with pytest.raises(UserError, match="cannot hold the change of 1 tensors"):
        export(settings, run, "lora")


def test_diffusers_loads_the_lora(model: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(model[1], tmp_path)
    path = path_of(export(settings, run, "lora", dtype="float32"))
    pipeline = components.load_pipeline(bases.resolve(str(model[1])))
    expected = erased_pipeline(pipeline, run)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    prompt = "a bicycle next to a dog"
    first, second = (each.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
                     for each in (expected, pipeline))  # fmt: skip
    plain = components.load_pipeline(bases.resolve(str(model[1]))).encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    for one, other, original in zip(first, second, plain, strict=True):
        if one is not None:
            assert torch.allclose(one, other, atol=1e-4) and not torch.allclose(one, original, atol=1e-3)


# --- diffusers --------------------------------------------------------------------------------------------------------------


def test_the_folder_has_prefixed_names_and_a_card(model: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(model[1], tmp_path)
    manifest = export(settings, run, "diffusers")
    folder = Path(manifest["folder"])
    for name, state in encoders(run).items():
        tensors = safetensors.torch.load_file(folder / name / "model.safetensors")
        layers = 1 + max(int(key.split(".")[3]) for key in state if ".layers." in key)
        assert set(tensors) == text_encoder_keys(layers, projection=name == "text_encoder_2")
    card = (folder / "README.md").read_text()
    for words in (
        "license_name: its maker's; that of Stable Diffusion",
        "bicycle",
        "Objective `sd`, 40 steps",
        "No figures of this encoder are known",
        "## Limits",
    ):
        assert words in card
    assert str(tmp_path) not in card


def test_the_card_shows_what_was_measured(evaluated: RunDir, tmp_path: Path) -> None:
    from sd_erase.export.diffusers import model_card
    from sd_erase.export.job import Job

    settings = RunConfig(concepts=("bicycle",), device="cpu")
    card = model_card(Job.of(settings, evaluated))
    assert "was not evaluated" not in card and "## Detection rate before and after erasing bicycle" in card


def test_a_complete_pipeline_loads_and_draws(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    settings, run = run_of(sd15[1], tmp_path)
    target = tmp_path / "whole"
    export(settings, run, "diffusers", pipeline=True, dtype="float32", output=str(target))
    loaded = StableDiffusionPipeline.from_pretrained(target, safety_checker=None)
    expected = erased_pipeline(components.load_pipeline(bases.resolve(str(sd15[1]))), run)
    assert same_pixels(drawn(expected), drawn(loaded))
    names = set(read_header(target / "text_encoder" / "model.safetensors").tensors)
    assert names == text_encoder_keys(2)
    export(settings, run, "diffusers", pipeline=True, dtype="float16", output=str(target))  # its own folder is replaced
    assert (
        read_header(target / "text_encoder" / "model.safetensors").tensors["text_model.final_layer_norm.bias"]["dtype"] == "F16"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserError, match="is not an export of sd-erase"):
        export(settings, run, "diffusers", output=str(tmp_path / "mine"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- every format, the same images ------------------------------------------------------------------------------------------


def drawn(pipeline: Any) -> numpy.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a bicycle next to a dog", "a red apple"], num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], output_type="np",
    ).images  # fmt: skip


def same_pixels(first: numpy.ndarray, second: numpy.ndarray) -> bool:
    """Whether two batches of images are the same once saved."""
    return numpy.array_equal(numpy.round(255 * first), numpy.round(255 * second))


@pytest.mark.parametrize("lora", [True, False])
def test_every_format_of_the_pocket_model_draws_the_same_images(tmp_path: Path, lora: bool) -> None:
    base = bases.ROWS["pocket"]
    settings, run = erased_run(tmp_path, base, "pocket", lora=lora)
    original = components.load_pipeline(base)
    tensors = {f"cond_stage_model.transformer.{key}": value for key, value in
               components.text_encoder_state(base, base.encoders[0]).items()}  # fmt: skip
    tensors |= {f"model.diffusion_model.{key}": value for key, value in original.unet.state_dict().items()}
    safetensors.torch.save_file({key: value.float() for key, value in tensors.items()}, tmp_path / "pocket.safetensors")
    expected = drawn(erased_pipeline(original, run))
    assert not numpy.array_equal(expected, drawn(original))
    for to, options in (
        ("comfyui", {}),
        ("a1111", {"checkpoint": str(tmp_path / "pocket.safetensors")}),
        ("lora", {"rank": RANK}),
        ("lora-diff", {}),
        ("diffusers", {}),
    ):
        manifest = export(settings, run, to, dtype="float32", **options)
        source = manifest.get("folder") or manifest["files"][0]["path"]
        images = drawn(sd_erase.load_erased(original, source))
        if to == "lora" and not lora:  # extracted: the numbers are others
            assert numpy.abs(images - expected).max() < 1e-3
        else:
            assert same_pixels(images, expected), to


def test_an_erased_encoder_is_loaded_from_a_run_and_the_original_stays(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    pipeline = components.load_pipeline(bases.resolve(str(sd15[1])))
    before = {key: value.clone() for key, value in pipeline.text_encoder.state_dict().items()}
    erased = sd_erase.load_erased(pipeline, str(run.path))
    assert all(torch.equal(before[key], value) for key, value in pipeline.text_encoder.state_dict().items())
    assert erased.unet is pipeline.unet and type(erased) is type(pipeline)
    state = safetensors.torch.load_file(run.encoder / "text_encoder" / "model.safetensors")
    assert all(
        torch.equal(state[f"text_model.{key.removeprefix('text_model.')}"], value)
        for key, value in erased.text_encoder.state_dict().items()
    )


def test_xl_takes_its_two_files_in_either_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, path = made("sdxl", tmp_path, monkeypatch)
    settings, run = run_of(path, tmp_path)
    files = [file["path"] for file in export(settings, run, "comfyui", dtype="float32")["files"]]
    assert len(files) == 2
    for order in (files, files[::-1]):
        erased = pipeline
        for file in order:
            erased = sd_erase.load_erased(erased, file)
        for name, state in encoders(run).items():
            found = getattr(erased, name).state_dict()
            assert all(torch.equal(found[key if key in found else key.removeprefix("text_model.")], state[key]) for key in state)


def test_a_file_that_does_not_fit_the_pipeline_is_refused(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    pipeline = sd15[0]
    safetensors.torch.save_file({"decoder.x": torch.zeros(2)}, tmp_path / "vae.safetensors")
    (tmp_path / "empty").mkdir()
    lora = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": torch.zeros(64, 32)}
    safetensors.torch.save_file(lora, tmp_path / "xl.safetensors")
    for source, words in (
        (tmp_path / "vae.safetensors", "holds no text encoder"),
        (tmp_path / "empty", "neither a trained run nor a diffusers folder"),
        (tmp_path / "xl.safetensors", "changes none of its layers"),
        (bases.POCKET_FOLDER / "text_encoder" / "model.safetensors", "holds no text encoder that this pipeline has"),
        (tmp_path / "model.bin", "is a pickle"),
    ):
        with pytest.raises(UserError, match=words):
            sd_erase.load_erased(pipeline, source)


def test_a_fp16_pipeline_stays_in_fp16(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    pipeline = components.load_pipeline(bases.resolve(str(sd15[1])), torch.float16)
    path = path_of(export(settings, run, "lora"))
    assert {value.dtype for value in sd_erase.load_erased(pipeline, path).text_encoder.state_dict().values()} == {torch.float16}


def test_with_a_t5_encoder_beside_it_the_erasure_is_called_partial(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    """FLUX.1 reads CLIP-L's pooled output and T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import T5Config, T5EncoderModel

    settings, run = run_of(sd15[1], tmp_path)
    t5 = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=sd15[0].text_encoder, tokenizer=sd15[0].tokenizer,
        text_encoder_2=t5, tokenizer_2=None, transformer=None,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="The erasure is partial"):
        erased = sd_erase.load_erased(pipeline, path_of(export(settings, run, "comfyui")))
    assert erased.text_encoder_2 is t5 and erased.text_encoder is not pipeline.text_encoder


def test_one_export_does_not_decide_the_next(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    """A kept --output would be overwritten by another format, and a kept --force forgotten."""
    from click.testing import CliRunner

    from sd_erase.cli import main

    _, run = run_of(sd15[1], tmp_path)
    before = run.config.read_text()
    output = tmp_path / "mine.safetensors"
    arguments = ["export", "--run", str(run.path), "--to", "lora", "--rank", "1", "--force", "--output", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "rank 1" in result.stdout and "% of the change of the weights lost" in result.stdout
    assert run.config.read_text() == before
    written = output.read_bytes()
    result = CliRunner().invoke(main, ["export", "--run", str(run.path), "--to", "a1111"])
    assert "36 of the encoder swapped (12 differ), all others bit-identical" in result.stdout
    assert output.read_bytes() == written


# --- inspect ----------------------------------------------------------------------------------------------------------------


def test_inspect_verifies_foreign_checkpoints_and_encoders(model: tuple[Any, Path], tmp_path: Path) -> None:
    pipeline, path = model
    found = inspect_file(path)
    assert found["kind"].startswith("checkpoint (Stable Diffusion") and found["problems"] == []
    assert [note for note in found["notes"] if "states no erasure" not in note] == []
    header = read_header(path)
    tensors = safetensors.torch.load_file(path)
    places = [name for name in header.tensors if name.startswith(("cond_stage_model.model.", "conditioner.embedders.1.model."))]
    if places:
        prefix = next(
            start for start in ("cond_stage_model.model.", "conditioner.embedders.1.model.") if places[0].startswith(start)
        )
        bare = {name.removeprefix(prefix): tensors[name] for name in places}
        safetensors.torch.save_file(bare, tmp_path / "clip.safetensors")
        assert "in OpenCLIP's layout" in inspect_file(tmp_path / "clip.safetensors")["kind"]
        assert inspect_file(tmp_path / "clip.safetensors")["problems"] == []
    name = next(name for name in tensors if name.endswith(("layers.1.mlp.fc1.bias", "resblocks.1.mlp.c_fc.bias")))
    safetensors.torch.save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "cut.safetensors")
    assert inspect_file(tmp_path / "cut.safetensors")["problems"] == [f"1 tensors of the encoder are missing, first {name}."]


def test_inspect_finds_what_programs_do_not_load_in_loras(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    for tensors, words in (
        ({"lora_te_encoder_layers_0_mlp_fc1.lora_up.weight": up, "lora_te_encoder_layers_0_mlp_fc1.lora_down.weight": down}, "lack text_model_"),
        ({"lora_te_text_model_x.lora_up.weight": up}, "without its other half"),
        ({"lora_te_text_model_x.alpha": torch.tensor(1.0)}, "A1111 rejects"),
    ):  # fmt: skip
        safetensors.torch.save_file(tensors, path)
        assert words in inspect_file(path)["problems"][0]
    for tensors, layout in (
        ({"lora_unet_x.lora_up.weight": up, "lora_unet_x.lora_down.weight": down, "lora_unet_x.alpha": torch.tensor(2.0)}, "kohya's"),
        ({"text_encoder.a.lora_A.weight": down, "text_encoder.a.lora_B.weight": up}, "diffusers'"),
        ({"unet.a.lora.down.weight": down, "unet.a.lora.up.weight": up}, "diffusers'"),
    ):  # fmt: skip
        safetensors.torch.save_file(tensors, path)
        found = inspect_file(path)
        assert (found["problems"], found["rank"]) == ([], 2) and layout in found["notes"][0]
    mixed = {f"lora_te_text_model_{letter}.{part}": value for letter, alpha in (("a", 1.0), ("b", 2.0))
             for part, value in (("lora_up.weight", up.clone()), ("lora_down.weight", down.clone()), ("alpha", torch.tensor(alpha)))}  # fmt: skip
    safetensors.torch.save_file(mixed, path)
    assert "which diffusers mis-scales" in inspect_file(path)["notes"][1]


def test_the_header_holds_the_runs_provenance(sd15: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = run_of(sd15[1], tmp_path)
    for to in ("a1111", "lora", "lora-diff", "comfyui"):
        metadata = read_header(path_of(export(settings, run, to))).metadata
        assert json.loads(metadata["sd_erase.anchor"]) == {"bicycle": "object"}
        assert {"modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.title"} <= set(
            metadata
        )
        assert (metadata["format"], metadata["sd_erase.run"]) == ("pt", run.name)
        assert str(tmp_path) not in str(metadata)
