"""Classic YOLOv5 (with an objectness score) as ONNX, through onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_erase import quiet
from sd_erase.detection import BATCH_SIZE, Card, Detection, describe, find_file, groups_of, letterbox, our_labels, select
from sd_erase.errors import UserError


class OnnxDetector:
    """Input [N, 3, S, S] RGB in 0..1, letterboxed; output [N, A, 5 + C]: centre x, y, width, height, objectness, classes.

    Args:
        card: what to load and how to select; its ``names`` are the C classes.
        device: "cuda" uses onnxruntime's CUDA provider where it is installed; all else computes on the CPU.

    Raises:
        UserError: onnxruntime or the weights are missing, or the model is damaged or of another shape.
    """

    def __init__(self, card: Card, device: Any = "cpu"):
        quiet.libraries()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"Detector {card.name} needs onnxruntime: install it with `pip install sd-erase[onnx]`.") from error
        weights = find_file(card, card.weights)
        if weights is None:
            raise UserError(
                f"Detector {card.name}: weights {card.weights} do not exist: put the file beside the card or into the working "
                "folder, or copy the card and name your file in it."
            )
        wanted = (["CUDAExecutionProvider"] if str(device).startswith("cuda") else []) + ["CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(str(weights), providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UserError(f"Detector {card.name}: {weights} is no ONNX model ({type(error).__name__}): restore it.") from error
        model_input, model_output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._input = model_input.name
        batch, _, height, _ = model_input.shape
        if isinstance(height, int) and height != card.image_size:
            raise UserError(
                f"Detector {card.name}: {weights.name} is exported for {height} pixels, not {card.image_size}: pass that size."
            )
        if model_output.shape[-1] != 5 + len(card.names):
            raise UserError(
                f"Detector {card.name}: {weights.name} gives {model_output.shape[-1]} numbers a box, the card's "
                f"{len(card.names)} names need {5 + len(card.names)}: correct 'names', or use another model."
            )
        self._batch = batch if isinstance(batch, int) else BATCH_SIZE
        self._settings = card
        self.labels = our_labels(card.names, card)
        self.groups = groups_of(card, self.labels)
        self.card = describe(card, weights)

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The objects of each PIL image, the surest first."""
        import torch

        found: list[list[Detection]] = []
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            batch, places = letterbox(part, self._settings.image_size)
            if len(part) < self._batch and self._session.get_inputs()[0].shape[0] == self._batch:
                batch = torch.cat([batch, batch.new_zeros(self._batch - len(part), *batch.shape[1:])])  # the export's fixed batch
            raw = torch.from_numpy(self._session.run(None, {self._input: batch.numpy()})[0])
            for prediction, place, image in zip(raw[: len(part)], places, part, strict=True):
                scores = prediction[:, 4:5] * prediction[:, 5:]
                found.append(select(prediction[:, :4], scores, place, image, self._settings.names, self._settings))
        return found
