"""What a program of a benchmark gives, and what two of them say of each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """One call of a program."""

    seconds: float  # of the whole command, or of what is compared of it
    peak_mb: float = 0.0
    work: float = 1.0  # what was done in that time: pairs, images, concepts

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s" + (f", {self.peak_mb:.0f} MB" if self.peak_mb else "")


@dataclass(frozen=True)
class Pair:
    """Both programs once, one behind the other."""

    ours: Result
    theirs: Result

    @property
    def ratio(self) -> float:
        """Our seconds for a piece of work over theirs."""
        return (self.ours.seconds / self.ours.work) / (self.theirs.seconds / self.theirs.work)


@dataclass(frozen=True)
class Program:
    """A name and what runs it."""

    name: str
    run: Callable[[], Result]


@dataclass(frozen=True)
class Benchmark:
    """Two programs of the same work.

    Attributes:
        title: what is compared.
        bar: what the median ratio may be at most.
        prepare: makes what both need and returns ours and the other.
    """

    title: str
    bar: float
    prepare: Callable[[Any], tuple[Program, Program]]


def table(benchmark: Benchmark, pairs: Sequence[Pair]) -> str:
    """The medians as Markdown."""
    ratios = [pair.ratio for pair in pairs]
    median = statistics.median(ratios)
    cells = {
        "what": benchmark.title,
        "ours (s)": f"{statistics.median(pair.ours.seconds for pair in pairs):.1f}",
        "other (s)": f"{statistics.median(pair.theirs.seconds for pair in pairs):.1f}",
        "ratio": f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "bar": f"{benchmark.bar:g}: {'kept' if median <= benchmark.bar else 'missed'}",
        "ours (MB)": f"{max(pair.ours.peak_mb for pair in pairs):.0f}",
        "pairs": str(len(pairs)),
    }
    return "\n".join(("| " + " | ".join(cells) + " |", "|" + " --- |" * len(cells), "| " + " | ".join(cells.values()) + " |"))
