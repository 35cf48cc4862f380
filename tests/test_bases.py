"""Base models by name, folder and file: what is loaded, and what is said where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ldm import checkpoint
from narrow import build, narrow
from safetensors.torch import load_file, save_file

from sd_erase import bases, components, hub
from sd_erase.errors import UserError


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return narrow("sd15", tmp_path, monkeypatch)


@pytest.mark.parametrize(("name", "family", "resolution"), [("sd15", "sd1", 512), ("sd21", "sd2", 512), ("sdxl", "sdxl", 1024)])
def test_a_one_file_checkpoint_loads_without_a_hub(
    name: str, family: str, resolution: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original, path = build(narrow(name, tmp_path, monkeypatch)), tmp_path / "model.safetensors"
    save_file(checkpoint(original), path)
    base = bases.resolve(str(path))
    assert (base.name, base.family, base.resolution) == ("model", family, resolution)
    loaded = components.load_pipeline(base)
    for part in ("unet", "vae", *(encoder.name for encoder in base.encoders)):
        expected, found = getattr(original, part).state_dict(), getattr(loaded, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), part
    # random weights predict nothing; what SD 2.x predicts is found by trying
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.tokenizer("a bicycle").input_ids == [49406, 320, 11652, 49407]
    for encoder in base.encoders:
        padding = 49407 if (encoder.name, family) in {("text_encoder", "sd1"), ("text_encoder", "sdxl")} else 0
        assert getattr(loaded, encoder.tokenizer)("a", padding="max_length").input_ids[-1] == padding
        state = components.text_encoder_state(base, encoder)
        expected = {key.removeprefix("text_model."): value for key, value in getattr(original, encoder.name).state_dict().items()}
        assert all(torch.equal(expected[key], state[key if "projection" in key else f"text_model.{key}"]) for key in expected)


@pytest.mark.parametrize(("sign", "answer"), [(-2.0, True), (1.0, False)])
def test_what_an_sd2_denoiser_predicts_is_found_by_trying(sign: float, answer: bool) -> None:
    class Denoiser:
        dtype, config = torch.float32, SimpleNamespace(cross_attention_dim=8)

        def __call__(self, sample: torch.Tensor, step: int, context: torch.Tensor) -> Any:
            return SimpleNamespace(sample=sign * sample)

    assert components.predicts_velocity(Denoiser()) is answer


def test_the_towers_of_a_one_file_checkpoint_train_without_their_partner(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd_erase.clip import load_towers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original, path = build(small), tmp_path / "model.safetensors"
    save_file(checkpoint(original), path)
    towers = load_towers(bases.resolve(str(path)), torch.device("cpu"), need_images=False)
    expected = original.text_encoder.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in towers.text.state_dict().items())
    assert towers.clip is None and towers.layers == (-1, -2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sd15", [859.52, 83.65, 123.06]), ("sd21", [865.91, 83.65, 340.39]), ("sdxl", [2567.46, 83.65, 123.06, 694.66])],
)
def test_the_full_configurations_have_the_known_numbers_of_parameters(name: str, millions: list[float]) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = bases.CONFIGURATIONS / name
    with torch.device("meta"):
        models = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        ]
        if name == "sdxl":
            models.append(CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2")))
    counts = [sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in models]
    assert counts == pytest.approx(millions, abs=0.01)


def test_a_folder_is_known_by_its_text_encoder(tmp_path: Path) -> None:
    base = bases.resolve(str(bases.POCKET_FOLDER))
    assert (base.name, base.source, base.resolution, base.detector) == ("weights", str(bases.POCKET_FOLDER), 64, "pocket")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt", "is a pickle"),
        ("missing.safetensors", "does not exist"),
        ("no-such-model", "is unknown"),
        ("empty", "is a folder without model_index.json"),
        ("text.txt", "is no model"),
        ("cut.safetensors", "is no complete safetensors file"),
        ("vae.safetensors", "holds no text encoder"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    save_file({"decoder.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=words):
        bases.resolve(name)


def converted(content: Any, path: Path) -> subprocess.CompletedProcess[str]:
    """What the advice for a pickle does, in a shell as a user would run it."""
    torch.save(content, path)
    with pytest.raises(UserError) as refusal:
        bases.resolve(str(path))
    command = str(refusal.value).partition("pass the new file: python ")[2]
    return subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True, text=True, cwd=path.parent)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class where pytorch-lightning has its own, which is not installed."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": place})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", place):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[place].ModelCheckpoint = kind  # type: ignore[attr-defined]
    return kind


def test_the_advice_for_a_pickle_converts_a_checkpoint_of_lightning(tmp_path: Path, lightning: type) -> None:
    shared, path = torch.arange(4.0), tmp_path / "sd v1's.ckpt"
    settings = lightning()
    settings.monitor = "val/loss"
    state = {
        "a": shared,
        "b": shared[:2],
        "half": torch.nn.Parameter(torch.ones(2).half()),
        "turned": torch.arange(6).reshape(2, 3).T,
        "step": 3,
    }
    result = converted({"state_dict": state, "callbacks": {lightning: {"best": 1}}, "settings": settings, "epoch": 3}, path)
    assert result.returncode == 0, result.stderr
    found = load_file(path.with_suffix(".safetensors"))
    assert {key: value.tolist() for key, value in found.items()} == {
        "a": [0, 1, 2, 3], "b": [0, 1], "half": [1, 1], "turned": [[0, 3], [1, 4], [2, 5]]
    }  # fmt: skip
    assert found["half"].dtype == torch.float16


class Evil:
    """What runs a command where a pickle is opened with trust."""

    def __reduce__(self) -> Any:
        return subprocess.getoutput, ("touch marker",)


def test_the_advice_for_a_pickle_runs_none_of_its_code(tmp_path: Path) -> None:
    result = converted({"state_dict": {"a": torch.ones(1)}, "evil": Evil()}, tmp_path / "evil.ckpt")
    assert not (tmp_path / "marker").exists()
    assert result.returncode != 0 or load_file(tmp_path / "evil.safetensors").keys() == {"a"}


def test_the_advice_for_a_pickle_converts_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.pt"
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, target: save(content, target, _use_new_zipfile_serialization=False))
    assert converted({"a": torch.ones(2)}, path).returncode == 0
    assert load_file(path.with_suffix(".safetensors"))["a"].tolist() == [1, 1]


def test_a_folder_of_pickles_is_refused(small: Path, tmp_path: Path) -> None:
    build(small).save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(UserError, match="has weights that are pickles"):
        components.load_pipeline(bases.resolve(str(tmp_path / "model")))


def test_a_hub_that_cannot_be_reached_says_what_to_pass_instead() -> None:
    with pytest.raises(UserError, match="cannot be fetched from the hub .*--base, or --base pocket"):
        components.load_pipeline(bases.resolve("someone/some-model"))


def test_a_clip_or_blip_folder_is_a_base_without_a_denoiser(tmp_path: Path) -> None:
    for kind in bases.IMAGE_TEXT:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {"hidden_size": 768}}))
        base = bases.resolve(str(tmp_path / kind))
        assert (base.family, base.source, base.clip_partner) == (kind, str(tmp_path / kind), str(tmp_path / kind))
        with pytest.raises(UserError, match="no denoiser"):
            components.load_pipeline(base)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="model_index.json"):
        bases.resolve(str(tmp_path / "bert"))


def test_an_unreachable_hub_is_told_after_one_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def fail(url: str, **options: Any) -> None:
        asked.append({"url": url, **options})
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(UserError, match=r"someone/some-model cannot be fetched from the hub \(ConnectionError\).*--base pocket"):
        components.load_pipeline(bases.resolve("someone/some-model"))
    with pytest.raises(UserError, match="pass the folder of that CLIP model with --clip"):
        components.clip_model("someone/some-clip")
    assert [request["timeout"] for request in asked] == [10, 10]
    assert all(request["url"].endswith("model_index.json") for request in asked)
    assert hub.folder_of(str(tmp_path)) == tmp_path and len(asked) == 2  # a local folder asks nobody
