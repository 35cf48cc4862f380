"""Detectors of the ultralytics package: an architecture with a safetensors state dict, or a published .pt by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_erase import formats, quiet, yamlfile
from sd_erase.detection import BATCH_SIZE, Card, Detection, describe, find_file, groups_of, letterbox, our_labels, select
from sd_erase.errors import UserError, shortened

# the first ultralytics whose restricted loader reads its own models and refuses foreign code; until 8.4.66 it called any built-in
# function of Python that a file named
SAFE_SINCE = [8, 4, 69]
ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Z]\w*\([\w\s.,=+-]*\)")  # nn.SiLU(), torch.nn.LeakyReLU(0.1)
MOST_ROWS, MOST_REPEATS, MOST_FACTOR = 1000, 200, 10  # of a model's description
SPARE_NUMBERS = 20_000_000  # what building a model needs beside its weights


def import_ultralytics() -> None:
    """Import ultralytics without its side effects: looking hosts up, settings at home, printing, another `PIL.Image.open`.

    The models are called directly, not through its predictor, which would also send usage statistics.
    """
    from PIL import Image

    quiet.libraries()
    plain_open = Image.open
    with quiet.settings_elsewhere():
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
        elif card.weights.lower().endswith(".pt"):
            model, names, weights = _from_published(card)
        else:
            raise UserError(f"Detector {card.name}: weights {card.weights} are neither .safetensors nor .pt: name such a file.")
        if set(card.labels) - set(names):
            raise UserError(
                f"Detector {card.name} maps labels that it does not have: {sorted(set(card.labels) - set(names))}: remove them from its card."
            )
        self._settings, self._names, self._device = card, names, device
        self._model = model.float().eval().to(device)
        self.labels = our_labels(names, card)
        self.groups = groups_of(card, self.labels)
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


def classifier(card: Card) -> tuple[Any, list[str], Path]:
    """An ultralytics classification model with its class names and the file of its weights.

    Raises:
        UserError: as `YoloDetector` does.
    """
    from ultralytics.nn.tasks import ClassificationModel

    return _from_safetensors(card, ClassificationModel)


def _from_safetensors(card: Card, kind: Any = None) -> tuple[Any, list[str], Path]:
    """A card's model with its class names and the file of its weights; `kind` is its class, by default a detector's."""
    if not card.architecture:
        raise UserError(f"Detector {card.name} has safetensors weights but names no architecture: add one to its card.")
    weights, architecture = (_file(card, name) for name in (card.weights, card.architecture))
    description = _architecture(architecture, f"Detector {card.name}: architecture")
    loaded = formats.read_tensors(weights)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in loaded.items()}
    names = list(card.names) or _names(description.get("names"))
    model = _build(
        description, sum(tensor.numel() for tensor in state.values()), f"Detector {card.name}: {architecture.name}", kind
    )
    if len(names) != model.yaml["nc"]:
        raise UserError(f"Detector {card.name} has {model.yaml['nc']} classes but {len(names)} names: list them as 'names'.")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"Detector {card.name}: {weights.name} does not fit {architecture.name} ({' '.join(str(error).split())[:300]}): name both in its card as they were saved together."
        ) from error
    return model, names, weights


def _architecture(path: Path, what: str) -> dict[str, Any]:
    """A model's description, without what ultralytics would run or call on its behalf.

    ultralytics evaluates the text under ``activation`` as Python and calls whatever of its own names a layer gives; a card's
    description may be anybody's, so only layers are let through here, whatever ultralytics' own settings are.

    Raises:
        UserError: it is no description of a model, or names something that is no layer.
    """
    description = yamlfile.read(path, what)
    rows = _rows(description)
    if rows is None:
        raise UserError(f"{what} {path} is no description of a model (a backbone and a head of rows of four): use ultralytics'.")
    scales = description.get("scales") or {}
    factors = [description.get(f"{name}_multiple", 1) for name in ("depth", "width")]
    factors += [factor for values in scales.values() for factor in list(values)[:2]] if isinstance(scales, dict) else [None]
    if not all(isinstance(factor, (int, float)) and 0 < factor <= MOST_FACTOR for factor in factors):
        raise UserError(f"{what} {path} has a depth or a width that is no number up to {MOST_FACTOR}: use ultralytics' own.")
    if description.get("activation") and not ACTIVATION.fullmatch(str(description["activation"])):
        raise UserError(
            f"{what} {path} has an activation that is no layer of torch.nn: {shortened(description['activation'])}; use ultralytics' own."
        )
    for _, number, name, _ in rows:
        if not _is_layer(str(name)):
            raise UserError(f"{what} {path} names {shortened(name)}, which is no layer: use ultralytics' own description.")
        if type(number) is not int or not 1 <= number <= MOST_REPEATS:
            raise UserError(f"{what} {path} repeats a layer {shortened(number)} times: write 1 to {MOST_REPEATS}.")
    return dict(description)


def _rows(description: Any) -> list[list[Any]] | None:
    """The layers of a description; None where it has none."""
    parts = [description.get(part) for part in ("backbone", "head")] if isinstance(description, dict) else [None]
    rows = [row for part in parts if isinstance(part, list) for row in part]
    whole = all(isinstance(part, list) for part in parts) and rows and len(rows) <= MOST_ROWS
    return rows if whole and all(isinstance(row, list) and len(row) == 4 and isinstance(row[3], list) for row in rows) else None


def _is_layer(name: str) -> bool:
    """Whether ultralytics means a layer by `name`: no function of its own, no whole model, and none that fetches weights."""
    import torchvision
    from torch import nn
    from ultralytics.nn import tasks

    source, key = (nn, name[3:]) if name.startswith("nn.") else (tasks, name)
    if name.startswith("torchvision.ops."):
        source, key = torchvision.ops, name.removeprefix("torchvision.ops.")
    layer = getattr(source, key, None) if key.isidentifier() else None
    return (
        isinstance(layer, type)
        and issubclass(layer, nn.Module)
        and not issubclass(layer, tasks.BaseModel)
        and key != "TorchVision"
    )


def _build(description: dict[str, Any], numbers: int, what: str, kind: Any = None) -> Any:
    """The model of a description, of about as many numbers as its weights have.

    Raises:
        UserError: ultralytics cannot build it, or it would be far larger than its weights.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from ultralytics.nn.tasks import DetectionModel

    class Bounded(TorchDispatchMode):
        left = 4 * numbers + SPARE_NUMBERS

        def __torch_dispatch__(self, function: Any, kinds: Any, given: Any = (), options: Any = None) -> Any:
            if str(function).startswith(("aten.empty", "aten.zeros", "aten.ones", "aten.full", "aten.new_")) and given:
                sizes = [size for size in given[0] if isinstance(size, int)] if isinstance(given[0], (list, tuple)) else []
                self.left -= math.prod(sizes)
                if self.left < 0:
                    raise MemoryError("it would be far larger than its weights")
            return function(*given, **(options or {}))

    try:
        with Bounded(), torch.random.fork_rng(devices=[]), _own_activation():
            return (kind or DetectionModel)(description, verbose=False)
    except Exception as error:  # whatever ultralytics stumbles over in a description that is not its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{what} describes no model that ultralytics can build ({reason}): use one of ultralytics' own."
        ) from error


@contextmanager
def _own_activation() -> Iterator[None]:
    """Build a model with the activation of its own description, or SiLU, whatever models were built before it in this process.

    ultralytics keeps the activation that a description names in a class, of which older versions (8.4.69 among them) build every later
    model: the pocket's detector behind one with LeakyReLU found 2 of 16 bicycles.
    """
    from torch import nn
    from ultralytics.nn.modules.conv import Conv

    before, Conv.default_act = Conv.default_act, nn.SiLU()
    try:
        yield
    finally:
        Conv.default_act = before


def _names(value: Any) -> list[str]:
    """Class names from a list or from ultralytics' mapping of numbers to names."""
    if isinstance(value, dict):
        return [str(value[key]) for key in sorted(value)]
    return [str(name) for name in value or ()]


def _from_published(card: Card) -> tuple[Any, list[str], Path]:
    """A .pt that the card names. A .pt is a pickle: it is read with the allow-list of ultralytics, never with plain pickle."""
    import torch
    import ultralytics
    from ultralytics.nn.tasks import torch_safe_load

    if [int(number) for number in re.findall(r"\d+", ultralytics.__version__)[:3]] < SAFE_SINCE:
        least = ".".join(map(str, SAFE_SINCE))
        raise UserError(
            f"Detector {card.name}: ultralytics {ultralytics.__version__} runs code that stands in a .pt: install ultralytics {least} or later."
        )
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
