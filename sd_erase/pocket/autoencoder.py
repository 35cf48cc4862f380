"""The small autoencoder: encoder and decoder together, then the decoder alone on noisy latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd_erase.pocket.corpus import data, pixels
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS, World


def vae_model(world: World = WORLDS["pocket"]) -> Any:
    """The small autoencoder of a world: four latent channels, a quarter (pocket) or an eighth (art) of the pixels a side."""
    from diffusers import AutoencoderKL

    levels = len(world.autoencoder)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=world.autoencoder,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=world.size,
        scaling_factor=1.0,
    )  # fmt: skip


def _reconstruction(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, squared error and the L1 of both finite differences: sharp sprites without a discriminator."""
    error = output.float() - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges


def train_vae(recipe: Recipe, folder: Path) -> Any:
    """The autoencoder; afterwards the latents' mean and deviation a channel are folded exactly into its 1x1 convolutions."""
    torch.manual_seed(recipe.seed + 1)
    model = vae_model(WORLDS[recipe.world])
    images = data(recipe, folder, ["images"])["images"]

    def loss_of(step: int) -> torch.Tensor:
        generator = generator_of(recipe.seed + 1, step)
        target = pixels(images[torch.randint(len(images), (recipe.vae_batch,), generator=generator).numpy()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = model.encode(target).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            output = model.decode(latents).sample
        return _reconstruction(output, target) + 1e-4 * posterior.kl().mean() / 256

    model.load_state_dict(fit("vae", folder, model, loss_of, steps=recipe.vae_steps, learning_rate=2e-3, minutes=recipe.minutes))
    return fold_statistics(model.eval(), images)


@torch.no_grad()
def fold_statistics(model: Any, images: np.ndarray) -> Any:
    """Make the latents zero-mean and unit-deviation in every channel, without a change of the reconstruction."""
    means = torch.cat([model.encode(pixels(images[i : i + 64])).latent_dist.mean for i in range(0, min(2048, len(images)), 64)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    encode, decode = model.quant_conv, model.post_quant_conv
    encode.bias[:4] = (encode.bias[:4] - mean) / deviation
    encode.weight[:4] /= deviation[:, None, None, None]
    encode.bias[4:] -= 2 * deviation.log()
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(1)
    decode.weight *= deviation[None, :, None, None]
    return model


def train_decoder(recipe: Recipe, folder: Path) -> Any:
    """The decoder alone, on noisy latents: what a denoiser gives is never exact."""
    model = train_vae(recipe, folder)
    images, latents = data(recipe, folder, ["images"])["images"], encode_latents(recipe, folder)
    decoder = nn.ModuleList([model.post_quant_conv, model.decoder])

    def loss_of(step: int) -> torch.Tensor:
        generator = generator_of(recipe.seed + 2, step)
        index = torch.randint(len(images), (recipe.vae_batch,), generator=generator).numpy()
        noisy = latents[index].float()
        noisy = noisy + 0.05 * torch.randn(noisy.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.decode(noisy).sample
        return _reconstruction(output, pixels(images[index]))

    state = fit("decoder", folder, decoder, loss_of, steps=recipe.decoder_steps, learning_rate=1.5e-3, minutes=recipe.minutes)
    decoder.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def encode_latents(recipe: Recipe, folder: Path) -> torch.Tensor:
    """The latents [N, 4, 16, 16] of all training scenes (posterior means, float16)."""
    path = folder / "latents.safetensors"
    if not path.is_file():
        model, images = train_vae(recipe, folder), data(recipe, folder, ["images"])["images"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = [model.encode(pixels(images[i : i + 128])).latent_dist.mean.half() for i in range(0, len(images), 128)]
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"]
