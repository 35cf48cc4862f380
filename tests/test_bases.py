"""Base models by name, folder and file: what is loaded, and what is said where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import checkpoint
from safetensors.torch import save_file

from sd_erase import bases
from sd_erase.errors import UserError

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "attention_head_dim": 4, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "scheduler": {},
}


def build(folder: Path) -> Any:
    """A pipeline with random weights from a configuration folder."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).eval(),
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stable Diffusion 1.5's configuration with narrow layers, in place of the full one; its blocks and names are the same."""
    folder = tmp_path / "configs" / "sd15"
    for part, changes in SMALL.items():
        for path in (bases.CONFIGURATIONS / "sd15" / part).glob("*.json"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / path.name).write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "model_index.json").write_text((bases.CONFIGURATIONS / "sd15" / "model_index.json").read_text())
    monkeypatch.setattr(bases, "CONFIGURATIONS", folder.parent)
    return folder


def test_a_one_file_checkpoint_loads_without_a_hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original, path = build(small), tmp_path / "model.safetensors"
    save_file(checkpoint(original), path)
    base = bases.resolve(str(path))
    assert (base.name, base.family, base.resolution) == ("model", "sd1", 512)
    loaded = bases.load_pipeline(base)
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(original, part).state_dict(), getattr(loaded, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), part
    assert loaded.tokenizer("a bicycle").input_ids == [49406, 320, 11652, 49407]


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


def test_the_full_configuration_is_stable_diffusion_15() -> None:
    """Parameter counts that everybody knows: 859.5, 123.1 and 83.7 million."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = bases.CONFIGURATIONS / "sd15"
    with torch.device("meta"):
        models = (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        )
    counts = [sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in models]
    assert counts == pytest.approx([859.52, 123.06, 83.65], abs=0.01)


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


def test_a_hub_that_cannot_be_reached_says_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(UserError, match="cannot be fetched from the hub .*--base, or --base pocket"):
        bases.load_pipeline(bases.resolve("someone/some-model"))


def test_a_checkpoint_whose_configuration_only_the_hub_has_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    path = tmp_path / "sd2.safetensors"
    save_file({"cond_stage_model.model.ln_final.weight": torch.zeros(1)}, path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", fail)
    with pytest.raises(UserError, match="needs its configuration from the hub, which cannot be reached"):
        bases.load_pipeline(bases.resolve(str(path)))
