"""The detector of the package nudenet (MIT): exposed and covered parts of people, by an ONNX model that its wheel ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase import provenance, quiet
from sd_erase.detection import Card, Detection, describe, find_file, groups_of, our_label, our_labels
from sd_erase.errors import UserError

# of NudeDetector, in the order of its classes; the package keeps them in a private name
LABELS = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED", "BUTTOCKS_COVERED",
)  # fmt: skip
AT_ONCE = 4  # images, as the package's own default


class NudeNet:
    """The package's ``NudeDetector``; scores of 0.2 and boxes that overlap by 0.45 are its own limits.

    Its pixels are handed over as RGB. Of a file it reads BGR and turns the channels round twice, so that its model, which ultralytics trained
    on RGB, sees red for blue: on 60 ordinary photographs that finds 21 parts, two of them "buttocks exposed"; RGB finds 29 and none such.

    Args:
        card: its ``weights`` are a file of the package or a path; ``image_size`` is the model's input.
        device: onnxruntime computes where its installed build does.

    Raises:
        UserError: the package or its weights are missing or damaged.
    """

    def __init__(self, card: Card, device: Any = "cpu"):
        del device
        quiet.libraries()
        try:
            import nudenet  # type: ignore[import-not-found, unused-ignore]  # an extra
        except ImportError as error:
            raise UserError(
                f"Detector {card.name} needs the package nudenet ({error}): install it with `pip install sd-erase[nudenet]`."
            ) from error
        own = Path(nudenet.__file__).with_name(card.weights)
        weights = own if own.is_file() else find_file(card, card.weights)
        if weights is None:
            raise UserError(f"Detector {card.name}: weights {card.weights} do not exist: install nudenet again, or name a file.")
        try:
            self._detector = nudenet.NudeDetector(str(weights), inference_resolution=card.image_size)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UserError(f"Detector {card.name}: {weights} is no ONNX model ({type(error).__name__}): restore it.") from error
        self._settings = card
        self.labels = our_labels(LABELS, card)
        self.groups = groups_of(card, self.labels)
        self.card = {**describe(card, weights), "package": f"nudenet {provenance.version_of('nudenet')}"}

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The parts of people in each PIL image, the surest first."""
        import numpy

        pixels = [numpy.asarray(image.convert("RGB")).copy() for image in images]
        raw = self._detector.detect_batch(pixels, AT_ONCE)
        return [
            [self._detection(one, image) for one in sorted(found, key=lambda one: -one["score"]) if self._is_sure(one)]
            for found, image in zip(raw, images, strict=True)
        ]

    def _is_sure(self, found: dict[str, Any]) -> bool:
        return bool(found["score"] >= self._settings.confidence)

    def _detection(self, found: dict[str, Any], image: Any) -> Detection:
        left, top, width, height = map(float, found["box"])
        name = Path(getattr(image, "filename", "") or "").name
        box = (left, top, left + width, top + height)
        return Detection(name, our_label(found["class"], self._settings), float(found["score"]), box)
