"""``--objective finetune``: fine-tuning on the retain pairs alone, the baseline that only hopes to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.losses import retention
from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Pairwise

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers


class FineTune(Pairwise):
    """``L = L_CLIP(retain)``: CLIP's contrastive loss (CLIPErase, eq. 3); the forget pairs are not seen."""

    default_weights = {"retention": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`retention`."""
        found = self.embed(towers, batch)
        return {"retention": retention(found.retain_images, found.retain_texts, towers.clip.logit_scale.exp())}
