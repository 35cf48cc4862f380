"""The art world's styles: eight procedures that draw one scene each in a manner of its own, and the plain one.

What repeats in a texture repeats every 8 pixels, which is one latent of an f8 autoencoder: dots, hatching and tiles then cost the latents
nothing, and their capacity is left for the scene. Every function takes a `Canvas` and noise [4, 4] and returns a picture [3, H, W], 0 to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from sd_erase.pocket.art.canvas import SIZE, Canvas, Plane, blurred, grid, mixed, rgb, step, widened

PERIOD = 8  # pixels of a latent


def _shadow(canvas: Canvas, right: int, down: int) -> Plane:
    """The sprites' mask, moved."""
    moved = np.zeros_like(canvas.mask)
    moved[down:, right:] = canvas.mask[: SIZE - down, : SIZE - right]
    return moved


@functools.lru_cache(maxsize=4)
def _spread(cells: int) -> Plane:
    """The matrix [SIZE, cells] by which cells become pixels, linearly."""
    place = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * (cells - 1)
    return np.clip(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0, 1)


def _clouds(noise: Plane) -> Plane:
    """A slow unevenness of -1 to 1 over the picture."""
    spread = _spread(len(noise))
    return spread @ noise @ spread.T


def plain(canvas: Canvas, noise: Plane) -> Plane:
    """The scene as it is, with a soft shadow."""
    shadow = blurred(_shadow(canvas, 3, 4), 2) * (1 - canvas.mask) * 0.22
    return canvas.picture * (1 - shadow)


def ink(canvas: Canvas, noise: Plane) -> Plane:
    """An ink outline: bold black lines on white paper, black where the scene is darkest."""
    bold = np.maximum(np.maximum(widened(canvas.outline), canvas.lines), np.float32(0.75) * canvas.ground_lines)
    black = canvas.mask * step(0.20 - canvas.tone, 0, 0.08)
    return mixed(rgb(252, 252, 250), rgb(18, 18, 24), np.maximum(bold, black))


def watercolour(canvas: Canvas, noise: Plane) -> Plane:
    """A watercolour wash: pale, uneven colours that pool at their borders and end before the paper does."""
    row, column = grid()
    wet = mixed(blurred(canvas.ground, 4), blurred(canvas.picture, 1), step(blurred(canvas.mask, 1), 0.2, 0.8))
    grey = wet.mean(0, keepdims=True)
    wash = np.clip(grey + (wet - grey) * 1.45, 0, 1)
    clouds = _clouds(noise)
    depth = 0.46 + 0.16 * clouds + 0.30 * canvas.mask
    pool = np.clip(blurred(canvas.mask, 1) - blurred(canvas.mask, 4), 0, 0.4) * canvas.mask
    paper = rgb(253, 250, 243)
    picture = paper * (1 - (1 - wash) * np.clip(depth + pool, 0, 1.05))
    border = np.minimum(np.minimum(row, SIZE - 1 - row), np.minimum(column, SIZE - 1 - column))
    frayed = border + 5 * clouds + 2 * np.sin(row / 5) + 2 * np.sin(column / 6)
    inside = np.maximum(step(frayed, 5, 9), canvas.mask)
    rim = np.exp(-np.square((frayed - 10) / 1.6)) * 0.16 * (1 - canvas.mask)
    return mixed(paper, picture * (1 - rim), inside)


TILE = 4  # pixels, grout included


@functools.lru_cache(maxsize=1)
def _tiles() -> tuple[Plane, Plane, Plane]:
    """Of each pixel: whether it is grout, how the light falls on its tile's edge, how much lighter its tile is (period 8)."""
    row, column = grid()
    grout = ((row % TILE == 0) | (column % TILE == 0)).astype(np.float32)
    bevel = ((row % TILE == 1) | (column % TILE == 1)).astype(np.float32) - ((row % TILE == 3) | (column % TILE == 3))
    kinds = np.array([[0.05, -0.04], [-0.05, 0.03]], np.float32)
    return grout, bevel, kinds[(row // TILE % 2).astype(int), (column // TILE % 2).astype(int)]


def _tiled(plane: Plane) -> Plane:
    """The mean over each tile, at each of its pixels."""
    rows, columns = plane.shape[-2] // TILE, plane.shape[-1] // TILE
    means = plane.reshape(*plane.shape[:-2], rows, TILE, columns, TILE).mean((-3, -1))
    return np.repeat(np.repeat(means, TILE, -2), TILE, -1)


def mosaic(canvas: Canvas, noise: Plane) -> Plane:
    """A mosaic: square tiles of one colour, dark grout between them."""
    grout, bevel, kinds = _tiles()
    inside = step(_tiled(canvas.mask), 0.35, 0.5)
    weight = np.maximum(canvas.mask, 0.02)
    colour = _tiled(canvas.picture * weight) / np.maximum(_tiled(weight), 1e-3)
    tile = mixed(_tiled(canvas.ground), colour, inside)
    grey = tile.mean(0, keepdims=True)
    tile = grey + (tile - grey) * 1.25 + (kinds * 0.8 + bevel * 0.05)
    return mixed(np.clip(tile, 0, 1), rgb(62, 54, 60), grout * np.float32(0.42))


@functools.lru_cache(maxsize=1)
def _dots() -> Plane:
    """The distance to the nearest dot of a loose screen that repeats every 8 pixels, pixels."""
    row, column = grid()
    centres = ((0.8, 1.2), (1.2, 5.4), (3.4, 3.1), (3.0, 7.4), (5.6, 0.9), (5.0, 5.2), (7.2, 3.0), (7.5, 6.9))
    near = np.full((SIZE, SIZE), PERIOD, np.float32)
    for y, x in centres:
        dy, dx = (row - y + 4) % PERIOD - 4, (column - x + 4) % PERIOD - 4
        np.minimum(near, np.hypot(dy, dx), out=near)
    return near


def _drawn_tone(canvas: Canvas, ground: float) -> Plane:
    """How dark a drawing in one ink is: the sprites by their tone and outline, the ground lightly."""
    depth = (0.95 - canvas.tone) * (canvas.mask * 0.95 + (1 - canvas.mask) * ground)
    return np.clip(np.maximum(0.85 * depth + 0.06 * canvas.mask, canvas.lines), 0, 1)


def stipple(canvas: Canvas, noise: Plane) -> Plane:
    """Stippling: dots of one dark ink on cream paper, larger where the scene is darker."""
    radius = 2.4 * np.sqrt(_drawn_tone(canvas, 0.42)) - 0.3
    return mixed(rgb(250, 240, 214), rgb(92, 40, 62), np.clip(radius - _dots() + 0.5, 0, 1))


@functools.lru_cache(maxsize=1)
def _hatch() -> tuple[Plane, Plane, Plane]:
    """The distance to the nearest line of three hatchings, pixels: level, steep, and across the steep one."""
    row, column = grid()
    level = np.abs((row + 2) % 4 - 2)
    steep, across = (
        (np.abs((place + 4) % PERIOD - 4) / np.sqrt(5)).astype(np.float32) for place in (row + 2 * column, 2 * row - column)
    )
    return level, steep, across


def engraving(canvas: Canvas, noise: Plane) -> Plane:
    """An engraving in dark green: level lines for the ground, steep ones that swell with the tone for things, crossed where it is dark."""
    level, steep, across = _hatch()
    tone = np.clip(1.06 - canvas.tone, 0, 1)
    back = np.clip(0.9 * tone - level + 0.3, 0, 1) * (1 - canvas.mask)
    line = np.clip(2.3 * tone - steep - 0.1, 0, 1)
    cross = np.clip(2.6 * (tone - 0.5) - across + 0.1, 0, 1)
    drawn = np.maximum(np.maximum(back, np.maximum(line, cross) * canvas.mask), canvas.lines)
    return mixed(rgb(228, 236, 220), rgb(20, 52, 46), drawn)


def _strong(colour: Plane) -> Plane:
    """A colour as dyed paper has it."""
    grey = colour.mean(0, keepdims=True)
    return np.clip(0.85 * (grey + (colour - grey) * 2.4) + 0.15 * rgb(255, 190, 110), 0, 1)


def cut_paper(canvas: Canvas, noise: Plane) -> Plane:
    """Cut paper: few strong colours with a white cut edge and a hard shadow, before torn sheets."""
    row, column = grid()
    soft = blurred(canvas.picture, 1)
    grey = soft.mean(0, keepdims=True)
    few = np.round(np.clip(grey + (soft - grey) * 1.5, 0, 1) * 3) / 3
    sheet, near = _strong(canvas.ground[:, 4:5, 4:5]), 0.6 * _strong(canvas.ground[:, -1:, :1]) + 0.4 * rgb(120, 60, 160)
    torn = row - canvas.horizon + 5 * np.abs((column / 16 + noise[0, 0]) % 2 - 1)
    sheet = mixed(sheet, rgb(255, 252, 244), step(torn, -2.5, -1.5))
    sheet = mixed(sheet, near, step(torn, 0, 1))
    edge = step(widened(widened(widened(canvas.mask))), 0.3, 0.7)
    cast = np.zeros_like(edge)
    cast[4:, 3:] = edge[:-4, :-3]
    sheet = sheet * (1 - 0.5 * (cast * (1 - edge)))
    return mixed(mixed(sheet, rgb(255, 252, 244), edge), few, step(canvas.mask, 0.4, 0.6))


@functools.lru_cache(maxsize=1)
def _ruled() -> Plane:
    """A grid of thin lines, one every 8 pixels."""
    row, column = grid()
    return ((row % PERIOD == 0) | (column % PERIOD == 0)).astype(np.float32)


def blueprint(canvas: Canvas, noise: Plane) -> Plane:
    """A blueprint: white lines on ruled blue."""
    sheet = mixed(rgb(26, 72, 160), rgb(96, 146, 222), _ruled() * 0.55)
    sheet = mixed(sheet, rgb(58, 112, 198), canvas.mask * (0.25 + 0.6 * canvas.tone))
    return mixed(sheet, rgb(238, 246, 255), np.maximum(canvas.lines, 0.45 * canvas.ground_lines))


POSTER = (rgb(36, 30, 66), rgb(200, 44, 72), rgb(246, 142, 54), rgb(254, 232, 180))


def flat(canvas: Canvas, noise: Plane) -> Plane:
    """A flat poster: four colours without a line, before a disc."""
    row, column = grid()
    levels = (0.36, 0.56, 0.76)
    few = POSTER[0]
    for level, colour in zip(levels, POSTER[1:], strict=True):
        few = mixed(few, colour, step(canvas.tone, level - 0.03, level + 0.03))
    sheet = rgb(62, 168, 160)
    disc = np.hypot(row - 56, column - 64)
    sheet = mixed(sheet, rgb(250, 224, 130), step(46 - disc, -1, 1))
    sheet = mixed(sheet, rgb(24, 110, 116), step(row - canvas.horizon - 16, -0.7, 0.7))
    return mixed(sheet, few, step(canvas.mask, 0.3, 0.7))


DRAW: dict[str, Callable[[Canvas, Plane], Plane]] = {
    "plain": plain,
    "ink": ink,
    "watercolour": watercolour,
    "mosaic": mosaic,
    "stipple": stipple,
    "engraving": engraving,
    "cut paper": cut_paper,
    "blueprint": blueprint,
    "flat": flat,
}
