"""A threshold on a judge's score from images of which it is known what was asked for, and how far it can be trusted.

Pure functions over two lists of scores: of the original's images of the concept, and of its images of what stands in the concept's place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from sd_erase.metrics.rates import share

FOLDS = 5
BLIND = 0.25  # mean of misses and false alarms from which on a judge cannot tell a concept from its anchor; guessing has 0.5


def threshold(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The threshold with the fewest errors: the mean of the share of misses and of the share of false alarms is least.

    This is Youden's index (Cancer 3:32, 1950). Of several such gaps between neighbouring scores the widest is taken, and its middle.

    Raises:
        ValueError: one of the lists is empty.
    """
    if not positive or not negative:
        raise ValueError("A threshold needs scores of both sides: pass at least one of each.")
    values = sorted({*positive, *negative})
    gaps = list(itertools.pairwise(values)) or [(values[0], values[0])]
    return min(
        ((low + high) / 2 for low, high in gaps), key=lambda middle: (_error(middle, positive, negative), -_gap(middle, gaps))
    )


def _gap(middle: float, gaps: Sequence[tuple[float, float]]) -> float:
    return max((high - low for low, high in gaps if low <= middle <= high), default=0.0)


def _error(value: float, positive: Sequence[float], negative: Sequence[float]) -> float:
    missed = sum(score <= value for score in positive) / len(positive)
    alarms = sum(score > value for score in negative) / len(negative)
    return (missed + alarms) / 2


def calibrated(positive: Sequence[float], negative: Sequence[float]) -> dict[str, Any]:
    """The threshold, and its error on images that it was not chosen by (cross-validation in `FOLDS` parts).

    Args:
        positive: scores of images that show the concept, prompt by prompt in the same order as
        negative: those of the images of its anchor.

    Returns:
        ``threshold`` (of all images), ``missed`` and ``false_alarms`` (each a `metrics.rates.share`), ``error`` (their mean; 0.5 is
        guessing) and ``blind`` (whether it is `BLIND` or more).
    """
    folds = min(FOLDS, len(positive), len(negative))
    missed, alarms = [False] * len(positive), [False] * len(negative)
    for fold in range(folds) if folds > 1 else ():
        kept = [[score for place, score in enumerate(side) if place % folds != fold] for side in (positive, negative)]
        value = threshold(*kept)
        for place in range(fold, len(positive), folds):
            missed[place] = positive[place] <= value
        for place in range(fold, len(negative), folds):
            alarms[place] = negative[place] > value
    found = {"missed": share(missed), "false_alarms": share(alarms)}
    error = sum(each["rate"] for each in found.values()) / 2 if folds > 1 else 0.5  # of one image nothing is known
    return {"threshold": threshold(positive, negative), **found, "error": error, "blind": error >= BLIND}


def sentence(name: str, anchor: str, judge: str, found: dict[str, Any]) -> str:
    """What a calibration says of a judge, for people."""
    missed, alarms = found["missed"], found["false_alarms"]

    def told(one: dict[str, Any]) -> str:
        return f"{100 * one['rate']:.0f} % [{100 * one['low']:.0f}–{100 * one['high']:.0f}]"

    beside = f'"{anchor}"' if anchor else "prompts without it"
    text = (
        f"Judge {judge} was calibrated on images that the original drew: it misses {name} in {told(missed)} of {missed['n']} that asked for "
        f"it and sees it in {told(alarms)} of {alarms['n']} of {beside} instead"
    )
    if found["blind"]:
        return f"{text}: it cannot tell the two apart, so its figures for {name} mean nothing (pass another --judge)."
    return f"{text}, so a rate as low as the latter is none."
