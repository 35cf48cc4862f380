"""The training scenes of a world as arrays, and the vocabulary that its captions use."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.world import UNKNOWN
from sd_erase.pocket.worlds import WORLDS, World

TOKENIZER = Path(__file__).parent / "weights" / "tokenizer"
POSITIONS = 77


def tokenizer() -> Any:
    """The CLIP tokenizer with Stable Diffusion's 49,408 entries."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def known_ids(world: World = WORLDS["pocket"]) -> list[int]:
    """The token ids that the world's words use, ascending; every other id shares one "unknown word" vector."""
    return list(_known_ids(world))


@functools.lru_cache(maxsize=2)
def _known_ids(world: World) -> tuple[int, ...]:
    from transformers import CLIPTokenizer

    tok: CLIPTokenizer = tokenizer()
    # punctuation glues to words in other ways than in the word list, so a few real captions join in
    samples = [world.sample(seed, noise=False).caption for seed in range(3000)]
    used = {token for text in [*world.vocabulary().split("\n"), *samples] for token in tok(text, truncation=False)["input_ids"]}
    unknown = set(tok(UNKNOWN, add_special_tokens=False)["input_ids"])
    return tuple(sorted((used | {tok.bos_token_id, tok.eos_token_id}) - unknown))


def compact_ids(ids: np.ndarray, known: list[int]) -> np.ndarray:
    """Token ids as indices into `known`; `len(known)` stands for every unknown token."""
    table = np.full(49_408, len(known), dtype=np.int64)
    table[known] = np.arange(len(known))
    return table[ids]


def data(recipe: Recipe, folder: Path, keys: Collection[str] = ("images", "ids")) -> dict[str, np.ndarray]:
    """The training scenes, drawn where they are not there yet: pictures [N, H, W, 3] in uint8 and token ids [N, 77].

    Args:
        keys: which of the two are read.
    """
    path = folder / "data.npz"
    if not path.is_file():
        world, tok = WORLDS[recipe.world], tokenizer()
        images = np.empty((recipe.scenes, world.size, world.size, 3), np.uint8)
        captions = []
        for number in range(recipe.scenes):
            scene = world.sample(number)
            images[number] = np.asarray(world.render(scene)[0])
            captions.append(scene.caption)
        ids = tok(captions, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="np")["input_ids"]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, images=images, ids=ids.astype(np.int32))
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in keys}


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] as float [N, 3, H, W] in -1..1, the range of the autoencoder and (mean .5, deviation .5) of the CLIP."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_images(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of `pixels`, rounded and clipped."""
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
