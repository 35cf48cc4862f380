"""The numbers of a build: sizes and lengths, one recipe a world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build."""

    world: str = "pocket"
    seed: int = 0
    scenes: int = 40_960
    clip_steps: int = 1_000
    vae_steps: int = 2_400
    vae_batch: int = 16
    decoder_steps: int = 1_200
    unet_steps: int = 7_000
    unet_batch: int = 32
    judge_steps: int = 0  # of the style's classifier, where the world has styles
    detector_scenes: int = 2_000
    detector_epochs: int = 8
    empty_share: float = 0.1  # captions dropped for classifier-free guidance
    ema_decay: float = 0.999
    min_snr_gamma: float = 5.0
    minutes: float = 0.0  # that one training may take; 0: as many as its steps


RECIPES = {
    "pocket": Recipe(),
    # planned for three hours on two idle cores with --jobs 2: one trains the CLIP and then the denoiser, the other the autoencoder (which the
    # denoiser waits for), the decoder and the judges. Estimated seconds a step (what a busy core took, divided by what the pocket's steps took
    # there against an idle one): CLIP 0.6, autoencoder 0.35, decoder 0.22, denoiser 0.28
    "art": Recipe(
        world="art", clip_steps=3_000, vae_steps=5_000, vae_batch=8, decoder_steps=6_000, unet_steps=24_000, judge_steps=800,
        detector_scenes=4_000, detector_epochs=12, ema_decay=0.9995,
    ),
}  # fmt: skip
