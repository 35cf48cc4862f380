"""``--objective graddiff``: gradient difference (Liu et al. 2022, "Continual learning and private unlearning")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.losses import retention
from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Pairwise

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers


class GradientDifference(Pairwise):
    """``L = -L_CLIP(forget) + L_CLIP(retain)``: ascent on the forget pairs, descent on the retain pairs."""

    default_weights = {"ascent": 1.0, "retention": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`ascent` and `retention`: the contrastive loss of either set, the first negative."""
        found, scale = self.embed(towers, batch), towers.clip.logit_scale.exp()
        return {
            "ascent": -retention(found.forget_images, found.forget_texts, scale),
            "retention": retention(found.retain_images, found.retain_texts, scale),
        }
