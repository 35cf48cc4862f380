"""A concept, and where captions use its words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sd_erase.concepts.spared import Spared, compile_spared
from sd_erase.concepts.text import LEFT, RIGHT, TOKEN, closed, fold, literal


@dataclass(frozen=True)
class Match:
    """One use of a concept's words in a caption: characters ``start`` to ``end``, and why it matched."""

    start: int
    end: int
    text: str
    reason: str


@dataclass(frozen=True)
class Concept:
    """What is to be erased, resolved: all inflections are written out."""

    name: str
    kind: str = "object"
    words: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    anchor: str | None = None
    neighbours: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    @property
    def phrases(self) -> tuple[str, ...]:
        """All words and phrases that match, lower case, the concept's own words first."""
        return tuple(dict.fromkeys((*self.words, *self.synonyms)))

    @functools.cached_property
    def triggers(self) -> frozenset[str]:
        """Words of which a matching caption holds at least one: a quick test before the expression is run."""
        return frozenset(
            word for phrase in self.phrases for word in (max(TOKEN.findall(phrase), key=len), closed(phrase)) if word
        )

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.phrases, key=lambda phrase: (-len(phrase), phrase))
        forms = (form for phrase in longest_first for form in (literal(phrase), closed(phrase)) if form)
        return re.compile(f"{LEFT}(?:{'|'.join(forms)}){RIGHT}")

    @functools.cached_property
    def spared_entries(self) -> tuple[Spared, ...]:
        return tuple(compile_spared(entry) for entry in self.spared)

    @functools.cached_property
    def _spared_by_word(self) -> dict[str, list[int]]:
        """Word -> the entries of `spared_entries` that need it, each under its piece that is rarest in the concept's captions."""
        index: dict[str, list[int]] = {}
        for position, entry in enumerate(self.spared_entries):
            rare = min(entry.needed, key=lambda words: (bool(words & self.triggers), len(words)), default=self.triggers)
            for word in rare:
                index.setdefault(word, []).append(position)
        return index

    def _possibly_spared(self, tokens: Iterable[str]) -> list[Spared]:
        hits = self._spared_by_word.keys() & tokens
        if not hits:
            return []
        return [
            self.spared_entries[position] for position in sorted({place for word in hits for place in self._spared_by_word[word]})
        ]

    @functools.cached_property
    def _own_words(self) -> frozenset[str]:
        return frozenset(self.words)

    def find(self, caption: str) -> list[Match]:
        """The uses of the concept in `caption`, left to right, without overlap and without spared senses."""
        return self.scan(caption)[0]

    def scan(self, caption: str, tokens: Iterable[str] | None = None) -> tuple[list[Match], list[Match]]:
        """The uses of the concept in `caption`, and the uses of its words in a spared sense.

        Args:
            tokens: the caption's words, lower case (`TOKEN`), where they are known already.
        """
        text = fold(caption)
        found = list(self._pattern.finditer(text))
        if not found:
            return [], []
        spans: list[tuple[int, int, Spared]] = []
        if self.spared:
            for entry in self._possibly_spared(TOKEN.findall(text) if tokens is None else tokens):
                in_context = entry.context is None or entry.context.search(text)
                if in_context and (entry.unless is None or not entry.unless.search(text)):
                    spans += [(*use.span(), entry) for use in entry.pattern.finditer(text)]
        matches, spared = [], []
        for use in found:
            start, end = use.span()
            cover = next(
                (
                    (left, right, entry)
                    for left, right, entry in spans
                    if left <= start and end <= right and not (entry.open and (left, right) == (start, end))
                ),
                None,
            )
            if cover is None:
                phrase = " ".join(TOKEN.findall(use.group()))
                sort = "word" if phrase in self._own_words or use.group() in self._own_words else "synonym"
                matches.append(Match(start, end, caption[start:end], f"{sort}: {use.group()}"))
            else:
                left, right, entry = cover
                beside = entry.context.search(text) if entry.context else None
                shown = f"{text[left:right]} + {beside.group()}" if beside else text[left:right]
                spared.append(Match(left, right, caption[left:right], f"spared sense: {shown}"))
        return matches, spared

    def to_dict(self) -> dict[str, Any]:
        """The concept as JSON has it; `from_dict` gives it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Concept:
        """A resolved concept from `to_dict`."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def names(concept: Concept, text: str) -> bool:
    """Whether `text` uses the concept's words, in its sense or in a spared one."""
    matches, spared = concept.scan(text)
    return bool(matches or spared)


class Matcher:
    """Several concepts in one pass: a caption's words are looked up first, and only concepts that may match are run."""

    def __init__(self, concepts: Iterable[Concept]):
        self.concepts = tuple(concepts)
        self._by_trigger: dict[str, list[int]] = {}
        for position, concept in enumerate(self.concepts):
            for trigger in concept.triggers:
                self._by_trigger.setdefault(trigger, []).append(position)

    def scan(self, caption: str, tokens: list[str]) -> Iterator[tuple[Concept, list[Match], list[Match]]]:
        """The concepts whose words `caption` uses, in their order, with their matches and spared uses.

        Args:
            tokens: ``TOKEN.findall(caption.lower())``.
        """
        if self._by_trigger.keys().isdisjoint(tokens):
            return
        possible = {position for token in tokens for position in self._by_trigger.get(token, ())}
        for position in sorted(possible):
            matches, spared = self.concepts[position].scan(caption, tokens)
            if matches or spared:
                yield self.concepts[position], matches, spared
