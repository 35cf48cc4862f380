"""``--objective esd``: ESD-x, which fine-tunes the denoiser's cross-attention. A published comparator.

Erasing Concepts from Diffusion Models (Gandikota et al. 2023, arXiv:2303.07345, section 4.1): the denoiser's prediction for the concept c
becomes that of the frozen one away from it, e(x_t, c) <- e*(x_t) - strength [e*(x_t, c) - e*(x_t)], at images x_t that the edited
denoiser itself has partly drawn of c. ESD-x trains the cross-attention alone; nothing is retained. The paper is not at hand; its
strength of 1, 1,000 steps of one image and rate of 1e-5 are taken from there as they are widely stated, guidance 3 from its code's
descendants. Ours: the pocket's rate, and prompts of all words of the card in place of the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.peers.denoising import CrossAttentionPeer, predicted, read_states

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.erasure.method import Batch

STRENGTH = 1.0


class ESD(CrossAttentionPeer):
    """The term ``erase``: how far the prediction is from the target."""

    default_steps = 1000
    default_learning_rate = 1e-4
    published_learning_rate = 1e-5
    default_weights = {"erase": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """One image of one plain prompt."""
        import torch
        from torch.nn.functional import mse_loss

        prompt = batch.random.choice(self.plain).caption
        with torch.no_grad():
            empty, states = read_states(towers.frozen_text, towers, ["", prompt]).chunk(2)
        latents, step = self.denoiser.partly_drawn(self.unet, states, empty, batch.random)
        target = self.denoiser.away(latents, step, states, empty, STRENGTH)
        return {"erase": mse_loss(predicted(self.unet, latents, step, states), target)}
