"""Detectors of the ultralytics package: an architecture with a safetensors state dict, or a published .pt by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase import formats, yamlfile
from sd_erase.detection import BATCH_SIZE, Card, Detection, describe, find_file, letterbox, our_labels, select
from sd_erase.errors import UserError


def import_ultralytics() -> None:
    """Import ultralytics without its side effects: printing to stdout, installing packages, another `PIL.Image.open`.

    The user's own environment variables win. The models are called directly, not through its predictor, which would
    also send usage statistics.
    """
    from PIL import Image

    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    plain_open = Image.open
    import ultralytics.nn.tasks  # noqa: F401

    Image.open = plain_open  # ultralytics' asks for another package where an image is damaged


class YoloDetector:
    """An ultralytics detection model, called directly.

    Args:
        card: what to load and how to select.
        device: where it computes.

    Raises:
        UserError: weights that are missing, cannot be fetched, are damaged or do not fit the architecture.
    """

    def __init__(self, card: Card, device: Any = "cpu"):
        import_ultralytics()
        if card.weights.endswith(".safetensors"):
            model, names, weights = _from_safetensors(card)
        elif card.weights.endswith(".pt"):
            model, names, weights = _from_published(card)
        else:
            raise UserError(f"Detector {card.name}: weights {card.weights} are neither .safetensors nor .pt: name such a file.")
        if set(card.labels) - set(names):
            raise UserError(f"Detector {card.name} maps labels that it does not have: {sorted(set(card.labels) - set(names))}.")
        self._settings, self._names, self._device = card, names, device
        self._model = model.float().eval().to(device)
        self.labels = our_labels(names, card)
        self.card = describe(card, weights)
        if card.architecture:
            self.card["architecture"] = Path(card.architecture).name

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The objects of each PIL image, the surest first."""
        import torch

        found: list[list[Detection]] = []
        for start in range(0, len(images), BATCH_SIZE):
            part = images[start : start + BATCH_SIZE]
            batch, places = letterbox(part, self._settings.image_size)
            with torch.inference_mode():
                output = self._model(batch.to(self._device))
            raw = (output[0] if isinstance(output, (tuple, list)) else output).float().cpu()  # [N, 4 + C, A]
            for prediction, place, image in zip(raw, places, part, strict=True):
                boxes, scores = prediction[:4].T, prediction[4 : 4 + len(self._names)].T
                found.append(select(boxes, scores, place, image, self._names, self._settings))
        return found


def _file(card: Card, name: str) -> Path:
    """The file that a card names."""
    path = find_file(card, name)
    if path is None:
        raise UserError(f"Detector {card.name}: file {name} does not exist: restore it, or correct the card.")
    return path


def _from_safetensors(card: Card) -> tuple[Any, list[str], Path]:
    if not card.architecture:
        raise UserError(f"Detector {card.name} has safetensors weights but names no architecture: add one to its card.")
    weights, architecture = (_file(card, name) for name in (card.weights, card.architecture))
    description = yamlfile.read(architecture, f"Detector {card.name}: architecture")
    loaded = formats.read_tensors(weights)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in loaded.items()}
    names = list(card.names) or _names(description.get("names"))
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(description, verbose=False)
    if len(names) != model.yaml["nc"]:
        raise UserError(f"Detector {card.name} has {model.yaml['nc']} classes but {len(names)} names: list them as 'names'.")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"Detector {card.name}: {weights.name} does not fit {architecture.name} ({' '.join(str(error).split())[:300]})."
        ) from error
    return model, names, weights


def _names(value: Any) -> list[str]:
    """Class names from a list or from ultralytics' mapping of numbers to names."""
    if isinstance(value, dict):
        return [str(value[key]) for key in sorted(value)]
    return [str(name) for name in value or ()]


def _from_published(card: Card) -> tuple[Any, list[str], Path]:
    """A .pt that the card names. A .pt is a pickle: it is read with the allow-list of ultralytics, never with plain pickle."""
    import torch
    from ultralytics.nn.tasks import torch_safe_load

    path = find_file(card, card.weights) or Path(torch.hub.get_dir()) / "checkpoints" / Path(card.weights).name
    fetched = not path.is_file()
    if fetched:
        path.parent.mkdir(parents=True, exist_ok=True)
    # whatever fails on the way (network, archive, a type outside the allow-list), the user has to bring another file
    try:
        checkpoint, _ = torch_safe_load(str(path), safe_only=True)
        model = checkpoint.get("ema") or checkpoint["model"]
        names = _names(model.names)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if fetched and not path.is_file():
            raise UserError(
                f"Detector {card.name}: weights {card.weights} cannot be fetched ({reason}): put the file into the working "
                f"folder, name it in a card of your own, or pass --detector pocket."
            ) from error
        raise UserError(
            f"Detector {card.name}: {path} is no ultralytics checkpoint that can be read safely ({reason}): download it again "
            "(a .pt can run code when opened, so only plain ultralytics models are read)."
        ) from error
    return model, list(card.names) or names, path
