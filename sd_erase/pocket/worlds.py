"""The embedded worlds as the builder sees them: what is drawn and said, and the sizes of the networks that learn it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase.pocket import world
from sd_erase.pocket.art import cast, scenes
from sd_erase.pocket.art.canvas import SIZE as ART_SIZE

HERE = Path(__file__).parent


@dataclass(frozen=True)
class World:
    """One embedded world."""

    name: str
    base: str  # the row of `bases.ROWS` that its pack becomes
    pack: Path  # where the pack lies in the package
    size: int  # pixels, both sides
    sample: Callable[..., Any]  # sample_scene(seed, held_out, noise): a scene with its caption
    render: Callable[
        [Any], tuple[Any, list[tuple[str, tuple[float, float, float, float]]]]
    ]  # the picture, and (name, box) of each thing
    captions: Callable[[Any, int], list[str]]  # further captions of a scene
    vocabulary: Callable[[], str]
    label: Callable[[str], str]  # the detector's label of a thing
    names: tuple[str, ...] = ()  # of the detector; COCO's where there are none
    manners: tuple[str, ...] = ()  # of the style's judge
    # sizes of the networks
    patch: int = 8  # of the CLIP, pixels
    autoencoder: tuple[int, ...] = (16, 32, 64)  # channels of its levels; each but the last halves the sides
    denoiser: tuple[int, ...] = (64, 128, 128)
    detector_width: float = 0.25  # of YOLOv5; 0.25 is its nano scale

    @property
    def latent_size(self) -> int:
        """Latents, both sides."""
        return self.size >> (len(self.autoencoder) - 1)


WORLDS = {
    "pocket": World(
        "pocket", "pocket", HERE / "weights", world.SIZE, world.sample_scene, world.render, world.captions_of, world.vocabulary,
        lambda name: world.BY_NAME[name].label,
    ),
    "art": World(
        "art", "pocket-art", HERE / "art" / "weights", ART_SIZE, scenes.sample_scene, scenes.render, scenes.captions_of, scenes.vocabulary, str.lower,
        names=tuple(name.lower() for name in cast.LABELS), manners=cast.MANNERS, patch=16, autoencoder=(16, 32, 64, 64), denoiser=(64, 96, 128), detector_width=0.125,
    ),
}  # fmt: skip
