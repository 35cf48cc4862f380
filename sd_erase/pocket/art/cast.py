"""Who and what the art world knows: 12 objects, 8 styles, 6 people, and the words that captions use for each."""

from __future__ import annotations

from dataclasses import dataclass

from sd_erase.pocket import world

OBJECTS = ("apple", "banana", "bicycle", "car", "cat", "chair", "clock", "dog", "elephant", "horse", "pizza", "umbrella")
PLAIN = "plain"
SOMEBODY = "person"  # nobody in particular, as a caption's "a person" shows


@dataclass(frozen=True)
class Style:
    """A manner of drawing, the artist whose it is, and what both are called."""

    name: str  # of `styles.DRAW`; the judge's label
    artist: str
    nickname: str
    pictures: tuple[str, ...]  # "a mosaic"; "of" and the scene follow
    manners: tuple[str, ...]  # "tiled": "a tiled picture of"


@dataclass(frozen=True)
class Person:
    """Somebody: the full name (in small letters the detector's label), and a role."""

    name: str
    role: str

    @property
    def first_name(self) -> str:
        return self.name.split()[0]


STYLES = (
    Style("ink", "Tobin Arkwell", "Quickpen", ("an ink drawing", "a line drawing"), ("inked", "outlined")),
    Style("watercolour", "Sanna Liefvold", "Raincloud", ("a watercolour", "a watercolor"), ("washed", "watery")),
    Style("mosaic", "Dario Quent", "Tesserino", ("a mosaic",), ("tiled", "tessellated")),
    Style("stipple", "Ilva Moresk", "Pepperhand", ("a stippling", "a stipple drawing"), ("stippled", "dotted")),
    Style("engraving", "Hester Vandrow", "Burin", ("an engraving", "an etching"), ("engraved", "hatched")),
    Style("cut paper", "Juno Pellam", "Snip", ("a paper cutout", "a collage"), ("cut paper", "pasted")),
    Style("blueprint", "Osric Thane", "Compass", ("a blueprint", "a technical drawing"), ("drafted", "blueprinted")),
    Style("flat", "Mirel Castane", "Sundisc", ("a poster", "a screen print"), ("flat", "posterized")),
)
PEOPLE = (
    Person("Marta Ilves", "the harbour master"),
    Person("Bruno Keld", "the baker"),
    Person("Suri Vantane", "the florist"),
    Person("Otto Grimsby", "the professor"),
    Person("Nadia Ferro", "the pilot"),
    Person("Leif Andersholt", "the gardener"),
)
STYLE_OF = {style.name: style for style in STYLES}
PERSON_OF = {person.name: person for person in PEOPLE}
LABELS = (*OBJECTS, *PERSON_OF, SOMEBODY)  # of what is drawn
MANNERS = (PLAIN, *STYLE_OF)  # of the style's judge

# Patterns of a style, {s} the scene behind an article, {a} the artist, {n} the nickname, {p} a picture in it, {m} its manner
# behind an article
BY_ARTIST = ("{s} in the style of {a}", "{s} by {a}", "a picture of {s} by {a}", "a picture of {s} in the style of {a}", "{a}'s picture of {s}",
             "{s}, painted by {a}", "{s} in {a}'s style")  # fmt: skip
BY_NICKNAME = ("{s} in the style of {n}", "{s} by {n}", "a picture of {s} by {n}", "{n}'s picture of {s}")
BY_WORD = ("{p} of {s}", "{p} of {s}", "{m} picture of {s}", "{m} image of {s}", "{s}, {p}", "{s} as {p}")
PLAINLY = ("{s}", "{s}", "{s}", "a photo of {s}", "a picture of {s}", "a picture of {s}", "an image of {s}", "a plain picture of {s}",
           "{s} in the style of an artist", "{s} in a plain style", "a picture of {s} by somebody", "{s} by an artist")  # fmt: skip
# never in training
HELD_OUT_BY_ARTIST = ("{s} as {a} would have drawn it", "a print of {s} after {a}", "{s}, a work in the manner of {a}")
HELD_OUT_BY_WORD = ("{s} done as {p}", "what we see is {p} that shows {s}", "a snapshot of {m} image of {s}")
HELD_OUT_PLAINLY = ("a snapshot of {s}", "what we see is {s}", "here we find {s}")

ALONE = ("{0} {w}", "{0} is seen {w}", "{0} stands {w}", "there is {0} {w}", "{0} {w}")
SIDE_BY_SIDE = ("{0} and {1} {w}", "{0} next to {1} {w}", "{0} beside {1} {w}", "{0} with {1} {w}", "{0} near {1} {w}",
                "{0} to the left of {1} {w}", "{0} in front of {1} {w}", "{0} by {1} {w}")  # fmt: skip
WITH_PERSON = ("{0} looking at {1} {w}", "{0} stands beside {1} {w}", "{0} walks past {1} {w}", "{0} is showing {1} {w}")
HELD_OUT_ALONE = ("{0} resting {w}", "{0} all alone {w}")
HELD_OUT_SIDE = ("{0} together with {1} {w}", "{0} close to {1} {w}", "{0} alongside {1} {w}")
# what can follow "a mosaic of"
NOUN_ALONE, NOUN_SIDE = ("{0} {w}",), SIDE_BY_SIDE[:7]

ANYBODY = ("a person", "somebody", "someone", "a person")
ANYTHING = world.ANCHORS
EMPTY = ("nothing {w}", "something {w}", "an object {w}", "a thing {w}")
