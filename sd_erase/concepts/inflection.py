"""Singular and plural of phrases: from the file that ships for the cards, else from inflect, which takes seconds to import."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBERS_FILE = Path(__file__).parents[1] / "cards" / "inflections.json"
_SINGULAR_ENDS = ("us", "is", "ss", "gas", "lens", "canvas", "atlas", "bias", "christmas", "cosmos", "rhinoceros")
_PLURALS = (  # of the words that end so
    "menus gnus emus gurus tutus bayous caribous haikus tofus skis waterskis jetskis taxis bikinis kiwis zucchinis tsunamis saris "
    "safaris martinis khakis rabbis yetis salamis paninis tiramisus"
)
_AGENT = re.compile(r"(.*\w(?:er|or))(s?)([ -](?:by|on|up|in|off|out|away|down))")
_INFLECTS = re.compile(r"[a-z0-9\u00e0-\u017f](?<!'s)$")  # no possessive, no script of other rules, no bracket behind it
_OLD_PLURAL = re.compile(r"(?:us|ex|ix|oof|ief|eau|ium|nna|ula|person)$")
_OLDER = {  # that inflect does not have, or that are so frequent that no import shall stand before them
    "octopi": "octopus", "indices": "index", "vertices": "vertex", "larvae": "larva", "cacti": "cactus", "fungi": "fungus",
    "hippopotami": "hippopotamus", "thieves": "thief", "hooves": "hoof",
}  # fmt: skip
_OLD_ENDS = re.compile(r"(?:i|ices|ves|eaux|ae|ia|persons)$")
_PLURAL_ONLY = frozenset(  # words whose singular is another thing: a short man wears no shorts
    [
        "glasses",
        "eyeglasses",
        "sunglasses",
        "spectacles",
        "goggles",
        "shorts",
        "pants",
        "trousers",
        "jeans",
        "tights",
        "leggings",
        "briefs",
        "boxers",
        "overalls",
        "slacks",
        "sweats",
        "clothes",
        "goods",
        "woods",
        "blues",
        "greens",
        "stairs",
        "binoculars",
        "headphones",
        "scissors",
        "news",
        "thanks",
        "arms",
        "customs",
    ]
)


@functools.cache
def known_numbers() -> dict[str, list[str]]:
    """Phrase -> [singular, plural] for the cards that ship: importing inflect alone takes seconds."""
    import json

    return json.loads(NUMBERS_FILE.read_text(encoding="utf-8"))


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
    """Singular and plural of a phrase that no file has."""
    agent = _AGENT.fullmatch(phrase)
    if agent is not None:  # of "passer-by" inflect has "passer-bies"
        return f"{agent[1]}{agent[3]}", f"{agent[1]}s{agent[3]}"
    inflector = _inflector()
    last = phrase.split()[-1]
    singular = last.endswith(_SINGULAR_ENDS) and last not in _PLURALS.split()  # inflect takes "bus" for two "bu"
    single = None if singular else inflector.singular_noun(phrase)
    if single and inflector.plural_noun(single) == phrase:
        return str(single), phrase
    return phrase, str(inflector.plural_noun(phrase)).lower()  # inflect has "747S" of "747"


def inflections(phrase: str) -> tuple[str, ...]:
    """`phrase` with its singular and plurals, lower case, `phrase` first."""
    phrase = " ".join(phrase.lower().split())
    if phrase in _PLURAL_ONLY or phrase not in known_numbers() and not _INFLECTS.search(phrase):
        return (phrase,)
    if phrase in known_numbers():
        single, plural = numbers(phrase)
        return tuple(dict.fromkeys((phrase, single, plural, *(older for older, one in _OLDER.items() if one == single))))
    single, plural = numbers(phrase)
    # inflect knows no singular of "cacti" unless it is asked for the older forms, and "indice" for that of "indices"
    old = _OLDER.get(phrase, "") or (_old_single(phrase) if single == phrase else "")
    single, plural = (old, inflected(old)[1]) if old else (single, plural)
    return tuple(dict.fromkeys((phrase, single, plural, *_old_plural(single))))


def _old_single(phrase: str) -> str:
    """The singular of an older plural ("cacti"), or "" where `phrase` is none."""
    if not _OLD_ENDS.search(phrase):
        return ""
    with _older_forms() as inflector:
        single = inflector.singular_noun(phrase)
        return str(single) if single and inflector.plural_noun(single) == phrase else ""


def _old_plural(single: str) -> list[str]:
    """The older plural beside inflect's own, where there is one that people write."""
    known = [plural for plural, one in _OLDER.items() if one == single]
    if known or not _OLD_PLURAL.search(single):
        return known
    with _older_forms() as inflector:
        return [str(inflector.plural_noun(single))]


@contextlib.contextmanager
def _older_forms() -> Iterator[Any]:
    inflector = _inflector()
    inflector.classical(all=True)
    try:
        yield inflector
    finally:
        inflector.classical(all=False)
