"""What a step of training reads: pairs with their images' embeddings, each batch a function of the seed and its number alone."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from sd_erase.clip import Towers, cached_image_embeddings, read_pixels
from sd_erase.config import TrainConfig
from sd_erase.erasure.method import Batch
from sd_erase.errors import UserError
from sd_erase.pairs import Pair
from sd_erase.progress import Progress


class Batches:
    """Batches of pairs; a resumed run sees the same ones.

    Raises:
        UserError: a set without a training or validation pair, or images that are needed and missing.
    """

    def __init__(
        self,
        pairs: list[Pair],
        towers: Towers,
        settings: TrainConfig,
        seed: int,
        cache: Path,
        progress: Progress,
        *,
        needs_images: bool,
        reads_images: bool = True,
    ):
        """
        Args:
            cache: the file that keeps the images' embeddings.
            needs_images: whether the objective cannot do without.
            reads_images: whether it reads any that there are; without it none is embedded.
        """
        self.settings, self.seed, self.towers = settings, seed, towers
        self.warnings: list[str] = [*towers.notes]
        with_images = reads_images and towers.clip is not None and all(pair.image for pair in pairs)
        if not with_images and needs_images:
            raise UserError(
                f"Objective {settings.objective} needs an image for every caption, and the data set is text alone: "
                "pass a --dataset with images, or --objective sd."
            )
        self.with_pixels = settings.towers == "both"
        self.embeddings: dict[str, torch.Tensor] | None = None
        if with_images:
            paths = sorted({str(pair.image) for pair in pairs})
            with progress("image embeddings", len(paths)) as task:
                found = cached_image_embeddings(towers, paths, cache, task.advance)
            self.embeddings = {path: embedding.to(towers.text.device) for path, embedding in found.items()}
        self.sets = {
            (name, split): [pair for pair in pairs if pair.set == name and pair.split == split]
            for name in ("forget", "retain")
            for split in ("train", "validation")
        }
        for (name, split), group in self.sets.items():
            if not group:
                raise UserError(f"The {name} set has no {split} pair: harvest more captions, or change --train-share.")
        count = len(self.sets["forget", "train"])
        if count < settings.batch_size:
            self.warnings.append(
                f"The forget set has {count} training pairs, fewer than a batch of {settings.batch_size}: every step uses all of "
                "them; more captions (or --data synthetic) generalise better."
            )

    def batch(self, split: str, number: int) -> Batch:
        """Batch `number` of a split."""
        rng = random.Random(f"{self.seed}-{split}-{number}")
        size = self.settings.batch_size
        chosen = {
            name: rng.sample(group, min(size, len(group))) for name in ("forget", "retain") for group in [self.sets[name, split]]
        }
        forget, retain = chosen["forget"], chosen["retain"]
        return Batch(
            forget,
            retain,
            self._embeddings(forget),
            self._embeddings(retain),
            self._pixels(forget),
            self._pixels(retain),
            rng,
            split,
        )

    def _embeddings(self, pairs: list[Pair]) -> torch.Tensor | None:
        return None if self.embeddings is None else torch.stack([self.embeddings[str(pair.image)] for pair in pairs])

    def _pixels(self, pairs: list[Pair]) -> torch.Tensor | None:
        if not self.with_pixels:
            return None
        return read_pixels(self.towers.image_processor, [str(pair.image) for pair in pairs]).to(self.towers.text.device)
