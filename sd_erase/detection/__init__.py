"""Images into detections. A judge is a card (``detectors/*.yaml``) and the class of its kind: a detector, a classifier or a CLIP.

A judge that finds no places (a classifier, a CLIP) gives each label that it sees the whole image as its box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sd_erase import catalog, digests, resources, yamlfile
from sd_erase.concepts import label_form
from sd_erase.errors import UserError, shortened, unknown_choice
from sd_erase.rundir import fingerprint

PADDING = 114 / 255  # the grey that YOLO models are trained with
MAX_DETECTIONS = 300  # an image
BATCH_SIZE = 32
MAX_IMAGE_SIZE = 4096  # pixels
OWN_SIZE = ("clip", "classifier")  # kinds whose model says its input's size itself: their cards may leave it out
NEEDED = ("name", "kind", "weights", "confidence", "licence")  # keys of every card
OF_BOXES = ("image_size", "iou")  # and of those whose models find places


@dataclass(frozen=True)
class Detection:
    """One object that was found."""

    image: str  # the file's name, "" for an image that has none
    label: str
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # pixels: left, top, right, bottom


@dataclass(frozen=True)
class Card:
    """What a detector is: recorded with every number that comes from it."""

    name: str
    kind: str  # a row of catalog.DETECTORS
    weights: str  # a file, or a name that the kind can fetch
    image_size: int = 0  # pixels of the square input; 0: the model's own
    confidence: float = 0.5  # detections below it are dropped
    iou: float = 0.45  # boxes of one label that overlap more are one object
    licence: str = ""
    architecture: str = ""  # a model description that the weights fit, where they carry none
    names: tuple[str, ...] = ()  # the classes in order, where neither weights nor architecture name them
    labels: dict[str, str] = field(default_factory=dict)  # detector label -> our label, where they differ
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # kind of concept -> our labels that answer for any of it
    templates: tuple[str, ...] = ()  # of a CLIP: sentences with one {} for the label; empty: those of `clip.TEMPLATES`
    folder: str = ""  # where the card lies


class Detector(Protocol):
    """Finds objects in images, or says what an image as a whole is of."""

    @property
    def card(self) -> dict[str, Any]:
        """What is recorded with its figures: name, weights, weights_sha256, image_size, confidence and more."""

    @property
    def labels(self) -> frozenset[str]:
        """What it can find, in our names."""

    @property
    def groups(self) -> Mapping[str, frozenset[str]]:
        """Kind of concept -> the labels that answer for any concept of it."""

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The objects of each PIL image, the surest first."""


def read_card(name: str | Path) -> Card:
    """The card behind a bundled name or a path.

    Raises:
        UserError: no such card, not YAML, or a key is missing, unknown or of the wrong type.
    """
    path = resources.find("detectors", name)
    values = yamlfile.read(path, "Detector card")
    if not isinstance(values, dict):
        raise UserError(
            f"Detector card {path} is no mapping of settings: write `name:`, `kind:`, `weights:` and so on, as the bundled cards do."
        )
    keys = {item.name: item for item in dataclasses.fields(Card) if item.name != "folder"}
    for key in values:
        if key not in keys:
            raise unknown_choice(f"Detector card {path}: key", key, keys)
    needed = NEEDED if values.get("kind") in OWN_SIZE else (*NEEDED, *OF_BOXES)
    absent = [key for key in keys if key in needed and key not in values]
    if absent:
        raise UserError(f"Detector card {path} lacks {', '.join(absent)}: add them.")
    _check_texts(values, path)
    for key in ("names", "templates"):
        values[key] = tuple(values.get(key) or ())
    values["labels"] = dict(values.get("labels") or {})
    values["groups"] = {kind: tuple(map(label_form, labels)) for kind, labels in (values.get("groups") or {}).items()}
    return _checked(Card(**values, folder=str(path.parent)), str(path))


def _check_texts(values: dict[str, Any], path: Path) -> None:
    """The types of a card's texts, lists and maps; its numbers are checked where a setting may replace them."""
    for key in ("name", "kind", "weights", "licence", "architecture"):
        if not isinstance(values.get(key, ""), str) or not values.get(key, "x"):
            raise UserError(f"Detector card {path}: {key} must be a text, not {shortened(values[key])}: write it in quotes.")
    labels, groups = values.get("labels") or {}, values.get("groups") or {}
    for key in ("names", "templates"):
        names = values.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"Detector card {path}: {key} must be a list of texts, not {shortened(names)}: write `{key}: [a, b]`."
            )
    if wrong := next((text for text in values.get("templates") or [] if text.count("{}") != 1 or text.count("{") != 1), None):
        raise UserError(f"Detector card {path}: template {shortened(wrong)} must hold {{}} once: write `a photo of {{}}`.")
    if not isinstance(groups, dict) or not all(
        isinstance(each, list) and all(isinstance(one, str) for one in each) for each in groups.values()
    ):
        raise UserError(
            f"Detector card {path}: groups must map kinds of concepts to lists of its labels, not {shortened(groups)}: write "
            "`groups: {nudity: [a, b]}`."
        )
    for kind in groups:
        if kind not in catalog.KINDS:
            raise unknown_choice(f"Detector card {path}: groups: kind", kind, catalog.KINDS)
    if not isinstance(labels, dict) or not all(isinstance(text, str) for pair in labels.items() for text in pair):
        raise UserError(
            f"Detector card {path}: labels must map its labels to ours, not {shortened(labels)}: write `labels: {{theirs: ours}}`."
        )


def _checked(card: Card, where: str) -> Card:
    if card.kind not in catalog.DETECTORS:
        raise unknown_choice(f"Detector card {where}: kind", card.kind, catalog.DETECTORS)
    is_own = card.kind in OWN_SIZE and card.image_size == 0
    if not is_own and (type(card.image_size) is not int or not 32 <= card.image_size <= MAX_IMAGE_SIZE or card.image_size % 32):
        raise UserError(
            f"Detector {where}: image size {shortened(card.image_size)} is no multiple of 32 pixels from 32 to {MAX_IMAGE_SIZE}: write one."
        )
    for key in ("confidence", "iou"):
        value = getattr(card, key)
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise UserError(f"Detector {where}: {key} {shortened(value)} is not between 0 and 1: write such a number.")
    return card


def split_name(name: str | Path) -> tuple[str, str]:
    """A judge's name as (card, weights): ``clip:PATH`` is the card ``clip`` with the weights at PATH; "" where none are named."""
    card, colon, weights = str(name).partition(":")
    is_path = Path(str(name)).expanduser().is_file() or card not in resources.names("detectors")
    return (str(name), "") if is_path or not colon else (card, weights)


def load_detector(name: str | Path, *, device: Any = "cpu", trust_pickle: bool = False, **overrides: Any) -> Detector:
    """The detector of a card.

    Args:
        name: a bundled card's name or a path to one; with ``:PATH`` behind a bundled name other weights than the card's.
        device: where it computes.
        trust_pickle: the user's consent to weights that are a pickle (``.pt``); without it only safetensors and ONNX are opened, and
            what a bundled card fetched from ultralytics itself.
        **overrides: keys of the card to replace (``image_size=320``, ``confidence=0.4``, ``weights="mine.pt"``).

    Raises:
        UserError: no such card, weights that are missing, cannot be fetched, do not fit or are a pickle without consent, or a
            missing extra.
    """
    name, weights = split_name(name)
    card = read_card(name)
    overrides |= {"weights": weights} if weights else {}
    unknown = set(overrides) - {item.name for item in dataclasses.fields(Card)}
    if unknown:
        raise unknown_choice("Detector setting", sorted(unknown)[0], [item.name for item in dataclasses.fields(Card)])
    card = _checked(dataclasses.replace(card, **overrides), card.name)
    if not trust_pickle:
        _refuse_pickle(
            card, is_published="weights" not in overrides and Path(card.folder) == resources.packaged_folder("detectors")
        )
    return catalog.resolve(catalog.DETECTORS, card.kind, "Detector kind")(card, device)


def _refuse_pickle(card: Card, is_published: bool) -> None:
    """Refuse weights that are a pickle, but for those that a bundled card fetches from their maker."""
    if Path(card.weights).suffix.lower() != ".pt":
        return
    file = find_file(card, card.weights)
    if file is None and is_published:
        return
    where = f" (remove {file} to fetch ultralytics' own)" if file is not None and is_published else ""
    raise UserError(
        f"Detector {card.name}: {file or card.weights} is a pickle, which can run its maker's code on this machine when it is opened: pass "
        f"--trust-pickle if you trust its maker, or use a detector of safetensors or ONNX{where}."
    )


def find_file(card: Card, name: str) -> Path | None:
    """The file that a card names: absolute, beside the card, in the working folder, or shipped with sd-erase."""
    for folder in (Path(card.folder), Path.cwd(), resources.PACKAGE.parent):
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
    return None


def groups_of(card: Card, known: frozenset[str]) -> dict[str, frozenset[str]]:
    """Kind of concept -> the labels of the card's group that a judge has.

    Raises:
        UserError: a group names a label that it does not have.
    """
    for kind, labels in card.groups.items():
        if strange := sorted(set(labels) - known):
            raise UserError(
                f"Detector {card.name}: group {kind} names labels that it does not have: {', '.join(strange)}: remove them."
            )
    return {kind: frozenset(labels) for kind, labels in card.groups.items()}


def whole(image: Any, label: str, score: float) -> Detection:
    """A label of a PIL image as a whole."""
    file_name = Path(getattr(image, "filename", "") or "").name
    return Detection(file_name, label, score, (0.0, 0.0, float(image.width), float(image.height)))


def describe(card: Card, weights: Path) -> dict[str, Any]:
    """The card as it is recorded with results: its settings and the hashes of weights and classes, without machine paths."""
    kept = ("name", "kind", "image_size", "confidence", "iou", "licence")
    architecture = find_file(card, card.architecture) if card.architecture else None
    groups = [card.groups] if card.groups else []  # so that the fingerprints of cards without any stay as they were
    classes = fingerprint(card.names, card.labels, *groups, *([architecture] if architecture is not None else []))
    return {key: getattr(card, key) for key in kept} | {
        "weights": weights.name,
        "weights_sha256": digests.of_file(weights),
        "classes": classes,
    }


def letterbox(images: Sequence[Any], size: int) -> tuple[Any, list[tuple[float, int, int]]]:
    """Images into one batch of squares: the aspect is kept, the rest is grey, as YOLO models are trained.

    Args:
        images: PIL images of any size.
        size: the squares' side in pixels.

    Returns:
        float32 [N, 3, size, size], RGB in 0..1, and for each image its scale and its left and top padding in pixels.
    """
    import numpy
    import torch
    from torch.nn.functional import interpolate

    batch = torch.full((len(images), 3, size, size), PADDING)
    places = []
    for number, image in enumerate(images):
        pixels = torch.from_numpy(numpy.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
        height, width = pixels.shape[1:]
        scale = min(size / height, size / width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        if (inner_height, inner_width) != (height, width):
            # bilinear without antialiasing: the models were trained on OpenCV's
            pixels = interpolate(pixels[None], (inner_height, inner_width), mode="bilinear", align_corners=False)[0]
        left, top = round((size - inner_width) / 2 - 0.1), round((size - inner_height) / 2 - 0.1)
        batch[number, :, top : top + inner_height, left : left + inner_width] = pixels
        places.append((scale, left, top))
    return batch, places


def select(
    boxes: Any, scores: Any, place: tuple[float, int, int], image: Any, names: Sequence[str], card: Card
) -> list[Detection]:
    """One image's raw predictions into detections: the best class of each box, above the confidence, overlaps merged.

    Args:
        boxes: [A, 4] centre x, centre y, width, height in pixels of the letterboxed input.
        scores: [A, C] in 0..1.
        place: the image's scale, left and top padding.
        image: the PIL image, for its size and its file's name.
        names: the C classes.
        card: confidence, iou and label map.
    """
    import torch
    from torchvision.ops import batched_nms, box_convert

    best, classes = scores.max(dim=1)
    sure = best > card.confidence
    best, classes, corners = best[sure], classes[sure], box_convert(boxes[sure], "cxcywh", "xyxy")
    kept = batched_nms(corners, best, classes, card.iou)[:MAX_DETECTIONS]
    scale, left, top = place
    corners = (corners[kept] - torch.tensor([left, top, left, top], device=corners.device)) / scale
    limits = torch.tensor([image.width, image.height] * 2, device=corners.device)
    corners = corners.clamp(min=0).minimum(limits).tolist()
    file_name = Path(getattr(image, "filename", "") or "").name
    found = zip(corners, best[kept].tolist(), classes[kept].tolist(), strict=True)
    return [Detection(file_name, our_label(names[number], card), score, tuple(box)) for box, score, number in found]


def our_labels(names: Sequence[str], card: Card) -> frozenset[str]:
    """What a detector with these classes can find, in our names."""
    return frozenset(our_label(name, card) for name in names)


def our_label(name: str, card: Card) -> str:
    """A detector's class in our names: as its card says, and whether it has capitals or underscores or not."""
    return label_form(card.labels.get(name, name))
