"""Singular and plural of phrases: from the file that ships for the cards, else from inflect, which takes seconds to import."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

NUMBERS_FILE = Path(__file__).parents[1] / "cards" / "inflections.json"
_SINGULAR_ENDS = ("us", "is", "ss", "gas", "lens", "canvas", "atlas", "bias", "christmas", "cosmos", "rhinoceros")
_PLURALS = (  # of the words that end so
    "menus gnus emus gurus tutus bayous caribous haikus tofus skis waterskis jetskis taxis bikinis kiwis zucchinis tsunamis saris "
    "safaris martinis khakis rabbis yetis salamis paninis tiramisus"
)


@functools.cache
def known_numbers() -> dict[str, list[str]]:
    """Phrase -> [singular, plural] for the cards that ship: importing inflect alone takes seconds."""
    import json

    return json.loads(NUMBERS_FILE.read_text(encoding="utf-8")) if NUMBERS_FILE.is_file() else {}


@functools.cache
def _inflector() -> Any:
    import inflect

    return inflect.engine()


@functools.cache
def numbers(phrase: str) -> tuple[str, str]:
    """Singular and plural of `phrase`."""
    if phrase in known_numbers():
        single, plural = known_numbers()[phrase]
        return single, plural
    return inflected(phrase)


def is_plural(phrase: str) -> bool:
    """Whether `phrase` is a plural: as the cards' inflections say, else by its last letter (importing inflect takes seconds)."""
    single, plural = known_numbers().get(phrase, (phrase, ""))
    if plural:
        return phrase == plural != single
    return phrase.endswith("s") and not phrase.endswith(_SINGULAR_ENDS)


def inflected(phrase: str) -> tuple[str, str]:
    inflector = _inflector()
    last = phrase.split()[-1]
    singular = last.endswith(_SINGULAR_ENDS) and last not in _PLURALS.split()  # inflect takes "bus" for two "bu"
    single = None if singular else inflector.singular_noun(phrase)
    if single and inflector.plural_noun(single) == phrase:
        return str(single), phrase
    return phrase, str(inflector.plural_noun(phrase)).lower()  # inflect has "747S" of "747"


def inflections(phrase: str) -> tuple[str, ...]:
    """`phrase` with its singular and plural, lower case, `phrase` first."""
    phrase = " ".join(phrase.lower().split())
    return tuple(dict.fromkeys((phrase, *numbers(phrase))))
