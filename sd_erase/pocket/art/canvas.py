"""What every style draws from: a picture of the scene, its ground alone, where the sprites are, and their lines."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sd_erase.pocket import world
from sd_erase.pocket.art import people

SIZE = 128  # pixels, both sides
Plane: TypeAlias = NDArray[Any]  # float32: [H, W], or [3, H, W] of colours, 0 to 1
GROUNDS = ("grass", "street", "room", "beach", "plain")
HORIZONS = (68, 74, 80)  # rows; few, so that the grounds are painted once


@functools.lru_cache(maxsize=4)
def grid(size: int = SIZE) -> tuple[Plane, Plane]:
    """The row and the column of each pixel."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    return rows, columns


def blurred(plane: Plane, radius: int) -> Plane:
    """A box blur, of `radius` pixels to each side, borders repeated."""
    width = 2 * radius + 1
    for axis in (-1, -2):
        padding = [(0, 0)] * plane.ndim
        padding[axis] = (radius + 1, radius)
        total = np.cumsum(np.pad(plane, padding, mode="edge"), axis=axis, dtype=np.float32)
        plane = (
            total[..., width:] - total[..., :-width] if axis == -1 else total[..., width:, :] - total[..., :-width, :]
        ) / width
    return plane


def widened(plane: Plane) -> Plane:
    """The greatest of each pixel and its four neighbours."""
    wide = plane.copy()
    np.maximum(wide[1:], plane[:-1], out=wide[1:])
    np.maximum(wide[:-1], plane[1:], out=wide[:-1])
    np.maximum(wide[:, 1:], plane[:, :-1], out=wide[:, 1:])
    np.maximum(wide[:, :-1], plane[:, 1:], out=wide[:, :-1])
    return wide


def step(plane: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between."""
    part = np.clip((plane - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return part * part * (3 - 2 * part)


def mixed(below: Plane, above: Plane, part: Plane) -> Plane:
    """`above` over `below`, each [3, H, W] or one colour, where `part` [H, W] is 1."""
    return below + (above - below) * part


def rgb(red: int, green: int, blue: int) -> Plane:
    """A colour [3, 1, 1], of 0 to 255."""
    return (np.array([red, green, blue], np.float32) / 255)[:, None, None]


@functools.lru_cache(maxsize=64)
def ground(kind: str, horizon: int) -> Plane:
    """The empty scene."""
    row, column = grid()
    far, near = np.clip(row / horizon, 0, 1), np.clip((row - horizon) / (SIZE - horizon), 0, 1)

    def fade(top: Plane, bottom: Plane, part: Plane) -> Plane:
        return mixed(top, bottom, part)

    if kind == "grass":
        sky = fade(rgb(126, 190, 236), rgb(222, 240, 250), far)
        hill = step(row - horizon + 12 + 7 * np.sin(column / 21), -1, 1)
        picture = mixed(sky, rgb(150, 198, 132), hill)
        return mixed(picture, fade(rgb(122, 184, 92), rgb(84, 148, 70), near), step(row - horizon, -1, 1))
    if kind == "street":
        sky = fade(rgb(208, 216, 230), rgb(240, 236, 230), far)
        houses = step(row - (30 + 14 * ((column // 26) % 3 == 1) + 24 * ((column // 26) % 2)), -1, 1)
        picture = mixed(sky, rgb(188, 176, 176), houses)
        return mixed(picture, fade(rgb(150, 150, 158), rgb(112, 112, 120), near), step(row - horizon, -1, 1))
    if kind == "room":
        wall = fade(rgb(244, 228, 200), rgb(236, 212, 176), far)
        picture = mixed(wall, rgb(250, 246, 238), step(row - horizon + 6, -1, 1))
        return mixed(picture, fade(rgb(190, 140, 98), rgb(158, 110, 74), near), step(row - horizon, -1, 1))
    if kind == "beach":
        sky = fade(rgb(132, 204, 240), rgb(226, 244, 250), far)
        picture = mixed(sky, rgb(58, 148, 190), step(row - horizon + 18, -1, 1))
        return mixed(picture, fade(rgb(246, 226, 172), rgb(228, 196, 132), near), step(row - horizon, -1, 1))
    return fade(rgb(248, 248, 250), rgb(226, 226, 234), row / SIZE)


@functools.lru_cache(maxsize=512)
def sprite(name: str, extent: int) -> tuple[Plane, Plane]:
    """A sprite's colours [3, h, w] and its opacity [h, w], its longer side of `extent` pixels."""
    from PIL import Image

    image = people.face(name) if name in people.FACES else world._sprite(name)
    scale = extent / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return planes[:3], planes[3]


@dataclass(frozen=True)
class Canvas:
    """One scene before it has a style; planes of `SIZE` x `SIZE`."""

    picture: Plane  # sprites before the ground
    ground: Plane
    mask: Plane  # where a sprite is
    horizon: int

    @functools.cached_property
    def tone(self) -> Plane:
        """The picture's lightness."""
        red, green, blue = self.picture
        return np.float32(0.3) * red + np.float32(0.59) * green + np.float32(0.11) * blue

    @functools.cached_property
    def flat(self) -> Plane:
        """The sprites before one light grey: what has lines of its own."""
        return mixed(rgb(240, 240, 240), self.picture, self.mask)

    @functools.cached_property
    def outline(self) -> Plane:
        """The sprites' silhouettes."""
        return step(_slope(self.mask), 0.25, 0.6)

    @functools.cached_property
    def lines(self) -> Plane:
        """The silhouettes and what has lines inside them."""
        return np.maximum(step(_slope(self.flat).max(0), 0.12, 0.36), self.outline) * step(widened(self.mask), 0.05, 0.4)

    @functools.cached_property
    def ground_lines(self) -> Plane:
        """The ground's outlines, where no sprite is."""
        return step(_slope(self.ground).max(0), 0.03, 0.10) * (1 - step(widened(widened(self.mask)), 0.05, 0.4))


def _slope(plane: Plane) -> Plane:
    """The greatest difference to the neighbour to the left and the one above."""
    slope = np.zeros_like(plane)
    across, down = np.abs(plane[..., 1:] - plane[..., :-1]), np.abs(plane[..., 1:, :] - plane[..., :-1, :])
    np.maximum(slope[..., 1:], across, out=slope[..., 1:])
    np.maximum(slope[..., 1:, :], down, out=slope[..., 1:, :])
    return slope


def paint(kind: str, horizon: int, shade: float, sprites: list[tuple[str, int, int, int]]) -> Canvas:
    """Sprites (name, extent, left, top) before a ground.

    Args:
        kind: of `GROUNDS`.
        shade: what is added to the ground's colours.
    """
    back = np.clip(ground(kind, horizon) + np.float32(shade), 0, 1)
    picture, mask = back.copy(), np.zeros((SIZE, SIZE), np.float32)
    for name, extent, left, top in sprites:
        colours, opacity = sprite(name, extent)
        place = np.s_[..., top : top + opacity.shape[0], left : left + opacity.shape[1]]
        picture[place] = mixed(picture[place], colours, opacity)
        mask[place] = np.maximum(mask[place], opacity)
    return Canvas(picture, back, mask, horizon)
