"""A concept, and where captions use its words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sd_erase.concepts.spared import Spared, compile_spared
from sd_erase.concepts.text import TOKEN, Folded, bounded, closed, fold, folded, keys, label_form, literal


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
        """Words of which a matching caption holds at least one (none: cannot be told): a quick test before the expression is run."""
        found = [keys(form) for phrase in self.phrases for form in (phrase, closed(phrase)) if form]
        return frozenset().union(*found) if all(found) else frozenset()

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.phrases, key=lambda phrase: (-len(phrase), phrase))
        forms = [(phrase, form) for phrase in longest_first for form in (literal(phrase), closed(phrase)) if form]
        return re.compile(bounded(forms))

    @functools.cached_property
    def spared_entries(self) -> tuple[Spared, ...]:
        return tuple(compile_spared(entry) for entry in self.spared)

    @functools.cached_property
    def _spared_by_word(self) -> dict[str, list[int]]:
        """Word -> the entries of `spared_entries` that need it, each under its piece that is rarest in the concept's captions.

        Under "" stand those of which that cannot be told.
        """
        index: dict[str, list[int]] = {}
        for position, entry in enumerate(self.spared_entries):
            rare = min(entry.needed, key=lambda words: (bool(words & self.triggers), len(words)), default=self.triggers)
            for word in rare or ("",):
                index.setdefault(word, []).append(position)
        return index

    def _possibly_spared(self, pieces: frozenset[str]) -> list[Spared]:
        hits = self._spared_by_word.keys() & {"", *pieces}
        return [
            self.spared_entries[position] for position in sorted({place for word in hits for place in self._spared_by_word[word]})
        ]

    @functools.cached_property
    def _own_words(self) -> frozenset[str]:
        return frozenset(" ".join(TOKEN.findall(folded(word))) for word in self.words)

    def find(self, caption: str) -> list[Match]:
        """The uses of the concept in `caption`, left to right, without overlap and without spared senses."""
        return self.scan(caption)[0]

    def scan(self, caption: str) -> tuple[list[Match], list[Match]]:
        """The uses of the concept in `caption`, and the uses of its words in a spared sense."""
        readings = fold(caption)
        matches, spared = self._read(caption, readings[0])
        for reading in readings[1:]:
            known = [(match.start, match.end) for match in (*matches, *spared)]
            for found, more in zip((matches, spared), self._read(caption, reading), strict=True):
                found += [one for one in more if not any(one.start < end and start < one.end for start, end in known)]
                found.sort(key=lambda match: match.start)
        return matches, spared

    def _read(self, caption: str, folded: Folded) -> tuple[list[Match], list[Match]]:
        """`scan` of one reading of `caption`."""
        text = folded.text
        found = [use.span() for use in self._pattern.finditer(text) if not folded.cuts(*use.span())]
        spans = self._spared_spans(folded) if found and self.spared else []
        matches, spared = [], []
        for start, end in found:
            cover = next(
                (
                    (left, right, entry)
                    for left, right, entry in spans
                    if left <= start and end <= right and not (entry.open and (left, right) == (start, end))
                ),
                None,
            )
            if cover is None:
                sort = "word" if " ".join(TOKEN.findall(text[start:end])) in self._own_words else "synonym"
                matches.append(_match(caption, folded, start, end, f"{sort}: {text[start:end]}"))
            else:
                left, right, entry = cover
                beside = entry.context.search(text) if entry.context else None
                shown = f"{text[left:right]} + {beside.group()}" if beside else text[left:right]
                spared.append(_match(caption, folded, left, right, f"spared sense: {shown}"))
        return matches, spared

    def _spared_spans(self, folded: Folded) -> list[tuple[int, int, Spared]]:
        """Where the spared entries stand, in the folded text."""
        spans: list[tuple[int, int, Spared]] = []
        for entry in self._possibly_spared(folded.pieces):
            in_context = entry.context is None or entry.context.search(folded.text)
            if in_context and (entry.unless is None or not entry.unless.search(folded.text)):
                spans += [(*use.span(), entry) for use in entry.pattern.finditer(folded.text)]
        return spans

    def to_dict(self) -> dict[str, Any]:
        """The concept as JSON has it; `from_dict` gives it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Concept:
        """A resolved concept from `to_dict`."""
        found: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        # runs of earlier versions hold labels as their cards wrote them
        return cls(**{**found, "labels": tuple(dict.fromkeys(label_form(label) for label in found.get("labels", ())))})


def _match(caption: str, folded: Folded, start: int, end: int, reason: str) -> Match:
    left, right = folded.span(start, end)
    return Match(left, right, caption[left:right], reason.replace("_", " "))


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
            for trigger in concept.triggers or ("",):  # "" is in every caption
                self._by_trigger.setdefault(trigger, []).append(position)

    def scan(self, caption: str) -> Iterator[tuple[Concept, list[Match], list[Match]]]:
        """The concepts whose words `caption` uses, in their order, with their matches and spared uses."""
        hits = self._by_trigger.keys() & frozenset({""}).union(*(reading.pieces for reading in fold(caption)))
        for position in sorted({position for word in hits for position in self._by_trigger[word]}):
            matches, spared = self.concepts[position].scan(caption)
            if matches or spared:
                yield self.concepts[position], matches, spared
