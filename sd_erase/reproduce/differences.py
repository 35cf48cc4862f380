"""Where what was measured differs from what the paper prints, computed from both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

APART = 5.0  # points: what is nearer is not listed one by one
LISTED = 12
CLASSES = "CIFAR-100"  # the paper's data of single objects; its others are captions


def differences(rows: Sequence[dict[str, Any]], paper: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each figure in percent that lies `APART` points or more from the paper's, the farthest first, and a count.

    A row of ours and one of the paper's belong together where every text that both have is the same.
    """
    apart, both = [], 0
    for row in rows:
        other = next((one for one in paper if _alike(row, one)), None)
        if other is None:
            continue
        for column in row:
            ours, theirs = row[column], other.get(column)
            if not column.endswith("%") or not isinstance(ours, (int, float)) or not isinstance(theirs, (int, float)):
                continue
            both += 1
            if abs(ours - theirs) >= APART:
                name = ", ".join(str(value) for value in row.values() if isinstance(value, str))
                apart.append((abs(ours - theirs), f"{name}, {column}: {ours:.1f} here, {theirs:.1f} in the paper."))
    apart.sort(key=lambda entry: -entry[0])
    if not both:
        return []
    more = f", of which the {LISTED} farthest are listed" if len(apart) > LISTED else ""
    count = f"{len(apart)} of {both} figures that both have lie {APART:g} points or more apart{more}."
    return [count, *(text for _, text in apart[:LISTED])]


def _alike(row: dict[str, Any], other: dict[str, Any]) -> bool:
    shared = [key for key in row if isinstance(row[key], str) and isinstance(other.get(key), str)]
    return bool(shared) and all(row[key] == (_data(other[key]) if key == "data" else other[key]) for key in shared)


def _data(name: str) -> str:
    return "classes" if name == CLASSES else "captions"
