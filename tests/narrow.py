"""Pipelines with random weights and narrow layers; their blocks and names are those of the full models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sd_erase import bases

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "attention_head_dim": 4, "sample_size": 8},
        "text_encoder": _TEXT,
    },
    # the loader knows SD 2.x's spare block by its number, 23
    "sd21": {
        "unet": {
            "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "attention_head_dim": [2, 2, 4, 4], "sample_size": 8,
        },
        "text_encoder": {**_TEXT, "num_hidden_layers": 23},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": [32, 64, 64], "cross_attention_dim": 80, "attention_head_dim": [2, 4, 4], "sample_size": 8,
            "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 240,
        },
        "text_encoder": _TEXT,
        "text_encoder_2": {**_TEXT, "hidden_size": 48, "num_hidden_layers": 10, "projection_dim": 48},
    },
}  # fmt: skip
_VAE = {"block_out_channels": [32, 32, 32, 32], "sample_size": 64}


def narrow(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of sd-erase with narrow layers, in place of the full one."""
    own = folder / "configs" / name
    for path in (bases.CONFIGURATIONS / name).rglob("*.json"):
        changes = {"vae": _VAE, **SMALL[name]}.get(path.parent.name, {})
        target = own / path.relative_to(bases.CONFIGURATIONS / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(bases, "CONFIGURATIONS", own.parent)
    return own


def build(folder: Path) -> Any:
    """A pipeline with random weights from a configuration folder."""
    import diffusers
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1])
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).eval(),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer"),
        "scheduler": scheduler.from_pretrained(folder / "scheduler"),
    }
    if "text_encoder_2" in index:
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config).eval(), "tokenizer_2": parts["tokenizer"]}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
