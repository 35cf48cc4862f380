"""What the loop asks of a method, and the parts that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.pairs import Pair
    from sd_erase.progress import Progress


@dataclass
class Batch:
    """One step's pairs: captions with where the concept stands, and image embeddings or pixels where images are used."""

    forget: list[Pair]
    retain: list[Pair]
    forget_images: torch.Tensor | None  # the frozen tower's normalised embeddings [pairs, dimensions]
    retain_images: torch.Tensor | None
    forget_pixels: torch.Tensor | None  # [pairs, 3, height, width], where the vision tower trains
    retain_pixels: torch.Tensor | None
    random: random.Random  # the step's own randomness, the same after a resume
    split: str = "train"  # or "validation"


def given(images: torch.Tensor | None) -> torch.Tensor:
    """A batch's images, for an objective that reads them.

    Raises:
        TypeError: the objective is not declared to need images, so none were loaded.
    """
    if images is None:
        raise TypeError("this objective reads images: set needs_images = True in its class")
    return images


class Method(Protocol):
    """A row of `catalog.METHODS`."""

    needs_images: bool
    only_matrices: bool  # whether all that trains are matrices, for which there is a better optimizer
    solves: bool  # whether `solve` changes the weights before the first step
    default_steps: int
    default_learning_rate: float
    default_weights: dict[str, float]

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Get ready and return the parameters to train."""

    def solve(self, towers: Towers, forget: list[Pair], retain: list[Pair], seed: int, progress: Progress) -> None:
        """Change what trains in closed form, from the training pairs; called only where `solves`."""

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """The named loss terms of one batch; the loop weighs and sums them."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs beside the weights."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""


class Stateless:
    """A method that keeps nothing from step to step but the weights."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        pass


def paper_terms(
    towers: Towers, batch: Batch, forget_pooled: torch.Tensor, retain_pooled: torch.Tensor, original_pooled: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The three modules of CLIPErase (eqs. 2 to 4).

    Args:
        forget_pooled, retain_pooled: the student's pooled text states [pairs, width].
        original_pooled: the frozen encoder's pooled states of the retain captions.
    """
    import torch

    from sd_erase.clip import image_embeddings, text_embeddings
    from sd_erase.erasure.losses import consistency, forgetting, retention

    forget_texts = text_embeddings(towers.clip, forget_pooled)
    retain_texts = text_embeddings(towers.clip, retain_pooled)
    with torch.no_grad():
        original_texts = text_embeddings(towers.frozen_clip, original_pooled)
    forget_images, retain_images = given(batch.forget_images), given(batch.retain_images)
    image_consistency: torch.Tensor | float = 0.0
    if batch.retain_pixels is not None:
        original_images = retain_images
        forget_images = image_embeddings(towers.clip, given(batch.forget_pixels))
        retain_images = image_embeddings(towers.clip, batch.retain_pixels)
        image_consistency = consistency(original_images, retain_images)
    return {
        "forgetting": forgetting(forget_images, forget_texts),
        "retention": retention(retain_images, retain_texts, towers.clip.logit_scale.exp()),
        "consistency": consistency(original_texts, retain_texts) + image_consistency,
    }
