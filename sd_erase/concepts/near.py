"""Names that look like a slip of the pen: near a card's, but no word that CLIP knows."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

from sd_erase.bases import POCKET_FOLDER
from sd_erase.concepts.cards import all_cards, normal_name
from sd_erase.concepts.matching import Concept
from sd_erase.concepts.text import TOKEN, folded

LEAST = 4  # letters of a name that is looked at: of three letters, all are near one another
LONG = 7  # letters from which on two slips are one name's


def meant(name: str, kind: str, own: Iterable[Concept] = ()) -> str | None:
    """The card's word that was probably meant by `name`, or None.

    None where `name` is a word of a card itself, where all its words are in CLIP's vocabulary (a "mouse" is no misspelt house), or
    where no card's word is near. People seldom miss a word's first letter, and what only goes on behind a word is another one
    ("toiletry").

    Args:
        name: as the user wrote it.
        kind: what the user says that it is; other than "object", cards of other kinds are no candidates.
        own: cards of the user's.
    """
    written = folded(normal_name(name))
    if len(written) < LEAST or all(word in vocabulary() for word in TOKEN.findall(written)):
        return None
    cards = [*own, *(card for card in all_cards().values() if kind in ("object", card.kind))]
    words = dict.fromkeys(word for card in cards for word in (card.name, *card.words) if abs(len(word) - len(written)) <= 2)
    if any(written.startswith(folded(word)) and len(written) > len(word) + 1 for word in words):
        return None
    near = [(slips(written, spelt), word) for word in words if _begins_alike(written, spelt := folded(word))]
    count, word = min(near, default=(LONG, ""))
    return word if 0 < count <= (2 if len(written) >= LONG else 1) else None


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
