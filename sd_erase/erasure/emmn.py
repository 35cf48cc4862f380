"""``--objective emmn``: error-minimising and error-maximising noise (Chundawat et al. 2023, Zero-shot machine unlearning)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Pairwise, embed_captions

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers

NOISE_STEPS = 5
NOISE_RATE = 0.1  # of Adam, in units of normalised pixels
NOISE_NORM = 0.01  # weight of the noise's mean square


class ErrorNoise(Pairwise):
    """No image is used: noise stands in for the images, and CLIP is trained to match it with the captions.

    The noise of the retain captions minimises the original CLIP's error, ``N_r = argmin L(N, t_r) + c |N|^2``; that of the forget
    captions maximises it, ``N_f = argmin -L(N, t_f) + c |N|^2``, L the cross-entropy over the batch's captions. Then
    ``L = L(N_f, t_f) + L(N_r, t_r)``: what the forget captions meant is written over, what the others mean is kept.
    """

    default_weights = {"impair": 1.0, "repair": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`impair`: cross-entropy of the error-maximising noise; `repair`: of the error-minimising noise."""
        import torch
        from torch.nn.functional import cross_entropy

        from sd_erase.clip import image_embeddings

        count, pairs = len(batch.forget), [*batch.forget, *batch.retain]
        noise = self.noise(towers, embed_captions(towers, pairs, frozen=True), count, batch.random.getrandbits(62))
        if batch.retain_pixels is None:
            with torch.no_grad():
                images = image_embeddings(towers.frozen_clip, noise)
        else:
            images = image_embeddings(towers.clip, noise)
        logits = towers.clip.logit_scale.exp() * images @ embed_captions(towers, pairs).T
        target = torch.arange(len(pairs), device=logits.device)
        return {
            "impair": cross_entropy(logits[:count], target[:count]),
            "repair": cross_entropy(logits[count:], target[count:]),
        }

    def noise(self, towers: Towers, texts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        """Noise images [pairs, 3, height, width], by Adam on the original CLIP; the first `count` maximise the error.

        Args:
            texts: the original's embeddings [pairs, dimensions].
            count: forget pairs.
            seed: of the noise before the first step.
        """
        import torch
        from torch.nn.functional import cross_entropy

        from sd_erase.clip import image_embeddings

        size = towers.clip.config.vision_config.image_size
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(texts), 3, size, size, generator=generator).to(texts.device).requires_grad_(True)
        optimizer = torch.optim.Adam([noise], lr=NOISE_RATE)
        target = torch.arange(len(texts), device=texts.device)
        sign = torch.ones(len(texts), device=texts.device)
        sign[:count] = -1
        scale = towers.frozen_clip.logit_scale.exp()
        with torch.enable_grad():  # a validation has none
            for _ in range(NOISE_STEPS):
                logits = scale * image_embeddings(towers.frozen_clip, noise) @ texts.T
                error = cross_entropy(logits, target, reduction="none")
                loss = (sign * error).sum() + NOISE_NORM * noise.square().mean((1, 2, 3)).sum()
                (noise.grad,) = torch.autograd.grad(loss, noise)
                optimizer.step()
        return noise.detach()
