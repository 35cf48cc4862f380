"""The words with which forget captions name a concept, and those that may stand around them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_erase.concepts.matching import Matcher
from sd_erase.erasure import pseudo_words
from sd_erase.erasure.names import made_up

if TYPE_CHECKING:
    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.erasure.names import Names

ODD_SHARE = 0.2  # of the words: misspellings, and words of two tokens, that the base reads as the concept
UNKNOWN_SHARE = 0.1  # of the words: the card's that the base does not read as the concept; else they are most of a long card
MADE_UP_SHARE = 0.25  # of the words that stand around: prompts hold words that no encoder knows, and must keep their images


@dataclass(frozen=True)
class Words:
    """A concept's words by how the base reads them.

    Attributes:
        known: the card's that it reads as the concept, and those that it told.
        unknown: the card's others that mean something to it.
        odd: misspellings and made-up words that it reads as the concept.
        held_out: as many more of these, which training never sees: by them an erasure is judged.
    """

    known: Sequence[str]
    unknown: Sequence[str]
    odd: Sequence[str]
    held_out: Sequence[str]

    @classmethod
    def of(cls, names: Names, concept: Concept) -> Words:
        """The words of `names`; those that are held out are every other one, so that both halves lie equally far."""
        odd = [names.of(source) for source in ("parts", "misspelling")]
        known = (*names.known, *names.of("vocabulary"))
        return cls(
            known or concept.phrases,
            names.unknown if known else (),
            [text for group in odd for text in group[::2]],
            [text for group in odd for text in group[1::2]],
        )

    def choose(self, rng: random.Random, held_out: bool = False) -> str:
        """One of them; with `held_out` from what training never sees where else an odd one would stand."""
        roll, odd = rng.random(), self.held_out if held_out else self.odd
        if odd and roll < ODD_SHARE:
            return rng.choice(odd)
        if self.unknown and roll > 1 - UNKNOWN_SHARE:
            return rng.choice(self.unknown)
        return rng.choice(self.known)


def other_words(towers: Towers, concepts: Sequence[Concept], words: Iterable[Words]) -> list[str]:
    """The whole words of the vocabulary that name none of `concepts`, and made-up ones."""
    ids = pseudo_words.vocabulary(towers.tokenizer, pseudo_words.embedding(towers.text).weight)
    own = {text for group in words for text in (*group.known, *group.odd, *group.held_out)}
    matcher = Matcher(concepts)
    texts = [towers.tokenizer.decode([token]).strip() for token in ids]
    texts += made_up(round(len(texts) * MADE_UP_SHARE / (1 - MADE_UP_SHARE)), random.Random("others"))
    return [text for text in dict.fromkeys(texts) if text not in own and not any(True for _ in matcher.scan(text))]
