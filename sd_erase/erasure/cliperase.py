"""``--objective paper``: CLIPErase's three modules to the letter (eqs. 2 to 5), text tower or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.erasure.method import Batch, paper_terms
from sd_erase.erasure.pairwise import Pairwise

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept


class CLIPErase(Pairwise):
    """The paper's objective, as a reference: it sees the pooled embedding only, not what the denoiser reads."""

    default_weights = {"forgetting": 1.0, "retention": 1.0, "consistency": 1.0}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`forgetting` (eq. 2), `retention` (eq. 3), `consistency` (eq. 4)."""
        import torch

        from sd_erase.clip import encode

        ids, count = towers.tokens([pair.caption for pair in (*batch.forget, *batch.retain)]), len(batch.forget)
        ids = ids[:, : towers.end_of(ids)]  # the pooled state stands at end-of-text
        pooled = encode(towers.text, ids, (-1,))[1]
        with torch.no_grad():
            original_pooled = encode(towers.frozen_text, ids[count:], (-1,))[1]
        return paper_terms(towers, batch, pooled[:count], pooled[count:], original_pooled)


class ProjectionOnly(CLIPErase):
    """``--objective projection``: the paper's loss met in ``text_projection`` alone, which the denoiser never reads.

    A diagnostic: CLIP's own figures say that the concept is gone, and the generator draws it as before.
    """

    default_learning_rate = 3e-3  # one matrix has a longer way to go

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Train the text projection."""
        towers.clip.text_projection.weight.requires_grad_(True)
        return [towers.clip.text_projection.weight]
