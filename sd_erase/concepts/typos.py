"""Slips of the pen, made on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence

TRIES = 16  # of a word


def _swapped(word: str, place: int) -> str:
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _dropped(word: str, place: int) -> str:
    return word[:place] + word[place + 1 :]


def _doubled(word: str, place: int) -> str:
    return word[: place + 1] + word[place:]


def misspell(word: str, rng: random.Random) -> str:
    """One typing error in a word of three letters or more; the first letter stays, which people seldom miss.

    A word of three letters only has one of them twice ("dogg"): with one fewer, or two swapped, it is another word.
    """
    if len(word) < 3:
        return word
    kind = _doubled if len(word) == 3 else rng.choice((_swapped, _dropped, _doubled))
    return kind(word, rng.randrange(1, len(word) if kind is _doubled else len(word) - 1))


def misspellings(phrases: Sequence[str], rng: random.Random) -> list[str]:
    """`phrases` with one typing error each in their last word, in several ways; none that is one of them."""
    wrong: dict[str, None] = {}
    for phrase in phrases:
        *rest, word = phrase.split()
        for _ in range(TRIES):
            wrong[" ".join([*rest, misspell(word, rng)])] = None
    return [text for text in wrong if text not in phrases]


def every_error(phrase: str) -> list[str]:
    """Every single swap, omission and doubling inside the last word of a phrase, and a doubled last letter."""
    head, space, last = phrase.rpartition(" ")
    wrong = [
        *(_swapped(last, place) for place in range(1, len(last) - 1)),
        *(_dropped(last, place) for place in range(1, len(last)) if len(last) > 3),
        *(_doubled(last, place) for place in range(len(last))),
    ]
    return [head + space + form for form in dict.fromkeys(wrong) if form != last]
