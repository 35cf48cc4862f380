"""The denoiser in a comparator's loop: partly drawn images of a prompt, and what is predicted of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sd_erase import components, denoiser
from sd_erase.clip import encode
from sd_erase.erasure.peers.peer import Peer, training

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers

DRAWN = 10  # denoising steps of a whole drawing; papers take 50
GUIDANCE = 3.0  # while an image is partly drawn, as ESD's


class Denoiser:
    """A base's frozen denoiser."""

    def __init__(self, towers: Towers):
        import torch
        from diffusers import DDIMScheduler

        self.device = towers.text.device
        self.unet = components.diffusers_part(towers.base, "unet", torch.float32).requires_grad_(False).to(self.device)
        self.scheduler = DDIMScheduler.from_config(components.scheduler(towers.base).config)
        self.scheduler.set_timesteps(DRAWN)

    def partly_drawn(
        self, unet: Any, states: torch.Tensor, empty: torch.Tensor, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents that `unet` has drawn of a prompt up to a random step, and that step.

        Args:
            unet: which draws.
            states: of the prompts [images, positions, width].
            empty: of the empty prompt [1, positions, width].
            rng: chooses the step and the noise.

        Returns:
            [images, channels, height, width] and the diffusion's step at which they are.
        """
        import torch

        until, size = rng.randrange(DRAWN), unet.config.sample_size
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        shape = (len(states), unet.config.in_channels, size, size)
        latents = torch.randn(shape, generator=generator).to(self.device) * self.scheduler.init_noise_sigma
        both = torch.cat([empty.expand_as(states), states])
        with torch.no_grad():
            for step in self.scheduler.timesteps[:until]:
                without, found = predicted(unet, torch.cat([latents, latents]), step, both).chunk(2)
                latents = self.scheduler.step(without + GUIDANCE * (found - without), step, latents).prev_sample
        return latents, self.scheduler.timesteps[until]

    def away(
        self, latents: torch.Tensor, step: torch.Tensor, states: torch.Tensor, empty: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """ESD's target: the frozen denoiser's prediction without the prompt, less `strength` times what the prompt adds to it.

        Of the noise or of the velocity alike: at one step both are the same linear map of each other and of the latents, which a sum with
        weights of one in all leaves as it is.
        """
        import torch

        with torch.no_grad():
            without = predicted(self.unet, latents, step, empty.expand_as(states))
            return without - strength * (predicted(self.unet, latents, step, states) - without)


def predicted(unet: Any, latents: torch.Tensor, step: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """What `unet` predicts of `latents` at `step`, [images, channels, height, width]."""
    found: torch.Tensor = unet(latents, step, encoder_hidden_states=states).sample
    return found


def read_states(text: Any, towers: Towers, captions: Sequence[str]) -> torch.Tensor:
    """The hidden states [captions, positions, width] that a pipeline gives its denoiser."""
    return encode(text, towers.tokens(captions), towers.layers[:1])[0][0]


class CrossAttentionPeer(Peer):
    """A comparator that changes the denoiser's cross-attention and leaves the text encoder as it is.

    Attributes:
        endings: of the names of the parameters that change; "" is all of the cross-attention.
        of_denoiser: name -> parameter, what the run keeps.
    """

    needs_denoiser = True
    endings: tuple[str, ...] = ("",)
    of_denoiser: dict[str, Any] = {}  # noqa: RUF012 - each object gets one of its own

    def chosen(self, towers: Towers) -> list[Any]:
        """The cross-attention of a copy of the denoiser."""
        self.denoiser = Denoiser(towers)
        names = denoiser.cross_attention(self.denoiser.unet, self.endings)
        self.unet = denoiser.copied(self.denoiser.unet, names)
        self.of_denoiser = denoiser.cross_attention(self.unet, self.endings)
        return training(list(self.of_denoiser.values()))
