"""A LoRA is read whole, in every program's names, or refused by the name of what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_erase.errors import UserError
from sd_erase.lora import add_lora, is_lora

MODULE = "text_model.encoder.layers.0.mlp.fc1"
WEIGHT, UP, DOWN = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)
KOHYA = f"lora_te_{MODULE.replace('.', '_')}"
STATE = {f"{MODULE}.weight": WEIGHT, f"{MODULE}.bias": torch.zeros(4), "text_model.final_layer_norm.weight": torch.ones(3)}


def added(tensors: dict[str, torch.Tensor], folder: Path, metadata: dict[str, str] | None = None) -> torch.Tensor:
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "lora.safetensors", metadata)
    return add_lora({"text_encoder": STATE}, folder / "lora.safetensors")["text_encoder"][f"{MODULE}.weight"] - WEIGHT


ALPHA = {"text_encoder.r": 2, "text_encoder.lora_alpha": 1}
NAMES = {
    "kohya": ({f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.alpha": torch.tensor(1.0)}, 0.5),
    "kohya without alpha": ({f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.lora_down.weight": DOWN}, 1.0),
    "diffusers": ({f"text_encoder.{MODULE}.lora_B.weight": UP, f"text_encoder.{MODULE}.lora_A.weight": DOWN}, 1.0),
    "diffusers without text_model": ({f"text_encoder.{MODULE[11:]}.lora_B.weight": UP, f"text_encoder.{MODULE[11:]}.lora_A.weight": DOWN}, 1.0),
    "old diffusers": ({f"text_encoder.{MODULE}.lora_linear_layer.up.weight": UP, f"text_encoder.{MODULE}.lora_linear_layer.down.weight": DOWN}, 1.0),
    "ComfyUI": ({f"text_encoders.clip_l.transformer.{MODULE}.lora_up.weight": UP, f"text_encoders.clip_l.transformer.{MODULE}.lora_down.weight": DOWN,
                 f"text_encoders.clip_l.transformer.{MODULE}.alpha": torch.tensor(4.0)}, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("form", NAMES)
def test_a_lora_is_read_in_every_programs_names(form: str, tmp_path: Path) -> None:
    tensors, scale = NAMES[form]
    assert torch.allclose(added(tensors, tmp_path), scale * UP @ DOWN, atol=1e-5) and is_lora(tensors)


def test_the_scale_that_peft_states_is_taken(tmp_path: Path) -> None:
    stated = {"lora_adapter_metadata": json.dumps(ALPHA)}
    assert torch.allclose(added(NAMES["diffusers"][0], tmp_path, stated), 0.5 * UP @ DOWN, atol=1e-5)
    adapter = {f"base_model.model.{MODULE}.lora_B.weight": UP, f"base_model.model.{MODULE}.lora_A.weight": DOWN}
    with pytest.raises(UserError, match="whose scale stands in adapter_config.json beside it"):
        added(adapter, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert torch.allclose(added(adapter, tmp_path), 3 * UP @ DOWN, atol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": True}))
    with pytest.raises(UserError, match="a LoRA with use_rslora, which is not read"):
        added(adapter, tmp_path)


def test_the_exact_form_is_added(tmp_path: Path) -> None:
    change = torch.randn(4, 3)
    assert torch.allclose(added({f"{KOHYA}.diff": change, f"{KOHYA}.diff_b": torch.ones(4)}, tmp_path), change, atol=1e-5)


PLAIN = NAMES["kohya"][0]
REFUSED = [
    (PLAIN | {f"{KOHYA}.dora_scale": torch.ones(1, 3)}, "is a DoRA"),
    ({f"text_encoder.{MODULE}.lora_magnitude_vector": torch.ones(4), **NAMES["diffusers"][0]}, "is a DoRA"),
    (PLAIN | {"lora_unet_mid_block_x.lora_up.weight": UP}, "changes the denoiser too (1 tensors, first lora_unet_mid_block_x.lora_up.weight)"),
    (NAMES["diffusers"][0] | {"unet.mid_block.x.lora_A.weight": DOWN}, "changes the denoiser too"),
    ({"lora_unet_mid_block_x.lora_up.weight": UP}, "a LoRA of the denoiser alone, it changes none"),
    (PLAIN | {"lora_te_text_model_encoder_layers_7_mlp_fc1.lora_up.weight": UP}, "1 of its tensors belong to none of its layers"),
    (PLAIN | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": UP}, "1 of its tensors belong to none of its layers"),
    ({f"{KOHYA}.lora_up.weight": UP}, f"first {KOHYA}.lora_up.weight"),
    ({f"{KOHYA}.alpha": torch.tensor(1.0)}, f"first {KOHYA}.alpha"),
    ({f"{KOHYA}.hada_w1_a": UP}, "is a LoHa"),
    ({f"{KOHYA}.lokr_w1": UP}, "is a LoKr"),
    ({f"{KOHYA}.lora_up.weight": torch.zeros(5, 2), f"{KOHYA}.lora_down.weight": DOWN}, "changes (5, 3) numbers of (4, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), REFUSED)
def test_what_cannot_be_added_is_refused_by_name(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        added(tensors, tmp_path)
    assert words in str(refusal.value), refusal.value


def test_two_encoders_have_names_of_their_own(tmp_path: Path) -> None:
    tensors = {f"lora_te{number}_{KOHYA[8:]}.{part}": value for number in (1, 2) for part, value in
               (("lora_up.weight", number * UP), ("lora_down.weight", DOWN))}  # fmt: skip
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    found = add_lora({"text_encoder": STATE, "text_encoder_2": STATE}, tmp_path / "x.safetensors")
    for number, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        assert torch.allclose(found[name][f"{MODULE}.weight"] - WEIGHT, number * UP @ DOWN, atol=1e-5)


def test_what_is_a_lora() -> None:
    assert not is_lora(["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"])
    assert not is_lora([f"{MODULE}.base_layer.weight", f"{MODULE}.lora_A.default.weight"])
    assert is_lora([f"base_model.model.{MODULE}.lora_A.weight"])
