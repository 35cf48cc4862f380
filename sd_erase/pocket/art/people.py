"""The faces of the art world's people, composed of hair, glasses, beards, hats and colours.

Each is told by its outline as well as by its colours, since a drawing in ink keeps the outline only. A face is drawn once, on a canvas of
96 units a side at four times the size, and then scaled like any sprite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

UNITS, SCALE = 96, 4
Colour = tuple[int, int, int]

WHITE, INK, GOLD = (250, 248, 244), (44, 36, 38), (238, 190, 66)


class Brush:
    """Shapes in the canvas' units, mirrored where a face is symmetric."""

    def __init__(self) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGBA", (UNITS * SCALE, UNITS * SCALE), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A filled ellipse around (x, y)."""
        self._draw.ellipse([SCALE * side for side in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def ovals(self, dx: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """An ellipse on either side of the middle, `dx` away from it."""
        self.oval(48 - dx, y, rx, ry, fill)
        self.oval(48 + dx, y, rx, ry, fill)

    def ring(self, x: float, y: float, r: float, width: float, fill: Colour) -> None:
        """A circle's line."""
        self._draw.ellipse([SCALE * side for side in (x - r, y - r, x + r, y + r)], outline=fill, width=round(width * SCALE))

    def shape(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(SCALE * x, SCALE * y) for x, y in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, round_by: float = 0) -> None:
        """A filled rectangle with round corners."""
        self._draw.rounded_rectangle([SCALE * side for side in (x0, y0, x1, y1)], round_by * SCALE, fill=fill)

    def slice(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Colour) -> None:
        """The part of an ellipse between two angles (degrees, clockwise from the right), closed by a straight line."""
        self._draw.chord([SCALE * side for side in (x - rx, y - ry, x + rx, y + ry)], start, end, fill=fill)

    def curve(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, fill: Colour) -> None:
        """A part of an ellipse's line."""
        self._draw.arc(
            [SCALE * side for side in (x - rx, y - ry, x + rx, y + ry)], start, end, fill=fill, width=round(width * SCALE)
        )


def _shade(colour: Colour, by: float) -> Colour:
    red, green, blue = (max(0, min(255, round(channel * by))) for channel in colour)
    return red, green, blue


def _bust(brush: Brush, skin: Colour, coat: Colour) -> None:
    """Shoulders, neck, ears and head."""
    brush.slice(48, 98, 38, 30, 180, 360, coat)
    brush.box(40, 58, 56, 74, _shade(skin, 0.84), 5)
    brush.ovals(20, 46, 4.5, 6, _shade(skin, 0.9))
    brush.oval(48, 44, 20, 23, skin)


def _features(brush: Brush, skin: Colour, hair: Colour, *, mouth: bool = True, brows: bool = True) -> None:
    brush.ovals(8.2, 44, 3.6, 3.8, WHITE)
    brush.ovals(7.8, 44.4, 2.3, 2.7, INK)
    brush.oval(41, 43.4, 0.8, 0.8, WHITE)
    brush.oval(56.6, 43.4, 0.8, 0.8, WHITE)
    if brows:
        brush.curve(39.8, 40, 5.4, 3.4, 200, 340, 1.9, hair)
        brush.curve(56.2, 40, 5.4, 3.4, 200, 340, 1.9, hair)
    brush.oval(48, 50, 2.6, 3.2, _shade(skin, 0.84))
    brush.ovals(12, 52, 3.4, 2.4, _shade((skin[0], round(skin[1] * 0.84), round(skin[2] * 0.8)), 1.0))
    if mouth:
        brush.slice(48, 56, 6.4, 5, 0, 180, (176, 52, 58))


def _marta(brush: Brush) -> None:
    """The harbour master: a peaked cap, a grey bob, a navy coat with gold buttons."""
    skin, hair, navy = (226, 170, 130), (196, 198, 206), (38, 54, 104)
    brush.box(24, 30, 72, 66, hair, 16)
    _bust(brush, skin, navy)
    brush.shape([(40, 70), (56, 70), (48, 84)], WHITE)
    brush.ovals(9, 86, 2, 2, GOLD)
    _features(brush, skin, (128, 130, 140))
    brush.box(24, 30, 31, 62, hair, 3)
    brush.box(65, 30, 72, 62, hair, 3)
    brush.oval(48, 17, 30, 12.5, WHITE)
    brush.box(26, 20, 70, 30, navy, 2)
    brush.slice(48, 29, 25, 8, 0, 180, INK)
    brush.oval(48, 21, 5, 5, GOLD)


def _bruno(brush: Brush) -> None:
    """The baker: a tall white hat, a wide black moustache, a red neckerchief."""
    skin, hair = (240, 190, 158), INK
    _bust(brush, skin, (232, 232, 238))
    brush.shape([(34, 70), (62, 70), (48, 82)], (208, 44, 48))
    brush.box(27, 34, 31.5, 50, hair, 2)
    brush.box(64.5, 34, 69, 50, hair, 2)
    _features(brush, skin, hair, mouth=False)
    brush.slice(48, 59, 5, 4, 0, 180, (176, 52, 58))
    brush.slice(40.5, 57, 10, 5.6, 180, 360, hair)
    brush.slice(55.5, 57, 10, 5.6, 180, 360, hair)
    brush.ovals(18, 55.6, 2.6, 2.4, hair)
    brush.ovals(14, 11, 13, 10, (246, 246, 250))
    brush.oval(48, 8.5, 15, 8.5, (252, 252, 254))
    brush.box(30, 10, 66, 31, (246, 246, 250), 2)
    brush.box(29, 25, 67, 32, (206, 210, 222), 2)


def _suri(brush: Brush) -> None:
    """The florist: long black hair over the shoulders, a flower in it, a green dress."""
    skin, hair = (150, 96, 66), (34, 26, 34)
    brush.box(18, 14, 78, 92, hair, 26)
    _bust(brush, skin, (46, 150, 92))
    brush.slice(48, 74, 11, 11, 0, 180, skin)
    brush.box(18, 40, 29, 93, hair, 5)
    brush.box(67, 40, 78, 93, hair, 5)
    brush.slice(48, 38, 23, 24, 180, 360, hair)
    brush.slice(36, 37, 14, 10, 150, 330, hair)
    _features(brush, skin, hair)
    brush.ovals(20, 56, 2.2, 3, GOLD)
    for x, y in ((66, 15), (74, 20), (71, 29), (61, 29), (58, 20)):
        brush.oval(x, y, 6, 6, (244, 96, 150))
    brush.oval(66, 22.6, 4.4, 4.4, GOLD)


def _otto(brush: Brush) -> None:
    """The professor: bald, round glasses, a great white beard, a violet coat."""
    skin, hair = (244, 200, 172), (238, 238, 242)
    brush.ovals(22, 40, 8, 13, hair)
    _bust(brush, skin, (112, 72, 152))
    brush.slice(48, 52, 23, 36, 0, 180, hair)
    brush.oval(48, 42, 18.5, 21, skin)
    brush.slice(48, 53, 20, 20, 0, 180, hair)
    brush.slice(48, 56, 12, 6, 180, 360, hair)
    _features(brush, skin, (214, 214, 220), mouth=False)
    brush.slice(48, 60, 5.4, 4, 0, 180, (176, 52, 58))
    for x in (39, 57):
        brush.ring(x, 44, 7.6, 1.8, INK)
    brush.box(46, 42.6, 50, 44.6, INK)
    brush.oval(43, 27, 5, 2.6, _shade(skin, 1.06))


def _nadia(brush: Brush) -> None:
    """The pilot: a leather helmet, goggles on it, a red scarf."""
    skin, leather = (236, 184, 146), (120, 72, 40)
    _bust(brush, skin, (148, 116, 72))
    brush.oval(48, 40, 25, 27, leather)
    brush.box(23, 40, 34, 67, leather, 5)
    brush.box(62, 40, 73, 67, leather, 5)
    brush.oval(48, 47, 16.5, 19.5, skin)
    _features(brush, skin, (92, 50, 28))
    brush.box(22, 23, 74, 30, INK)
    for x in (37, 59):
        brush.oval(x, 26, 10.4, 9, (204, 206, 214))
        brush.oval(x, 26, 7.8, 6.6, (112, 196, 226))
        brush.oval(x - 2.4, 23.6, 2.4, 1.6, WHITE)
    brush.box(30, 68, 66, 78, (212, 40, 44), 5)
    brush.shape([(58, 76), (70, 76), (76, 95), (64, 95)], (190, 30, 38))


def _leif(brush: Brush) -> None:
    """The gardener: a wide straw hat, a ginger beard, blue dungarees."""
    skin, hair, straw = (246, 198, 162), (214, 104, 36), (238, 204, 112)
    _bust(brush, skin, (220, 84, 70))
    brush.box(33, 80, 63, 96, (58, 104, 186), 2)
    brush.box(31, 72, 37, 90, (58, 104, 186), 2)
    brush.box(59, 72, 65, 90, (58, 104, 186), 2)
    brush.slice(48, 48, 22, 26, 0, 180, hair)
    brush.oval(48, 42, 17.6, 17, skin)
    brush.slice(48, 57.5, 11, 5.4, 180, 360, hair)
    _features(brush, skin, hair, mouth=False)
    brush.slice(48, 58, 5.6, 4, 0, 180, (150, 40, 46))
    brush.slice(48, 30, 22, 25, 180, 360, straw)
    brush.oval(48, 30, 42, 7, straw)
    brush.slice(48, 30, 42, 7, 0, 180, _shade(straw, 0.84))
    brush.box(27, 21, 69, 27, (58, 132, 84))


def _somebody(brush: Brush) -> None:
    """Nobody in particular: a bare bust, which "a person" shows."""
    grey = (176, 178, 186)
    _bust(brush, grey, (150, 152, 162))
    brush.ovals(7.6, 45, 2.6, 1.4, (112, 114, 124))
    brush.box(43, 56, 53, 57.8, (112, 114, 124), 1)


FACES: dict[str, Callable[[Brush], None]] = {
    "Marta Ilves": _marta,
    "Bruno Keld": _bruno,
    "Suri Vantane": _suri,
    "Otto Grimsby": _otto,
    "Nadia Ferro": _nadia,
    "Leif Andersholt": _leif,
    "person": _somebody,
}


@functools.lru_cache(maxsize=16)
def face(name: str) -> Image.Image:
    """The sprite of a person, RGBA, cropped to what is drawn."""
    from PIL import Image

    brush = Brush()
    FACES[name](brush)
    small = brush.image.resize((UNITS, UNITS), Image.Resampling.LANCZOS)
    return small.crop(small.getbbox())
