"""The builder of an embedded world's weights: one resumable step a component, from seeds.

Steps: data -> clip, vae -> decoder, latents -> unet, detector, classifier -> pack -> scores. Each writes into the work folder and is skipped where
its output stands; a training step resumes from its last checkpoint. ``python -m sd_erase.pocket build`` runs them all, two of them side by side with
``--jobs 2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sd_erase.pocket.autoencoder import encode_latents, fold_statistics, train_decoder, train_vae, vae_model
from sd_erase.pocket.clip_pair import clip_model, full_clip, train_clip
from sd_erase.pocket.corpus import POSITIONS, TOKENIZER, compact_ids, data, known_ids, pixels, tokenizer
from sd_erase.pocket.denoiser import scheduler, train_unet, unet_model
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.judges import classifier_model, detector_config, train_classifier, train_detector
from sd_erase.pocket.packed import load_pack
from sd_erase.pocket.packing import pack
from sd_erase.pocket.recipe import RECIPES, Recipe
from sd_erase.pocket.scoring import scores
from sd_erase.pocket.scoring_pocket import BARS
from sd_erase.pocket.worlds import WORLDS, World

__all__ = [
    "BARS", "POSITIONS", "RECIPES", "STEPS", "TOKENIZER", "WORLDS", "Recipe", "World", "classifier_model", "clip_model", "compact_ids", "data",
    "detector_config", "encode_latents", "fit", "fold_statistics", "full_clip", "generator_of", "known_ids", "load_pack", "pack", "pixels",
    "scheduler", "scores", "tokenizer", "train_classifier", "train_clip", "train_decoder", "train_detector", "train_unet", "train_vae",
    "unet_model", "vae_model",
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One part of the build; it is done at once where its output stands."""

    run: Callable[[Recipe, Path, Path], object]  # of the recipe, the work folder and the pack's
    after: tuple[str, ...] = ()  # the steps whose output it reads


STEPS = {
    "data": Step(lambda recipe, work, target: data(recipe, work, ())),
    "clip": Step(lambda recipe, work, target: train_clip(recipe, work), ("data",)),
    "vae": Step(lambda recipe, work, target: train_vae(recipe, work), ("data",)),
    "latents": Step(lambda recipe, work, target: encode_latents(recipe, work), ("vae",)),
    "unet": Step(lambda recipe, work, target: train_unet(recipe, work), ("clip", "latents")),
    "decoder": Step(lambda recipe, work, target: train_decoder(recipe, work), ("latents",)),
    "detector": Step(lambda recipe, work, target: train_detector(recipe, work), ("decoder",)),
    "classifier": Step(lambda recipe, work, target: train_classifier(recipe, work), ("decoder",)),
    "pack": Step(lambda recipe, work, target: pack(recipe, work, target), ("unet", "detector", "classifier")),
    "scores": Step(lambda recipe, work, target: scores(recipe, work, target), ("pack",)),
}


def steps_of(world: World) -> tuple[str, ...]:
    """The steps that a world's build has: only one with styles has a classifier."""
    return tuple(name for name in STEPS if name != "classifier" or world.manners)
