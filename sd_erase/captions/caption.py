"""A caption, and the account of what a reader passed over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sd_erase.errors import UserError
from sd_erase.terminal import one_line

MAX_CAPTION = 10_000  # characters: a text encoder reads 77 tokens, and what is longer is a page or no text at all
_NOTES = 20
_ADDRESS = re.compile(r"(?:https?|ftp)://\S+", re.IGNORECASE)


@dataclass(frozen=True)
class Caption:
    """One sentence about one image; ``image`` is an absolute path, or None for text alone."""

    key: str
    image: str | None
    text: str
    split: str | None

    @property
    def image_key(self) -> str:
        """What all captions of one image share."""
        return self.key.rpartition("#")[0] or self.key


@dataclass
class Tally:
    """What of a data set is no caption, by kind, and what else a user should know of how it was read.

    Attributes:
        counts: kind ("null captions") -> how many were skipped.
        first: kind -> where the first one stood.
        quiet: kinds that the formats themselves allow to be left out, which no warning names.
        kept: kind -> how many are read although something is odd about them.
        notes: sentences.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    quiet: set[str] = field(default_factory=set)
    kept: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def skip(self, kind: str, where: str, *, quiet: bool = False) -> None:
        """Count one of `kind` at `where`."""
        self.counts[kind] += 1
        self.first.setdefault(kind, one_line(where[:80]))
        if quiet:
            self.quiet.add(kind)

    def keep(self, kind: str, where: str) -> None:
        """Count one of `kind` at `where`, which is read all the same."""
        self.kept[kind] += 1
        self.first.setdefault(kind, one_line(where[:80]))

    def note(self, sentence: str) -> None:
        """Keep `sentence`, once; a file of ever other faults fills no memory."""
        sentence = one_line(sentence)
        if sentence not in self.notes and len(self.notes) < _NOTES:
            self.notes.append(sentence)

    def sentences(self, dataset: str) -> list[str]:
        """The notes, one sentence of all that was skipped, and one of what was kept and is odd."""
        skipped = [kind for kind in self.counts if kind not in self.quiet]
        said = list(self.notes)
        for what, kinds, counts in (("were skipped", skipped, self.counts), ("were kept", list(self.kept), self.kept)):
            if kinds:
                rows = (self._place(kind, counts[kind]) for kind in kinds)
                said.append(f"Of {dataset} {what}: {', '.join(rows)}.")
        return said

    def _place(self, kind: str, count: int) -> str:
        return f"{kind} ({count:,}{', at ' if count == 1 else ', the first at '}{self.first[kind]})"

    def passed(self) -> str:
        """All that was skipped, in words."""
        return ", ".join(self._place(kind, count) for kind, count in self.counts.items())


def checked(captions: Iterator[Caption], path: Path, shape: str, tally: Tally) -> Iterator[Caption]:
    """The `captions` that are some: what is empty, endless or an address is counted and left out.

    Raises:
        UserError: there is none, which tells the expected `shape`, or one is no text: JSON's escapes (``\\ud800``) and file names
            can hold half a character, which no file can be written with.
    """
    empty = True
    for caption in captions:
        try:
            f"{caption.key}{caption.image}{caption.text}{caption.split}".encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path} holds text that is not Unicode (at {caption.key[:80]!r}): save it as UTF-8.") from error
        if not caption.text.strip():
            tally.skip("empty captions", caption.key)
        elif len(caption.text) > MAX_CAPTION:
            tally.skip(f"captions of more than {MAX_CAPTION:,} characters", caption.key)
        elif _ADDRESS.fullmatch(caption.text):
            tally.skip("captions that are an address", caption.key)
        else:
            empty = False
            yield caption
    if empty:
        passed = f", only {tally.passed()}" if tally.counts else ""
        raise UserError(f"{path} holds no caption{passed}: expected {shape}.")


class Keys:
    """Tells keys that were given before, in some 60 bytes for each: two captions must not answer to one key."""

    def __init__(self, tally: Tally):
        self._tally = tally
        self._seen: set[int] = set()
        self._numbers: Counter[str] = Counter()

    def own(self, key: str) -> str:
        """`key`, or where another caption has it, one of its own."""
        mine = key
        while hash(mine) in self._seen:
            self._numbers[key] += 1
            mine = f"{key}.{self._numbers[key]}"
        if mine != key:
            self._tally.keep("captions under a key that another one has", key)
        self._seen.add(hash(mine))
        return mine
