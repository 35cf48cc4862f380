"""What objectives on CLIP's pair similarities share: which weights train, and the student's embeddings of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase.erasure.method import Batch, Stateless, given

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.pairs import Pair


@dataclass
class Embedded:
    """The normalised embeddings [pairs, dimensions] of one batch."""

    forget_images: torch.Tensor
    forget_texts: torch.Tensor
    retain_images: torch.Tensor
    retain_texts: torch.Tensor


class Pairwise(Stateless):
    """A method that sees CLIP's pooled embeddings, as CLIPErase and the unlearning methods that it is compared with do.

    A method of your own derives from it, sets `default_weights` and gives `losses`: see docs/add-a-method.md.
    """

    needs_images = True
    only_matrices = False
    solves = False
    default_steps = 120
    default_learning_rate = 3e-4
    default_weights: dict[str, float]

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Train the whole text tower, or both towers with their projections; the temperature stays."""
        trained = towers.clip if both_towers else towers.text
        trained.requires_grad_(True)
        towers.clip.logit_scale.requires_grad_(False)
        return [value for value in trained.parameters() if value.requires_grad]

    def embed(self, towers: Towers, batch: Batch) -> Embedded:
        """The student's embeddings; its images are the frozen tower's where only the text tower trains."""
        from sd_erase.clip import image_embeddings

        texts = embed_captions(towers, [*batch.forget, *batch.retain])
        forget_images, retain_images = given(batch.forget_images), given(batch.retain_images)
        if batch.retain_pixels is not None:
            forget_images = image_embeddings(towers.clip, given(batch.forget_pixels))
            retain_images = image_embeddings(towers.clip, batch.retain_pixels)
        count = len(batch.forget)
        return Embedded(forget_images, texts[:count], retain_images, texts[count:])


def embed_captions(towers: Towers, pairs: list[Pair], *, frozen: bool = False) -> torch.Tensor:
    """Normalised embeddings [pairs, dimensions] of the captions, the student's or the original's."""
    import torch

    from sd_erase.clip import encode, text_embeddings

    ids = towers.tokens([pair.caption for pair in pairs])
    ids = ids[:, : towers.end_of(ids)]  # the pooled state stands at end-of-text
    if not frozen:
        return text_embeddings(towers.clip, encode(towers.text, ids, (-1,))[1])
    with torch.no_grad():
        return text_embeddings(towers.frozen_clip, encode(towers.frozen_text, ids, (-1,))[1])
