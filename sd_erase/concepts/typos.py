"""Slips of the pen, made on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence

TRIES = 16  # of a word
_KINDS = ("swap", "drop", "double")


def misspell(word: str, rng: random.Random) -> str:
    """One typing error in a word of three letters or more; the first letter stays, which people seldom miss.

    A word of three letters only has one of them twice ("dogg"): with one fewer, or two swapped, it is another word.
    """
    if len(word) < 3:
        return word
    kind = "double" if len(word) == 3 else rng.choice(_KINDS)
    if kind == "double":
        place = rng.randrange(1, len(word))
        return word[: place + 1] + word[place:]
    place = rng.randrange(1, len(word) - 1)
    if kind == "swap":
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :]


def misspellings(phrases: Sequence[str], rng: random.Random) -> list[str]:
    """`phrases` with one typing error each in their last word, in several ways; none that is one of them."""
    wrong: dict[str, None] = {}
    for phrase in phrases:
        *rest, word = phrase.split()
        for _ in range(TRIES):
            wrong[" ".join([*rest, misspell(word, rng)])] = None
    return [text for text in wrong if text not in phrases]
