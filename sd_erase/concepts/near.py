"""Names to ask about before anything is erased: slips of the pen, and words that stand on a card under another name."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable

from sd_erase.bases import POCKET_FOLDER
from sd_erase.concepts.cards import all_cards, normal_name
from sd_erase.concepts.matching import Concept
from sd_erase.concepts.text import TOKEN, folded

LEAST = 4  # letters of a name that is looked at: of three letters, all are near one another
LONG = 7  # letters from which on two slips are one name's
_ARTICLE = re.compile(r"(?:an?|the) ")


def meant(name: str, kind: str, own: Iterable[Concept] = ()) -> str | None:
    """The card's word that was probably meant by `name`, or None.

    None where `name` is a word of a card itself, where all its words are in CLIP's vocabulary (a "mouse" is no misspelt house), or
    where no card's word is near. People seldom miss a word's first letter, and what only goes on behind a word is another one
    ("toiletry"). A card's word with an article before it was meant without.

    Args:
        name: as the user wrote it.
        kind: what the user says that it is; other than "object", cards of other kinds are no candidates.
        own: cards of the user's.
    """
    written = folded(normal_name(name))
    cards = _candidates(kind, own)
    bare = _bare(written)
    if bare != written and not _has_card(written, cards) and _has_card(bare, cards):
        return bare
    if len(written) < LEAST or all(word in vocabulary() for word in TOKEN.findall(written)):
        return None
    words = [(spelt, word) for card in cards for spelt, word in _spellings(card) if abs(len(spelt) - len(written)) <= 2]
    if any(written.startswith(spelt) and len(written) > len(spelt) + 1 for spelt, _ in words):
        return None
    near = [(slips(written, spelt), word) for spelt, word in words if _begins_alike(written, spelt)]
    count, word = min(near, default=(LONG, ""))
    return word if 0 < count <= (2 if len(written) >= LONG else 1) else None


def cards_listing(name: str, kind: str, own: Iterable[Concept] = ()) -> list[Concept]:
    """The cards on which `name` stands as a synonym or as a detector's label, where none is called so.

    Erasing the word alone then erases less than the card does, and no detector's label belongs to it. Whether that was meant cannot be
    known: "sofa" is a couch, and a "panda" is but one bear.

    Args:
        name, kind, own: see `meant`.
    """
    cards, bare = _candidates(kind, own), _bare(folded(normal_name(name)))
    if _has_card(bare, cards):
        return []
    # a word that its own card spares is another thing
    return [card for card in cards if _joined(bare) in _further_names(card) and (card.find(bare) or bare in card.labels)]


def _candidates(kind: str, own: Iterable[Concept]) -> list[Concept]:
    """The user's own cards, and those that ship for this kind of thing."""
    return [*own, *(card for card in all_cards().values() if kind in ("object", card.kind))]


def _has_card(name: str, cards: Iterable[Concept]) -> bool:
    joined = _joined(name)
    return any(joined in _own_names(card) and card.find(name) for card in cards)


@functools.lru_cache(maxsize=8192)
def _own_names(card: Concept) -> frozenset[str]:
    return frozenset(_joined(folded(word)) for word in (card.name, *card.words))


@functools.lru_cache(maxsize=8192)
def _further_names(card: Concept) -> frozenset[str]:
    return frozenset(_joined(folded(word)) for word in (*card.synonyms, *card.labels))


def _bare(name: str) -> str:
    """`name` without its article."""
    return _ARTICLE.sub("", name, count=1) if _ARTICLE.match(name) else name


def _joined(phrase: str) -> str:
    return phrase.replace(" ", "")


@functools.lru_cache(maxsize=8192)
def _spellings(card: Concept) -> tuple[tuple[str, str], ...]:
    """The words of a card near which a name is a slip, as they are compared and as they are written.

    Of its synonyms those of several words, which are near nothing else.
    """
    words = (card.name, *card.words, *(synonym for synonym in card.synonyms if " " in synonym))
    return tuple((folded(word), word) for word in dict.fromkeys(words))


def _begins_alike(one: str, other: str) -> bool:
    return one[:1] == other[:1] or one[:2] == other[1::-1]


@functools.cache
def vocabulary() -> frozenset[str]:
    """Words that exist: those that are one token to CLIP, which people write often, and those of the cards."""
    tokens = json.loads((POCKET_FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    frequent = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
    listed = (phrase for card in all_cards().values() for phrase in (*card.phrases, *card.neighbours, *card.spared))
    return frozenset(frequent.union(*(TOKEN.findall(phrase) for phrase in listed)))


def slips(one: str, other: str) -> int:
    """How many letters have to be put in, left out, exchanged or swapped with their neighbour to make `other` of `one`.

    The optimal string alignment distance, which counts a swap as one.
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if last and j > 1 and letter == other[j - 2] and wanted == one[i - 2]:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
