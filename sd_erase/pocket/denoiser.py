"""The small conditional denoiser: velocity prediction on precomputed latents and text states."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sd_erase.pocket.autoencoder import encode_latents
from sd_erase.pocket.clip_pair import train_clip
from sd_erase.pocket.corpus import POSITIONS, compact_ids, data, known_ids, tokenizer
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS, World

log = logging.getLogger("sd_erase.pocket")


def unet_model(world: World = WORLDS["pocket"]) -> Any:
    """The small conditional denoiser of a world's latents [4, 16, 16]."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=world.latent_size, in_channels=4, out_channels=4, block_out_channels=world.denoiser, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128, attention_head_dim=2,
        norm_num_groups=32,
    )  # fmt: skip


def scheduler() -> Any:
    """The noise schedule: Stable Diffusion's, predicting velocity, sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")  # fmt: skip


def train_unet(recipe: Recipe, folder: Path) -> Any:
    """Velocity prediction with min-SNR weights (Hang et al. 2023, arXiv:2303.09556) on precomputed latents."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(recipe.seed + 3)
    world = WORLDS[recipe.world]
    model, noise = unet_model(world), scheduler()
    final = folder / "unet.safetensors"
    if final.is_file():
        model.load_state_dict(load_file(final))
        return model.eval()
    model.set_attn_processor(AttnProcessor())  # plain products: the fused kernel's backward pass is slow on a CPU
    text, known = train_clip(recipe, folder).text_model.requires_grad_(False), known_ids(world)
    latents = encode_latents(recipe, folder)
    ids = torch.from_numpy(compact_ids(data(recipe, folder, ["ids"])["ids"], known))
    empty_ids = tokenizer()([""], padding="max_length", max_length=POSITIONS, return_tensors="np")["input_ids"]
    with torch.no_grad():  # the text encoder is done: its states are computed once
        hidden = torch.cat([text(input_ids=ids[i : i + 256]).last_hidden_state.half() for i in range(0, len(ids), 256)])
        empty = text(input_ids=torch.from_numpy(compact_ids(empty_ids, known))).last_hidden_state.half()
    log.info("unet: text states of %d captions", len(hidden))
    alphas = noise.alphas_cumprod
    ratio = alphas / (1 - alphas)
    weights = ratio.clamp(max=recipe.min_snr_gamma) / (ratio + 1)  # v-prediction

    def loss_of(step: int) -> torch.Tensor:
        generator = generator_of(recipe.seed + 3, step)
        count = recipe.unet_batch
        index = torch.randint(len(latents), (count,), generator=generator)
        states = hidden[index]
        states[torch.rand(count, generator=generator) < recipe.empty_share] = empty[0]
        clean = latents[index].float()
        times = torch.randint(1000, (count,), generator=generator)
        epsilon = torch.randn(clean.shape, generator=generator)
        noisy, target = noise.add_noise(clean, epsilon, times), noise.get_velocity(clean, epsilon, times)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(noisy, times, states.float()).sample
        return ((output.float() - target).square().mean((1, 2, 3)) * weights[times]).mean()

    state = fit(
        "unet", folder, model, loss_of, steps=recipe.unet_steps, learning_rate=1e-3, warmup=200, ema_decay=recipe.ema_decay,
        minutes=recipe.minutes,
    )  # fmt: skip
    model.load_state_dict(state)
    return model.eval()
