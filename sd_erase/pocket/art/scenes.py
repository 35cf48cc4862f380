"""The art world's scenes: objects and people in a style, their captions, and their pictures of 128 x 128 pixels.

A scene has up to two slots, filled from left to right in the order in which its caption names them; "an object" leaves its slot empty, "a person"
shows nobody in particular, and without a style (or with "an artist" in a style's place) the picture is plain. Everything comes from `random.Random`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sd_erase.pocket import world
from sd_erase.pocket.art import cast, styles
from sd_erase.pocket.art.canvas import GROUNDS, HORIZONS, SIZE, paint, sprite

if TYPE_CHECKING:
    from PIL import Image

UNKNOWN = world.UNKNOWN
Slot = str | None  # a label of `cast.LABELS`; None: left empty
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """What is drawn, how, and what is said of it."""

    slots: tuple[Slot, ...]
    background: str
    style: str  # of `cast.MANNERS`
    caption: str
    seed: int

    @property
    def objects(self) -> tuple[str, ...]:
        """The labels of what is drawn, from left to right."""
        return tuple(name for name in self.slots if name)


# --- captions --------------------------------------------------------------------------------------------------------


def mention(name: Slot, rng: random.Random, *, plain: bool = False) -> str:
    """A noun phrase for a label, or for nothing in particular."""
    if name is None:
        return rng.choice(cast.ANYTHING)
    if name == cast.SOMEBODY:
        return rng.choice(cast.ANYBODY)
    if name in cast.PERSON_OF:
        person, roll = cast.PERSON_OF[name], rng.random()
        if plain or roll < 0.5:
            return person.name
        if roll < 0.75:
            return person.first_name
        return person.role if roll < 0.92 else f"{person.first_name}, {person.role}"
    noun, roll = world.BY_NAME[name], rng.random()
    word = noun.words[0]
    if not plain:
        if noun.misspellings and roll < 0.03:
            word = rng.choice(noun.misspellings)
        elif roll > 0.65 and len(noun.words) > 1:
            word = rng.choice(noun.words[1:])
        if rng.random() < 0.12:
            word = f"{rng.choice(world.ADJECTIVES)} {word}"
        if rng.random() < 0.1:
            return f"the {word}"
    return world.with_article(word)


def _body(slots: Sequence[Slot], background: str, rng: random.Random, *, held_out: bool, plain: bool, noun: bool) -> str:
    """What is seen.

    Args:
        noun: whether it must be a noun phrase, which "a mosaic of" can stand before.
    """
    where = "" if noun and rng.random() < 0.4 else rng.choice(world.PLACES.get(background, world.NO_PLACE))
    if not slots:
        if noun or rng.random() < 0.5:
            return world.EMPTY_PLACE[background]
        return " ".join(rng.choice(cast.EMPTY).format(w=where).split())
    patterns: tuple[str, ...]
    if len(slots) == 1:
        patterns = cast.NOUN_ALONE if noun else cast.HELD_OUT_ALONE if held_out else cast.ALONE
    elif held_out:
        patterns = cast.HELD_OUT_SIDE
    elif noun:
        patterns = cast.NOUN_SIDE
    else:
        is_person = slots[0] in cast.PERSON_OF or slots[0] == cast.SOMEBODY
        patterns = cast.WITH_PERSON if is_person and rng.random() < 0.4 else cast.SIDE_BY_SIDE
    phrases = [mention(name, rng, plain=plain) for name in slots]
    return " ".join(rng.choice(patterns).format(*phrases, w=where).split())


def describe(
    slots: Sequence[Slot], background: str, style: str, rng: random.Random, *, held_out: bool = False, plain: bool = False
) -> str:
    """A caption of a scene.

    Args:
        held_out: by patterns that never occur in training.
        plain: by the common words and the full names alone.
    """
    if style == cast.PLAIN:
        pattern = rng.choice(cast.HELD_OUT_PLAINLY if held_out else cast.PLAINLY)
        names: dict[str, str] = {}
    else:
        known, roll = cast.STYLE_OF[style], rng.random()
        names = {
            "a": known.artist,
            "n": known.nickname,
            "p": rng.choice(known.pictures),
            "m": world.with_article(rng.choice(known.manners)),
        }
        if held_out:
            pattern = rng.choice(cast.HELD_OUT_BY_ARTIST if plain or roll < 0.5 else cast.HELD_OUT_BY_WORD)
        else:
            pattern = rng.choice(cast.BY_ARTIST if plain or roll < 0.45 else cast.BY_NICKNAME if roll < 0.6 else cast.BY_WORD)
    scene = _body(slots, background, rng, held_out=held_out, plain=plain, noun=pattern != "{s}")
    caption = pattern.format(s=scene, **names)
    roll = rng.random()
    if roll < 0.5:  # the tokenizer ignores case
        return caption[0].upper() + caption[1:] + "."
    return caption.upper() if roll < 0.54 else caption


def _noise(caption: str, rng: random.Random) -> str:
    """Words that the world does not know, at word boundaries."""
    words = caption.split()
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        words.insert(rng.choice((0, len(words), rng.randrange(len(words) + 1))), UNKNOWN)
    return " ".join(words)


# --- scenes ----------------------------------------------------------------------------------------------------------

KINDS = ("empty", "object", "objects", "person", "person and object", "people")
SHARES = (0.04, 0.34, 0.30, 0.10, 0.18, 0.04)


def _style(rng: random.Random, share: float) -> str:
    return rng.choice(cast.STYLES).name if rng.random() < share else cast.PLAIN


def _cast(rng: random.Random) -> tuple[list[Slot], str, str]:
    """Slots, a background and a style."""
    kind = rng.choices(KINDS, SHARES)[0]
    people = rng.sample([*cast.PERSON_OF, *cast.PERSON_OF, cast.SOMEBODY], 2)  # each of the six twice as often as nobody
    things = rng.sample(cast.OBJECTS, 2)
    slots: list[Slot]
    if kind == "empty":
        slots = []
    elif kind == "object":
        slots = [things[0]]
    elif kind == "objects":
        slots = [*things]
    elif kind == "person":
        slots = [people[0]]
    elif kind == "people":
        slots = [*dict.fromkeys(people)]
    else:
        slots = [people[0], things[0]]
        if rng.random() < 0.3:
            slots.reverse()
    if slots and rng.random() < 0.06:
        slots[rng.randrange(len(slots))] = None
    with_person = any(name in cast.PERSON_OF or name == cast.SOMEBODY for name in slots)
    return slots, rng.choice(GROUNDS), _style(rng, 0.4 if with_person else 0.7)


def sample_scene(seed: int, *, held_out: bool = False, noise: bool = True) -> Scene:
    """Scene number `seed` of the training distribution, or of the held-out sentence patterns.

    An odd number is the twin of the even one before it: the same things in the opposite order, or one thing in another style. In one batch
    with it a contrastive loss must learn the order and the style; alone it would learn which things there are.
    """
    first = random.Random(f"art-cast-{held_out}-{seed // 2}")
    slots, background, style = _cast(first)
    if seed % 2:
        if len(set(slots)) > 1:
            slots.reverse()
        elif slots:
            style = first.choice([name for name in cast.MANNERS if name != style])
        else:
            slots, background, style = _cast(first)
    rng = random.Random(f"art-scene-{held_out}-{seed}")
    caption = describe(slots, background, style, rng, held_out=held_out)
    if noise and rng.random() < 0.25:
        caption = _noise(caption, rng)
    return Scene(tuple(slots), background, style, caption, seed)


def scene_of(names: Sequence[str], seed: int, *, style: str = cast.PLAIN, held_out: bool = True, plain: bool = True,
             background: str | None = None) -> Scene:  # fmt: skip
    """A scene of given labels in a style, captioned with a held-out pattern and (if `plain`) common words and full names."""
    rng = random.Random(f"art-scene-of-{list(names)}-{style}-{seed}")
    background = background or rng.choice(GROUNDS)
    return Scene(tuple(names), background, style, describe(names, background, style, rng, held_out=held_out, plain=plain), seed)


def captions_of(scene: Scene, count: int) -> list[str]:
    """`count` further captions of the same picture."""
    rng = random.Random(f"art-captions-{scene.seed}")
    return [describe(scene.slots, scene.background, scene.style, rng) for _ in range(count)]


# --- pictures --------------------------------------------------------------------------------------------------------

_CENTRES = {1: (64,), 2: (33, 95)}
_EXTENTS = {1: (80, 94), 2: (54, 60)}
_JITTER = {1: 12, 2: 3}


def pixels(scene: Scene) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """Draw a scene.

    Returns:
        The picture [128, 128, 3] in uint8, and (label, box) of each thing in it, boxes as x0, y0, x1, y1 in pixels.
    """
    rng = random.Random(f"art-render-{scene.seed}")
    horizon, shade = rng.choice(HORIZONS), rng.uniform(-0.03, 0.03)
    noise = np.array([rng.uniform(-1, 1) for _ in range(16)], np.float32).reshape(4, 4)
    sprites, boxes = [], []
    count = max(1, len(scene.slots))
    for centre, name in zip(_CENTRES[count], scene.slots, strict=bool(scene.slots)):
        extent = rng.randrange(_EXTENTS[count][0], _EXTENTS[count][1] + 1, 2)
        x, y = centre + rng.uniform(-1, 1) * _JITTER[count], 68 + rng.uniform(-7, 7)
        if name is None:
            continue
        height, width = sprite(name, extent)[1].shape
        left = round(min(max(x - width / 2, 2), SIZE - 2 - width))
        top = round(min(max(y - height / 2, 2), SIZE - 2 - height))
        sprites.append((name, extent, left, top))
        boxes.append((name, (float(left), float(top), float(left + width), float(top + height))))
    picture = styles.DRAW[scene.style](paint(scene.background, horizon, shade, sprites), noise)
    picture = np.broadcast_to(picture, (3, SIZE, SIZE)).transpose(1, 2, 0)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), boxes


def render(scene: Scene) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """`pixels` with the picture as an image."""
    from PIL import Image

    picture, boxes = pixels(scene)
    return Image.fromarray(picture), boxes


@functools.cache
def vocabulary() -> str:
    """Every word of the grammar in one text: what the art model knows."""
    nouns = [text for name in cast.OBJECTS for text in (*world.BY_NAME[name].words, *world.BY_NAME[name].misspellings)]
    names = [text for style in cast.STYLES for text in (style.artist, style.nickname, *style.pictures, *style.manners)]
    names += [f"{name}'s" for style in cast.STYLES for name in (style.artist, style.nickname)]
    names += [text for person in cast.PEOPLE for text in (person.name, person.role)]
    places = [text for group in (*world.PLACES.values(), world.NO_PLACE) for text in group]
    patterns = [*cast.BY_ARTIST, *cast.BY_NICKNAME, *cast.BY_WORD, *cast.PLAINLY, *cast.ALONE, *cast.SIDE_BY_SIDE, *cast.WITH_PERSON, *cast.EMPTY,
                *world.EMPTY_PLACE.values(), *cast.ANYBODY, *cast.ANYTHING, *world.ADJECTIVES, "the a an . ,"]  # fmt: skip
    text = " ".join([*nouns, *names, *places, *patterns])
    for mark in ("{0}", "{1}", "{w}", "{s}", "{a}", "{n}", "{p}", "{m}"):
        text = text.replace(mark, " ")
    return text
