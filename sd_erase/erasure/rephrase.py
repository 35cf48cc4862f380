"""The same sentence in another form, for captions to train on: data sets have one manner of writing, prompts have many."""

from __future__ import annotations

import random
import re

OPENERS = (
    "a photo of", "an old photo of", "a black and white photo of", "a close up of", "this is a picture of", "this is", "here is",
    "there is", "in this picture there is", "a drawing of", "a painting of", "we see", "look at",
)  # fmt: skip
CLOSERS = (
    ", photo",
    ", oil painting",
    ", highly detailed",
    ", black and white",
    " in this picture",
    " today",
    ", seen from afar",
)
_PLACE = re.compile(
    r"\s+((?:on|in|at|by|near|under|inside|outside|behind|over|along|in front of|next to|close to) (?:(?:the|an?|his|her|their|some) )?"
    r"(?:[^\W\d_]+ )?[^\W\d_]+)\s*\.?$",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:an?|the|two|some)\s", re.IGNORECASE)
Spans = tuple[tuple[int, int], ...]


def rephrased(caption: str, spans: Spans, rng: random.Random) -> tuple[str, Spans]:
    """`caption` with what it ends on in front, or behind an opening, or with an ending of its own; `spans` move along.

    Half of the captions stay as they are. A place that holds part of a span is not moved.
    """
    roll = rng.random()
    if roll < 0.2:
        return _fronted(caption, spans)
    if roll < 0.4 and _ARTICLE.match(caption):
        opener = rng.choice(OPENERS) + " "
        return opener + caption[0].lower() + caption[1:], _moved(spans, len(opener))
    if roll < 0.5:
        return caption.rstrip(". ") + rng.choice(CLOSERS), spans
    return caption, spans


def _moved(spans: Spans, shift: int) -> Spans:
    return tuple((start + shift, stop + shift) for start, stop in spans)


def _fronted(caption: str, spans: Spans) -> tuple[str, Spans]:
    """ "A dog sits on the grass." becomes "On the grass, a dog sits."."""
    place = _PLACE.search(caption)
    if place is None or any(stop > place.start() for _, stop in spans):
        return caption, spans
    front = f"{place[1][0].upper()}{place[1][1:]}, "
    return f"{front}{caption[0].lower()}{caption[1 : place.start()]}.", _moved(spans, len(front))
