"""Detection rates with their uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHERE_NAMED = " (where the prompt names it)"  # of a row's name: over the images whose prompt names the concept


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927).

    Args:
        successes: between 0 and n.
        n: trials; none gives the whole range.
        z: normal quantile; the default is 95 %.

    Returns:
        The low and high end, each in 0..1.

    Raises:
        ValueError: successes outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials: pass 0 to {n}.")
    if n == 0:
        return 0.0, 1.0
    share, square = successes / n, z * z
    centre = share + square / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # at the ends the exact bound is 0 or 1, which rounding misses
    low = 0.0 if successes == 0 else (centre - spread) / (1 + square / n)
    high = 1.0 if successes == n else (centre + spread) / (1 + square / n)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two paired shares are equal (McNemar's test; binomial over the discordant pairs).

    Args:
        only_first: pairs where only the first succeeded.
        only_second: pairs where only the second did.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    # integers until the last step: 2.0 ** n would overflow for large n
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def fisher(successes: int, n: int, other_successes: int, other_n: int) -> float:
    """One-sided p-value that a share is no higher than another one, of two independent samples (Fisher's exact test, 1935).

    Args:
        successes, n: of the share that may be higher.
        other_successes, other_n: of the one that it is compared with.
    """
    hits = successes + other_successes
    ways = sum(math.comb(n, k) * math.comb(other_n, hits - k) for k in range(successes, min(n, hits) + 1))
    return ways / math.comb(n + other_n, hits)


@dataclass(frozen=True)
class ImagePair:
    """What was asked for and found in one image of the original and, where there is one, of the erased model.

    Attributes:
        prompt_index: which prompt.
        targets: the concepts to erase that the prompt names.
        objects: the other objects that it names: name -> the detector's labels for it.
        original: label -> how often it was found.
        erased: the same for the erased model, or None.
    """

    prompt_index: int
    targets: frozenset[str]
    objects: Mapping[str, frozenset[str]]
    original: Counter[str]
    erased: Counter[str] | None


def is_found(counts: Mapping[str, int], labels: frozenset[str]) -> bool:
    """Whether any of `labels` was found."""
    return any(counts.get(label, 0) for label in labels)


def share(found: Sequence[bool]) -> dict[str, Any]:
    """Count, number, rate and 95 % interval."""
    count, n = sum(found), len(found)
    low, high = wilson(count, n)
    return {"count": count, "n": n, "rate": count / n if n else None, "low": low, "high": high}


def row(name: str, role: str, original: Sequence[bool], erased: Sequence[bool] | None) -> dict[str, Any]:
    """One line of the table: original against erased over the same images.

    Args:
        name: what is looked for.
        role: "target", "target_named", "others" or "object".
        original: whether it was found, one an image (or an image and object).
        erased: the same of the erased model, or None.

    Returns:
        ``original`` and ``erased`` (each a `share`), ``change`` (of the rate), ``kept`` (erased / original, None where
        the original never shows it) and ``p_value`` (McNemar, exact; None without an erased model).
    """
    result: dict[str, Any] = {"name": name, "role": role, "images": len(original), "original": share(original)}
    result |= {"erased": None, "change": None, "kept": None, "p_value": None}
    if erased is not None:
        pairs = Counter(zip(original, erased, strict=True))
        after, before = share(erased), result["original"]
        result["erased"] = after
        result["p_value"] = mcnemar(pairs[True, False], pairs[False, True])
        if original:
            result["change"] = after["rate"] - before["rate"]
            result["kept"] = after["rate"] / before["rate"] if before["count"] else None
    return result


def detection_rates(pairs: Sequence[ImagePair], targets: Mapping[str, frozenset[str]]) -> list[dict[str, Any]]:
    """The table: each target over all images, the other named objects together, and each of them.

    Where a prompt does not name a target, a second line gives that target over the images whose prompt does.

    Args:
        pairs: all images.
        targets: erased concept -> the detector's labels for it.

    Returns:
        Lines as `row` gives them, targets first. The line of all others counts each named object of each image once.
    """
    has_erased = bool(pairs) and pairs[0].erased is not None

    def looked_for(name: str, role: str, where: Sequence[tuple[ImagePair, frozenset[str]]]) -> dict[str, Any]:
        original = [is_found(pair.original, labels) for pair, labels in where]
        erased = [is_found(pair.erased or {}, labels) for pair, labels in where] if has_erased else None
        return row(name, role, original, erased)

    rows = []
    for name, labels in targets.items():
        rows.append(looked_for(name, "target", [(pair, labels) for pair in pairs]))
        naming = [(pair, labels) for pair in pairs if name in pair.targets]
        if 0 < len(naming) < len(pairs):
            rows.append(looked_for(f"{name}{WHERE_NAMED}", "target_named", naming))
    asked = [(pair, name, labels) for pair in pairs for name, labels in pair.objects.items()]
    if asked:
        rows.append(looked_for("others (mean over named objects)", "others", [(pair, labels) for pair, _, labels in asked]))
    for name in sorted({name for _, name, _ in asked}):
        rows.append(looked_for(name, "object", [(pair, labels) for pair, other, labels in asked if other == name]))
    return rows


def surplus(
    pairs: Sequence[ImagePair], side: str, targets: Mapping[str, frozenset[str]], *, sees_others: bool = True
) -> dict[str, Any]:
    """What is in the images beyond "each named object once": doubles, and objects that nobody named.

    Args:
        pairs: all images.
        side: "original" or "erased".
        targets: erased concept -> labels; their detections are neither doubles nor unnamed.
        sees_others: whether the judge has any label beside the targets'; without one nothing unnamed could be found, so nothing is counted.

    Returns:
        ``named_others_mean_count`` (boxes of named other objects, an image), ``named_others_asked`` (how many of them
        the prompts ask for, an image), ``doubled`` (share of named objects found more than once), ``unnamed`` (share of
        images with an object that the prompt does not name) and ``unnamed_labels`` (label -> images).
    """
    boxes = [count for pair in pairs for count in _boxes(pair, side)]
    strangers = [_strangers(pair, side, targets) for pair in pairs]
    n = len(pairs)
    return {
        "named_others_mean_count": sum(boxes) / n if n else 0.0,
        "named_others_asked": len(boxes) / n if n else 0.0,
        "doubled": share([count > 1 for count in boxes]),
        "unnamed": share([bool(labels) for labels in strangers] if sees_others else []),
        "unnamed_labels": dict(Counter(label for labels in strangers for label in sorted(labels)).most_common()),
    }


def surplus_p_values(pairs: Sequence[ImagePair], targets: Mapping[str, frozenset[str]]) -> dict[str, float]:
    """McNemar's exact p-values that as much is "doubled" and "unnamed" (see `surplus`) with the erased model as before.

    Args:
        pairs: all images, each with an erased side.
        targets: erased concept -> labels.
    """
    doubled = {side: [count > 1 for pair in pairs for count in _boxes(pair, side)] for side in ("original", "erased")}
    unnamed = {side: [bool(_strangers(pair, side, targets)) for pair in pairs] for side in ("original", "erased")}
    result = {}
    for kind, found in (("doubled", doubled), ("unnamed", unnamed)):
        counts = Counter(zip(found["original"], found["erased"], strict=True))
        result[kind] = mcnemar(counts[True, False], counts[False, True])
    return result


def _boxes(pair: ImagePair, side: str) -> list[int]:
    """How many boxes of each named object one side of a pair has."""
    counts: Counter[str] = getattr(pair, side)
    return [sum(counts[label] for label in labels) for labels in pair.objects.values()]


def _strangers(pair: ImagePair, side: str, targets: Mapping[str, frozenset[str]]) -> set[str]:
    """The labels on one side of a pair that the prompt does not name and that belong to no target."""
    counts: Counter[str] = getattr(pair, side)
    asked = frozenset().union(*pair.objects.values(), *targets.values())
    return {label for label, count in counts.items() if count} - asked
