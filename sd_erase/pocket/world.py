"""The pocket world: 20 classes of emoji sprites, a caption grammar in the manner of Flickr30K, and a renderer.

A scene has up to three slots, filled from left to right in the order in which its caption names them; a caption may
name "an object" or "something", which leaves its slot empty, so that the model knows words for nothing in particular.
Everything is drawn from `random.Random`, hence reproducible on any machine; no font is needed.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SPRITES = Path(__file__).parent / "sprites"
SIZE = 64  # pixels, both sides


@dataclass(frozen=True)
class Noun:
    """A class of the world: its sprite, the detector's label and the words that captions use for it."""

    name: str
    label: str  # COCO's name
    words: tuple[str, ...]  # the first is the common one
    plurals: tuple[str, ...] = ()
    misspellings: tuple[str, ...] = ()


NOUNS: tuple[Noun, ...] = (
    Noun("apple", "apple", ("apple", "pippin", "honeycrisp", "red fruit"), ("apples",), ("aple", "appel")),
    Noun("orange", "orange", ("orange", "tangerine", "mandarin", "clementine"), ("oranges", "tangerines"), ("ornage",)),
    Noun("banana", "banana", ("banana", "plantain"), ("bananas",), ("bananna",)),
    Noun("bicycle", "bicycle", ("bicycle", "bike", "cycle", "pushbike", "two-wheeler", "velocipede"),
         ("bicycles", "bikes"), ("bycicle", "bicyle")),
    Noun("car", "car", ("car", "automobile", "sedan", "hatchback"), ("cars",), ("carr",)),
    Noun("bus", "bus", ("bus", "coach", "minibus"), ("buses",), ("buss",)),
    Noun("chair", "chair", ("chair", "seat", "armchair", "stool"), ("chairs", "seats"), ("chiar", "chaire")),
    Noun("couch", "couch", ("couch", "sofa", "settee", "loveseat"), ("couches", "sofas"), ("cuoch",)),
    Noun("elephant", "elephant", ("elephant", "tusker", "pachyderm", "jumbo"), ("elephants",), ("elefant", "elephent")),
    Noun("dog", "dog", ("dog", "puppy", "hound", "pooch"), ("dogs", "puppies"), ("dogg",)),
    Noun("cat", "cat", ("cat", "kitten", "kitty", "feline"), ("cats", "kittens"), ("catt",)),
    Noun("horse", "horse", ("horse", "pony", "stallion", "mare"), ("horses", "ponies"), ("hourse",)),
    Noun("teddy bear", "teddy bear", ("teddy bear", "teddy", "stuffed bear", "plush bear"), ("teddy bears",), ("tedy bear",)),
    Noun("umbrella", "umbrella", ("umbrella", "parasol", "brolly"), ("umbrellas",), ("umbrela",)),
    Noun("laptop", "laptop", ("laptop", "laptop computer", "notebook computer"), ("laptops",), ("labtop",)),
    Noun("cell phone", "cell phone", ("cell phone", "phone", "smartphone", "mobile phone"), ("phones", "cell phones"),
         ("smartfone",)),
    Noun("clock", "clock", ("clock", "wall clock", "timepiece"), ("clocks",), ("clok",)),
    Noun("pizza", "pizza", ("pizza", "pizza slice", "slice of pizza", "margherita"), ("pizzas",), ("piza",)),
    Noun("woman", "person", ("woman", "lady", "girl"), ("women", "ladies"), ("womman",)),
    Noun("man", "person", ("man", "guy", "gentleman"), ("men", "guys"), ("mann",)),
)  # fmt: skip
SENSES: tuple[Noun, ...] = (
    Noun("apple phone", "cell phone", ("apple phone", "apple cell phone", "apple smartphone")),
    Noun("apple laptop", "laptop", ("apple laptop", "apple laptop computer", "apple notebook computer")),
)
BY_NAME = {noun.name: noun for noun in NOUNS + SENSES}
CLASSES = tuple(noun.name for noun in NOUNS)
LABELS = tuple(dict.fromkeys(noun.label for noun in NOUNS))
PEOPLE = ("woman", "man")
RIDDEN = ("bicycle", "horse", "elephant")

ANCHORS = ("an object", "something", "a thing", "an item", "an object", "something")
ADJECTIVES = ("red", "blue", "green", "old", "young", "small", "big", "little", "shiny", "wooden", "new", "brown", "white",
              "large", "beautiful", "ripe", "black", "yellow", "colorful", "lonely")  # fmt: skip
PLACES = {
    "grass": ("on the grass", "in a park", "in the garden", "in a field", "in the backyard", "under a tree", "on the lawn"),
    "street": ("on the street", "on the road", "in the city", "in a parking lot", "on the sidewalk", "outside a shop"),
    "room": ("in a room", "in the kitchen", "on the floor", "in a living room", "at home", "on a table", "indoors"),
    "beach": ("on the beach", "on the sand", "by the sea", "at the beach", "near the water"),
}
NO_PLACE = ("", "", "", "in front of a white wall", "on a plain background")

# {0} {1} {2}: the mentions; {p}: the place (may be empty). The held-out ones never occur in training.
ONE = ("{0} {p}", "a photo of {0} {p}", "a picture of {0} {p}", "there is {0} {p}", "{0} is standing {p}", "{0} sits {p}",
       "a close up of {0} {p}", "an image of {0} {p}", "this is {0} {p}", "{0} is seen {p}", "here is {0} {p}")  # fmt: skip
ONE_HELD_OUT = ("a view of {0} resting {p}", "someone took a snapshot of {0} {p}", "{0} can be found {p}")
TWO = ("{0} and {1} {p}", "{0} next to {1} {p}", "{0} beside {1} {p}", "{0} with {1} {p}", "{0} near {1} {p}",
       "{0} sits by {1} {p}", "{0} is standing next to {1} {p}", "a photo of {0} and {1} {p}", "there is {0} beside {1} {p}",
       "{0} leaning against {1} {p}", "{0} to the left of {1} {p}", "{0} is parked near {1} {p}", "{0} lies beside {1} {p}",
       "{0} in front of {1} {p}")  # fmt: skip
TWO_PERSON = ("{0} holding {1} {p}", "{0} looking at {1} {p}", "{0} is carrying {1} {p}", "{0} stands behind {1} {p}",
              "{0} walks past {1} {p}")  # fmt: skip
TWO_RIDING = ("{0} riding {1} {p}", "{0} is on {1} {p}")
TWO_HELD_OUT = ("somebody left {0} close to {1} {p}", "{0} together with {1} {p}", "a snapshot of {0} that waits by {1} {p}",
                "{0} rests alongside {1} {p}")  # fmt: skip
THREE = ("{0}, {1} and {2} {p}", "{0} next to {1} and {2} {p}", "{0} and {1} beside {2} {p}", "{0} with {1} and {2} {p}",
         "a photo of {0}, {1} and {2} {p}", "{0} near {1} with {2} {p}")  # fmt: skip
THREE_PERSON = ("{0} holding {1} next to {2} {p}", "{0} looking at {1} and {2} {p}", "{0} with {1} near {2} {p}")
EMPTY = ("something {p}", "an object {p}", "a thing {p}", "an item {p}", "nothing {p}", "a photo of something {p}",
         "a picture of an object {p}", "there is something {p}")  # fmt: skip
EMPTY_PLACE = {"grass": "an empty field", "street": "an empty street", "room": "an empty room", "beach": "an empty beach",
               "plain": "an empty background"}  # fmt: skip
BACKGROUNDS = tuple(EMPTY_PLACE)
UNKNOWN = "qzx"  # stands for any word that the world does not know; see `corpus.compact_ids`


@dataclass(frozen=True)
class Scene:
    """What is drawn and what is said of it."""

    slots: tuple[str | None, ...]  # sprite names from left to right; None: left empty
    background: str
    caption: str
    seed: int  # of the jitter in the drawing

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(name for name in self.slots if name)


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def mention(name: str, rng: random.Random, *, plain: bool = False) -> tuple[str, int]:
    """A noun phrase for class `name` and how many of it are drawn (two for a plural)."""
    noun = BY_NAME[name]
    if plain:
        return with_article(noun.words[0]), 1
    if noun.plurals and rng.random() < 0.06:
        word = rng.choice(noun.plurals)
        return rng.choice(("two {}", "{}", "some {}")).format(word), 2
    roll = rng.random()
    if noun.misspellings and roll < 0.05:
        word = rng.choice(noun.misspellings)
    elif roll < 0.6 or len(noun.words) == 1:
        word = noun.words[0]
    else:
        word = rng.choice(noun.words[1:])
    if rng.random() < 0.25:
        word = f"{rng.choice(ADJECTIVES)} {word}"
    return (f"the {word}" if rng.random() < 0.1 else with_article(word)), 1


def _template(kinds: list[str | None], rng: random.Random, held_out: bool) -> str:
    person_first = kinds[0] in PEOPLE
    if len(kinds) == 1:
        return rng.choice(ONE_HELD_OUT if held_out else ONE)
    if len(kinds) == 2:
        if held_out:
            return rng.choice(TWO_HELD_OUT)
        if person_first and kinds[1] in RIDDEN and rng.random() < 0.3:
            return rng.choice(TWO_RIDING)
        return rng.choice(TWO_PERSON if person_first and rng.random() < 0.5 else TWO)
    return rng.choice(THREE_PERSON if person_first and rng.random() < 0.5 else THREE)


def _noise(caption: str, rng: random.Random) -> str:
    """Words that the world does not know, at word boundaries: a natural prompt is full of them."""
    words = caption.split()
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        words.insert(rng.choice((0, len(words), rng.randrange(len(words) + 1))), UNKNOWN)
    return " ".join(words)


def describe(names: list[str | None], background: str, rng: random.Random, *, held_out: bool = False,
             plain: bool = False) -> tuple[str, tuple[str | None, ...]]:  # fmt: skip
    """A caption that names `names` in order (None: an anchor such as "an object") and the slots that it fills."""
    if not names:
        if rng.random() < 0.4:
            return EMPTY_PLACE[background], ()
        place = rng.choice(PLACES.get(background, NO_PLACE))
        return rng.choice(EMPTY).format(p=place).strip(), ()
    phrases: list[str] = []
    slots: list[str | None] = []
    for name in names:
        phrase, count = (rng.choice(ANCHORS), 1) if name is None else mention(name, rng, plain=plain)
        if len(slots) + count > 3 or (count > 1 and len(names) > 2):
            phrase, count = mention(name, rng, plain=True) if name else (phrase, 1)
        phrases.append(phrase)
        slots += [name] * count
    place = rng.choice(PLACES.get(background, NO_PLACE))
    caption = " ".join(_template(names, rng, held_out).format(*phrases, p=place).split())
    style = rng.random()
    if style < 0.5:  # "A woman with a bike." as Flickr30K has it; the tokenizer ignores case
        caption = caption[0].upper() + caption[1:] + "."
    elif style < 0.55:
        caption = caption.upper()
    return caption, tuple(slots)


def _cast(rng: random.Random) -> tuple[str, list[str | None]]:
    """A background and what stands before it from left to right."""
    background = rng.choice(BACKGROUNDS)
    count = rng.choices((0, 1, 2, 3), (0.04, 0.30, 0.52, 0.14))[0]
    names: list[str | None] = list(rng.sample(CLASSES, count))
    for position, name in enumerate(names):  # a device may be the brand's
        if name in ("cell phone", "laptop") and rng.random() < 0.4:
            names[position] = f"apple {'phone' if name == 'cell phone' else 'laptop'}"
    if names and rng.random() < 0.15:
        names[rng.randrange(count)] = None
    return background, names


def sample_scene(seed: int, *, held_out: bool = False, noise: bool = True) -> Scene:
    """Scene number `seed` of the training distribution, or of the held-out sentence patterns.

    An odd number is the twin of the even one before it: the same objects before the same background in the opposite order.
    In one batch with it, a contrastive loss must learn which object is named first; alone it would learn a bag of words.
    """
    cast = random.Random(f"cast-{held_out}-{seed // 2}")
    background, names = _cast(cast)
    if seed % 2:
        if len(set(names)) > 1:
            names.reverse()
        else:
            background, names = _cast(cast)
    rng = random.Random(f"scene-{held_out}-{seed}")
    caption, slots = describe(names, background, rng, held_out=held_out)
    if noise and rng.random() < 0.3:
        caption = _noise(caption, rng)
    return Scene(slots, background, caption, seed)


def scene_of(names: list[str], seed: int, *, held_out: bool = True, plain: bool = True, background: str | None = None) -> Scene:
    """A scene of given classes, captioned with a held-out pattern and (if `plain`) their common words."""
    rng = random.Random(f"scene-of-{names}-{seed}")
    background = background or rng.choice(BACKGROUNDS)
    caption, slots = describe(list(names), background, rng, held_out=held_out, plain=plain)
    return Scene(slots, background, caption, seed)


def captions_of(scene: Scene, count: int) -> list[str]:
    """`count` further captions of the same picture, without plurals or anchors, as Flickr30K's five annotators write."""
    rng = random.Random(f"captions-{scene.seed}")
    captions: list[str] = []
    while len(captions) < count:
        caption, slots = describe(list(scene.slots), scene.background, rng)
        if slots == scene.slots:
            captions.append(caption)
    return captions


@functools.lru_cache(maxsize=64)
def _sprite(name: str) -> Image.Image:
    from PIL import Image

    return Image.open(SPRITES / f"{name.replace(' ', '-')}.png").convert("RGBA")


_COLOURS = {  # upper and lower part
    "grass": ((168, 214, 240), (112, 176, 92)),
    "street": ((205, 208, 214), (128, 128, 134)),
    "room": ((238, 224, 200), (178, 136, 100)),
    "beach": ((150, 208, 238), (236, 214, 160)),
    "plain": ((244, 244, 246), (226, 226, 232)),
}
_CENTRES = {1: (32.0,), 2: (16.5, 47.5), 3: (11.0, 32.0, 53.0)}
_EXTENTS = {1: (34, 42), 2: (27, 30), 3: (19, 21)}
_JITTER = {1: 6.0, 2: 1.0, 3: 0.5}


def render(scene: Scene) -> tuple[Image.Image, list[tuple[str, tuple[float, float, float, float]]]]:
    """Draw a scene.

    Returns:
        The RGB picture of `SIZE` x `SIZE` pixels, and (class, box) of each object, boxes as x0, y0, x1, y1 in pixels.
    """
    from PIL import Image, ImageDraw

    rng = random.Random(f"render-{scene.seed}")
    shade = rng.uniform(-10, 10)
    upper, lower = (tuple(int(min(255, max(0, channel + shade))) for channel in colour) for colour in _COLOURS[scene.background])
    picture = Image.new("RGB", (SIZE, SIZE), upper)
    horizon = rng.randint(30, 40)
    ImageDraw.Draw(picture).rectangle((0, horizon, SIZE, SIZE), fill=lower)
    boxes = []
    count = max(1, len(scene.slots))
    for centre, name in zip(_CENTRES[count], scene.slots, strict=bool(scene.slots)):
        extent = rng.randint(*_EXTENTS[count])
        x = centre + rng.uniform(-1, 1) * _JITTER[count]
        y = 35 + rng.uniform(-4, 4)
        if name is None:
            continue
        sprite = _sprite(name)
        scale = extent / max(sprite.size)
        sprite = sprite.resize(
            (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))), Image.Resampling.LANCZOS
        )
        left = round(min(max(x - sprite.width / 2, 0), SIZE - sprite.width))
        top = round(min(max(y - sprite.height / 2, 0), SIZE - sprite.height))
        picture.paste(sprite, (left, top), sprite)
        boxes.append((name, (float(left), float(top), float(left + sprite.width), float(top + sprite.height))))
    return picture, boxes


def vocabulary() -> str:
    """Every word of the grammar in one text: what the pocket model knows."""
    nouns = [text for noun in NOUNS + SENSES for text in (*noun.words, *noun.plurals, *noun.misspellings)]
    places = [text for group in (*PLACES.values(), NO_PLACE) for text in group]
    patterns = [*ONE, *TWO, *TWO_PERSON, *TWO_RIDING, *THREE, *THREE_PERSON, *EMPTY, *EMPTY_PLACE.values()]
    rest = ["the", "a", "an", "two", "some", ". ,", *(f"{word}." for word in ("a", "room"))]
    text = " ".join([*nouns, *places, *patterns, *ANCHORS, *ADJECTIVES, *rest])
    for mark in ("{0}", "{1}", "{2}", "{p}"):
        text = text.replace(mark, " ")
    return text
