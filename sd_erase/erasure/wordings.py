"""Captions in forms that no data set has: prompts are lists of tags, halves of sentences, words in any order, with words of all kinds between.

What is far from the retain captions' manner of writing moves most in an erasure, so that both sides are trained on such forms too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

Spans = tuple[tuple[int, int], ...]


def varied(caption: str, spans: Spans, others: Sequence[str], rng: random.Random) -> tuple[str, Spans]:
    """`caption` in another form; the words of each of its `spans` stay together and stay in it.

    Args:
        caption: a sentence.
        spans: characters of the words that must stay.
        others: words that may be put in: the base's vocabulary without the concepts' names.
        rng: makes the choices.

    Returns:
        The caption and where the spans are now, left to right.
    """
    pieces = _pieces(caption, spans)
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(pieces)
    elif kind == 1 and pieces:  # a part of it
        kept = set(rng.sample(range(len(pieces)), rng.randint(1, len(pieces))))
        pieces = [piece for place, piece in enumerate(pieces) if place in kept or piece[1]]
    elif kind == 2:  # tags
        pieces = [(f"{word.rstrip(',.')},", own) if rng.random() < 0.5 and not own else (word, own) for word, own in pieces]
    if others and (kind > 2 or rng.random() < 0.4):
        for _ in range(rng.choice((1, 2, 3, 5))):
            pieces.insert(rng.randint(0, len(pieces)), (rng.choice(others), False))
    return _joined(pieces)


def _pieces(caption: str, spans: Spans) -> list[tuple[str, bool]]:
    """Words, each with whether it is a span; what is written together with a span ("bicycle's") becomes a word of its own."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [(word, False) for word in caption[end:start].split()]
        pieces.append((caption[start:stop], True))
        end = stop
    return pieces + [(word, False) for word in caption[end:].split()]


def _joined(pieces: Sequence[tuple[str, bool]]) -> tuple[str, Spans]:
    caption = ""
    spans: list[tuple[int, int]] = []
    for word, own in pieces:
        caption += " " if caption else ""
        if own:
            spans.append((len(caption), len(caption) + len(word)))
        caption += word
    return caption, tuple(spans)
