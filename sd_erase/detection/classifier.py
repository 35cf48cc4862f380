"""An image classifier as a judge: of transformers (a folder) or of ultralytics (an architecture with a safetensors state dict)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sd_erase import hub, modelfiles
from sd_erase.detection import BATCH_SIZE, Card, Detection, describe, groups_of, our_label, our_labels, whole
from sd_erase.errors import UserError
from sd_erase.weights import check_finite

ADVICE = "pass a folder with config.json and model.safetensors"
YOLO_SIZE = 224  # pixels that ultralytics' classifiers are trained with


class Classifier:
    """Sees in an image its likeliest class; of a model of several labels an image, each that is likely enough.

    Args:
        card: ``weights`` is a folder or hub id of transformers' AutoModelForImageClassification, or a state dict of ultralytics beside
            ``architecture``; only safetensors are read, and no code of the model's own.
        device: where it computes.

    Raises:
        UserError: weights that are missing, damaged, no safetensors or of no classifier.
    """

    def __init__(self, card: Card, device: Any = "cpu"):
        if card.weights == "none":
            raise UserError(f"Judge {card.name} names no weights: pass --judge {card.name}:FOLDER of a classifier.")
        self._settings, self._device = card, device
        load = _from_ultralytics if card.weights.endswith(".safetensors") else _from_transformers
        model, self._prepare, self._several, names, weights, size = load(card)
        self._model = model.float().eval().to(device)
        self._names = [our_label(name, card) for name in names]
        self.labels = our_labels(names, card)
        if strange := sorted(set(card.labels) - set(names)):
            raise UserError(f"Detector {card.name} maps labels that it does not have: {strange}: remove them from its card.")
        self.groups = groups_of(card, self.labels)
        self.card = {**describe(card, weights), "image_size": size, "weights": card.weights.rstrip("/").rpartition("/")[2]}

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The classes of each PIL image, the surest first, each with the whole image as its box."""
        import torch

        found: list[list[Detection]] = []
        for start in range(0, len(images), BATCH_SIZE):
            part = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            with torch.inference_mode():
                output = self._model(self._prepare(part).to(self._device))
            scores = self._scores(output).float().cpu()
            found += [self._of(one, image) for one, image in zip(scores, images[start : start + BATCH_SIZE], strict=True)]
        return found

    def _scores(self, output: Any) -> Any:
        """Probabilities [images, classes]."""
        if not hasattr(output, "logits"):  # ultralytics': probabilities, with the logits behind them
            return output[0] if isinstance(output, (tuple, list)) else output
        return output.logits.sigmoid() if self._several else output.logits.softmax(-1)

    def _of(self, scores: Any, image: Any) -> list[Detection]:
        order = scores.argsort(descending=True).tolist()
        likely = [place for place in order if scores[place] >= self._settings.confidence]
        return [whole(image, self._names[place], float(scores[place])) for place in (likely if self._several else likely[:1])]


_Loaded = tuple[Any, Callable[[list[Any]], Any], bool, list[str], Path, int]


def _from_transformers(card: Card) -> _Loaded:
    """Model, preparation, whether it sees several classes an image, their names, its file and its input's side."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if card.image_size:
        raise UserError(f"Judge {card.name} sees images in the size that its folder says: leave --image-size out.")
    folder = hub.folder_of(card.weights, ADVICE)
    if not (folder / "config.json").is_file():
        raise UserError(f"Judge {card.name}: {card.weights} has no config.json: {ADVICE}.")
    architectures = modelfiles.read_json(folder / "config.json").get("architectures") or []
    if not any(str(name).endswith("ForImageClassification") for name in architectures):
        raise UserError(
            f"Judge {card.name}: {card.weights} is no image classifier ({', '.join(map(str, architectures)) or 'no architecture'}): {ADVICE}."
        )
    files = hub.weight_files(card.weights, "", "model", f"classifier {card.weights}", ADVICE)
    with hub.loading(card.weights):
        # counters of normalisation layers are whole numbers, which `weights.load` takes for quantised ones
        model, told = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, local_files_only=True
        )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, use_fast=True, local_files_only=True)
    if wrong := [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told.get(kind) or ()]:
        raise UserError(
            f"Judge {card.name}: the weights of {card.weights} do not fit its config.json ({len(wrong)} tensors, first {wrong[0]}): restore both."
        )
    check_finite(model.state_dict(), "classifier", card.weights)
    settings = model.config
    names = [str(settings.id2label[place]) for place in range(len(settings.id2label))]
    several = getattr(settings, "problem_type", None) == "multi_label_classification"
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    side = int((size.get("height") or size.get("shortest_edge") or 0) if hasattr(size, "get") else 0)
    return model, lambda images: processor(images=images, return_tensors="pt").pixel_values, several, names, files[0], side


def _from_ultralytics(card: Card) -> _Loaded:
    """The same of ultralytics: its classifiers have one class an image."""
    from torchvision.transforms import v2

    from sd_erase.detection.yolo import classifier, import_ultralytics

    import_ultralytics()
    model, names, weights = classifier(card)
    size = card.image_size or YOLO_SIZE
    # as ultralytics prepares an image for them: the shorter side to the size, the middle, no other normalisation
    prepare = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def batch(images: list[Any]) -> Any:
        import torch

        return torch.stack([prepare(image) for image in images]).float() / 255

    return model, batch, False, names, weights, size
