"""``--objective ga``: gradient ascent on the forget pairs (Yao et al. 2023, arXiv:2310.10683)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.losses import retention
from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Pairwise

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers


class GradientAscent(Pairwise):
    """``L = -L_CLIP(forget)``: CLIP's contrastive loss (CLIPErase, eq. 1) on the forget pairs is maximised; nothing is retained."""

    default_weights = {"ascent": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`ascent`: the negative contrastive loss."""
        found = self.embed(towers, batch)
        return {"ascent": -retention(found.forget_images, found.forget_texts, towers.clip.logit_scale.exp())}
