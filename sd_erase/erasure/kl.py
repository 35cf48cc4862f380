"""``--objective kl``: KL minimisation (Maini et al. 2024, TOFU, arXiv:2401.06121)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.losses import prediction_divergence, retention
from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Pairwise, embed_captions

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers


class KLMinimization(Pairwise):
    """``L = -L_CLIP(forget) + KL(p_original || p_student)(retain)``, p the distributions over the batch's partners."""

    default_weights = {"ascent": 1.0, "divergence": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`ascent`: the negative contrastive loss of the forget pairs; `divergence`: the KL on the retain pairs."""
        found, scale = self.embed(towers, batch), towers.clip.logit_scale.exp()
        original = scale * batch.retain_images @ embed_captions(towers, batch.retain, frozen=True).T
        return {
            "ascent": -retention(found.forget_images, found.forget_texts, scale),
            "divergence": prediction_divergence(original, scale * found.retain_images @ found.retain_texts.T),
        }
