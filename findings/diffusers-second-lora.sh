#!/bin/sh
# diffusers 0.42.1: loading a second LoRA on a text encoder switches the first one off, without a word: not until
# `set_adapters(["first", "second"])` do both act. Two LoRAs that each take a concept out of the encoder leave the first concept in.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 torch==2.14.1
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import diffusers
import peft
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
text = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, norm_num_groups=8,
)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=CLIPTextModel(text).eval(), tokenizer=None, unet=unet,
    scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
ids = torch.randint(3, 60, (1, 77))


def states():
    with torch.no_grad():
        return pipeline.text_encoder(ids)[0]


def lora(seed):
    """A LoRA of the text encoder's attention, in kohya's names."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in (0, 1):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"lora_te_text_model_encoder_layers_{layer}_self_attn_{part}"
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
    return tensors


print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
pipeline.load_lora_weights(lora(1), adapter_name="first")
first = states()
pipeline.load_lora_weights(lora(2), adapter_name="second")
loaded = states()
print("loaded:", pipeline.get_list_adapters()["text_encoder"], "active:", pipeline.get_active_adapters())
pipeline.set_adapters(["second"])
second = states()
pipeline.set_adapters(["first", "second"])
both = states()
print(f"after loading both, from the second alone: {(loaded - second).norm():.3f}, from both: {(loaded - both).norm():.3f}")
assert torch.equal(loaded, second) and (loaded - both).norm() > 1 and (loaded - first).norm() > 1
PYTHON
