"""UnlearnCanvas' measures of an erasure: UA, IRA and CRA (Zhang et al., NeurIPS 2024, arXiv:2402.11846, section 3).

* UA, unlearning accuracy: of the images that ask for the concept, the share in which it is not found.
* IRA, in-domain retain accuracy: of the images that ask for another concept of its domain (another style where a style was erased), the
  share in which that one is found; the mean over these concepts.
* CRA, cross-domain retain accuracy: the same of the concepts of other domains (the objects, where a style was erased), over all images that
  ask for one, those with the erased concept too, as the paper's code counts.

There an image asks for one style and one object and two classifiers answer; here it asks for what its prompt names, the judge answers, and a
domain is a concept's kind. Images with the erased concept are left out of IRA: beside it another object may be gone for its sake, which the
rates of companions tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sd_erase.metrics.rates import ImagePair, is_found, share

NAMES = {
    "UA": "unlearning accuracy: asked for and not found",
    "IRA": "in-domain retain accuracy: others of its kind, asked for and found",
    "CRA": "cross-domain retain accuracy: things of other kinds, asked for and found",
}


def measures(
    pairs: Sequence[ImagePair], targets: Mapping[str, frozenset[str]], kinds: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The measures of each erased concept.

    Args:
        pairs: all images.
        targets: erased concept -> the judge's labels for it.
        kinds: the kind of each erased concept and of each name in the pairs' ``objects``.

    Returns:
        Concept -> "UA", "IRA", "CRA" -> "original" and "erased" (None without an erased model): a `metrics.rates.share` whose ``rate`` is,
        of IRA and CRA, the mean over concepts, and None where no prompt asks for any.
    """
    sides = ("original", "erased") if pairs and pairs[0].erased is not None else ("original",)
    return {
        name: {
            measure: {
                side: values(pairs, side, name, labels, kinds) if side in sides else None for side in ("original", "erased")
            }
            for measure, values in (("UA", _unlearned), ("IRA", _in_domain), ("CRA", _cross_domain))
        }
        for name, labels in targets.items()
    }


def _unlearned(
    pairs: Sequence[ImagePair], side: str, name: str, labels: frozenset[str], kinds: Mapping[str, str]
) -> dict[str, Any]:
    del kinds
    return share([not is_found(getattr(pair, side), labels) for pair in pairs if name in pair.targets])


def _in_domain(
    pairs: Sequence[ImagePair], side: str, name: str, labels: frozenset[str], kinds: Mapping[str, str]
) -> dict[str, Any]:
    del labels
    return _mean([pair for pair in pairs if not pair.targets], side, {one for one, kind in kinds.items() if kind == kinds[name]})


def _cross_domain(
    pairs: Sequence[ImagePair], side: str, name: str, labels: frozenset[str], kinds: Mapping[str, str]
) -> dict[str, Any]:
    del labels
    return _mean(pairs, side, {one for one, kind in kinds.items() if kind != kinds[name]})


def _mean(pairs: Sequence[ImagePair], side: str, names: set[str]) -> dict[str, Any]:
    """A `share` over all images and names, with the mean over the names as its rate."""
    found: dict[str, list[bool]] = {}
    for pair in pairs:
        for one, labels in pair.objects.items():
            if one in names:
                found.setdefault(one, []).append(is_found(getattr(pair, side), labels))
    rates = [sum(each) / len(each) for each in found.values()]
    whole = share([hit for each in found.values() for hit in each])
    return {**whole, "rate": sum(rates) / len(rates) if rates else None, "concepts": len(found)}
