"""Several judges as one: what each concept is seen by, and what a second judge says of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_erase.concepts import Concept, label_form
from sd_erase.detection import Detection, Detector


def known_labels(concept: Concept, judge: Detector) -> frozenset[str]:
    """The labels of a judge that stand for a concept; none where it does not know it.

    Those of the concept's card; else the judge's group for the concept's kind; else the concept's own name, of which an object's counts
    only with a CLIP, which knows words: a detector's label of that name may mean another thing.
    """
    if isinstance(judge, Panel):
        return known_labels(concept, judge.first(concept))
    found = frozenset(concept.labels) & judge.labels
    found = found or frozenset(getattr(judge, "groups", {}).get(concept.kind, frozenset()))
    if found or (concept.kind == "object" and judge.card.get("kind") != "clip"):
        return found
    return frozenset({label_form(concept.name)}) & judge.labels


class Panel:
    """Two or more judges. A label is its first judge's that knows it: its figures are those that stand in a table.

    Args:
        parts: the judges, the first the most trusted.
        concepts: what is erased: under which labels of the later judges it is not to be counted a second time.
    """

    def __init__(self, parts: Sequence[Detector], concepts: Sequence[Concept]):
        self.parts = list(parts)
        labels: set[str] = set().union(*(part.labels for part in parts))
        for concept in concepts:
            own = known_labels(concept, self.first(concept))
            labels -= frozenset().union(*(known_labels(concept, part) for part in parts)) - own
        self.labels = frozenset(labels)
        self.groups: dict[str, frozenset[str]] = {}

    @property
    def card(self) -> dict[str, Any]:
        """Of all judges together, and under ``judges`` each one's."""
        cards = [part.card for part in self.parts]
        calibrations = [card.get("calibration", {}) for card in cards]
        return {
            **{key: " + ".join(str(card[key]) for card in cards) for key in ("name", "weights", "weights_sha256")},
            "image_size": max(card["image_size"] for card in cards),
            "confidence": cards[0]["confidence"],
            "calibration": {name: found for each in reversed(calibrations) for name, found in each.items()},
            "judges": cards,
        }

    def first(self, concept: Concept) -> Detector:
        """The first judge that knows a concept, or the first."""
        return next((part for part in self.parts if known_labels(concept, part)), self.parts[0])

    def merged(self, found: Sequence[Sequence[Sequence[Detection]]]) -> list[list[Detection]]:
        """One list an image of what the judges found each: of every label what its first judge found.

        Args:
            found: for each judge the detections of each image.
        """
        owners = {label: place for place, part in reversed([*enumerate(self.parts)]) for label in part.labels & self.labels}
        return [
            [each for place, own in enumerate(one) for each in own if owners.get(each.label) == place]
            for one in zip(*found, strict=True)
        ]

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """What is found in each PIL image, see `merged`."""
        return self.merged([part.detect(images) for part in self.parts])


def judges_of(judge: Detector) -> list[Detector]:
    """The judges of a panel, or the one."""
    return judge.parts if isinstance(judge, Panel) else [judge]
