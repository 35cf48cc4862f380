"""A CLIP as a judge: zero-shot, by the cosine of an image with sentences that name a label (Radford et al. 2021, arXiv:2103.00020, 3.1).

What an image is asked is which sentences it fits better: those with the concept or the same ones with its anchor, the concept's words
alone or beside another thing. The threshold on that difference is not CLIP's to say: `calibrate` takes it from images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, hub
from sd_erase.captions.synthetic import is_noun
from sd_erase.clip import Towers, encode, image_embeddings, load_towers, text_embeddings, vision_stamp
from sd_erase.concepts import Concept, common_nouns, label_form
from sd_erase.detection import BATCH_SIZE, Card, Detection, whole
from sd_erase.errors import UserError
from sd_erase.rundir import fingerprint

if TYPE_CHECKING:
    import torch

# sentences for a label, whose embeddings are averaged (an ensemble, as in the paper's 3.1.4)
TEMPLATES = {
    "object": ("a photo of {}", "a picture of {}", "{}"),
    "style": ("a painting in the style of {}", "an artwork by {}", "a picture in the manner of {}"),
    "person": ("a photo of {}", "a portrait of {}", "a picture of {}"),
    "nudity": ("a photo of a {} person", "a picture of a {} person", "a {} person"),
}
# an object beside others, in both orders. Of 3 concepts of the pocket, on 50 + 50 images each, most with two objects, the mean of misses and
# false alarms is .07, .06 and .11 (cross-validated); .12, .12 and .18 with "{} beside {}" for the second, .13 each with the label alone
# (at the threshold that is best for those images)
BESIDE = ("a photo of {} and {}", "a photo of {1} and {0}")
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Question:
    """A concept that a CLIP is asked for."""

    concept: Concept
    anchor: str  # what stands in its place; "" for nothing

    @property
    def label(self) -> str:
        return label_form(self.concept.name)

    @property
    def domain(self) -> tuple[str, ...]:
        """Labels of its kind beside it, of which the likeliest alone is seen in an image: styles and people exclude one another."""
        return tuple(map(label_form, self.concept.neighbours)) if self.concept.kind in ("style", "person") else ()


@dataclass(frozen=True)
class _Texts:
    """Embeddings of sentences, each [sentences, width]."""

    own: torch.Tensor  # with the concept
    instead: torch.Tensor  # with its anchor
    domain: torch.Tensor  # the concept, the anchor, then the domain's labels


class ClipJudge:
    """A frozen CLIP that says whether an image shows a concept.

    It knows what it was asked for (`ask`) and, of styles and people, those that the concept's card sets beside it. Other objects it is
    not asked for: an image may show several, and each would want a threshold of its own.

    Args:
        card: ``weights`` is a CLIPModel (a folder or a hub id) or a pocket pack; ``templates`` replace those of the kind.
        device: where it computes.

    Raises:
        UserError: it cannot be loaded, is no CLIP, or the card gives it an image size.
    """

    def __init__(self, card: Card, device: Any = "cpu"):
        if card.weights == "base":
            raise UserError(f"Judge {card.name} is the base's CLIP partner, and no base is given here: pass --judge clip:FOLDER.")
        if card.image_size:
            raise UserError(f"Judge {card.name} sees images in the size of its own model: leave --image-size out.")
        self._settings, self._device = card, device
        self._towers = _load(card, device)
        self.asked: list[Question] = []
        self._texts: dict[str, _Texts] = {}
        self.labels: frozenset[str] = frozenset()
        self.groups: dict[str, frozenset[str]] = {}
        self.card: dict[str, Any] = {
            "name": card.name, "kind": card.kind, "weights": _name(self._towers.base.source), "weights_sha256": self.stamp,
            "image_size": _side(self._towers.image_processor), "confidence": card.confidence, "licence": card.licence,
            "templates": list(card.templates), "calibration": {},
        }  # fmt: skip

    @functools.cached_property
    def stamp(self) -> str:
        """A digest of both towers and of how an image is prepared."""
        return fingerprint(self._towers.stamp, vision_stamp(self._towers))

    def text_state(self) -> dict[str, Any]:
        """The tensors of its text tower."""
        state: dict[str, Any] = self._towers.frozen_text.state_dict()
        return state

    def ask(self, concepts: Sequence[Concept], anchors: dict[str, str]) -> None:
        """Set what the judge is asked for; it knows every concept, for it knows words.

        Args:
            anchors: concept -> what stands in its place; "" for nothing.
        """
        self.asked, self._texts = [Question(concept, anchors[concept.name]) for concept in concepts], {}
        self.labels = frozenset(label for one in self.asked for label in (one.label, *one.domain))
        self.card |= {"anchors": {one.label: one.anchor for one in self.asked}, "calibration": {}}

    def _embedded(self, one: Question) -> _Texts:
        """The sentences of a question, embedded when they are first needed."""
        if one.label not in self._texts:
            concept, is_object = one.concept, one.concept.kind == "object"
            templates = self._settings.templates or TEMPLATES[concept.kind]
            nouns = [noun for noun in common_nouns() if noun != one.anchor and not any(concept.scan(noun))] if is_object else []
            word = next((word for word in concept.phrases if not is_noun(concept, word)), concept.name)
            word, instead = (
                _mention(text, is_object) for text in (concept.name if is_object else word, one.anchor or "something")
            )
            self._texts[one.label] = _Texts(
                self._beside(templates, word, nouns),
                self._beside(templates, instead, nouns),
                self._ensembles([[each.format(name) for each in templates] for name in (word, instead, *one.domain)]),
            )
        return self._texts[one.label]

    def _beside(self, templates: Sequence[str], word: str, nouns: Sequence[str]) -> torch.Tensor:
        """The sentences of a word, alone and beside each noun."""
        pairs = [[one.format(word, _mention(noun, True)) for one in BESIDE] for noun in nouns]
        return self._ensembles([[one.format(word) for one in templates], *pairs])

    def _ensembles(self, groups: Sequence[Sequence[str]]) -> torch.Tensor:
        """The mean embedding of each group of sentences, normalised: [groups, width]."""
        import torch

        texts = [text for group in groups for text in group]
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                ids = self._towers.tokens(texts[start : start + TEXTS_AT_ONCE])
                states = encode(self._towers.frozen_text, ids[:, : self._towers.end_of(ids, 0)], (-1,))[1]
                parts.append(text_embeddings(self._towers.frozen_clip, states))
        rows = torch.cat(parts).split([len(group) for group in groups])
        return torch.nn.functional.normalize(torch.stack([one.mean(0) for one in rows]), dim=-1)

    def _features(self, images: Sequence[Any]) -> torch.Tensor:
        """Normalised embeddings of PIL images, times CLIP's scale: [images, width]."""
        import torch

        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            part = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixels = self._towers.image_processor(images=part, return_tensors="pt").pixel_values
            with torch.no_grad():
                parts.append(image_embeddings(self._towers.frozen_clip, pixels.to(self._towers.frozen_text.device)))
        return torch.cat(parts) * self._towers.frozen_clip.logit_scale.exp().detach()

    def scores(self, label: str, images: Sequence[Any]) -> list[float]:
        """How much better the sentences with the concept fit than those with its anchor: log-odds, before any threshold."""
        one = next(each for each in self.asked if each.label == label)
        return _log_odds(self._features(images), self._embedded(one))

    def set_calibration(self, label: str, found: dict[str, Any]) -> None:
        """Take the ``threshold`` of a label (see `metrics.calibration`), which is recorded with all that it says."""
        self.card["calibration"] = {**self.card["calibration"], label: found}

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        """The labels of each PIL image, the surest first, each with the whole image as its box.

        A score is the concept's share against its anchor, 0.5 at the calibrated threshold; of a label of its domain, its softmax.

        Raises:
            RuntimeError: it was not calibrated.
        """
        if not images:
            return []
        features = self._features(images)
        found: list[list[Detection]] = [[] for _ in images]
        for one in self.asked:
            if one.label not in self.card["calibration"]:
                raise RuntimeError(f"Judge {self._settings.name} was not calibrated for {one.label}.")
            middle = self.card["calibration"][one.label]["threshold"]
            for image, own, log_odds in zip(images, found, _log_odds(features, self._embedded(one)), strict=True):
                score = 1 / (1 + math.exp(min(700.0, middle - log_odds)))
                if score > self._settings.confidence:
                    own.append(whole(image, one.label, score))
            if one.domain:
                self._add_domain(one, features, images, found)
        return [sorted(own, key=lambda each: -each.score) for own in found]

    def _add_domain(self, one: Question, features: torch.Tensor, images: Sequence[Any], found: list[list[Detection]]) -> None:
        """The likeliest of the labels beside the concept, where the concept itself and its anchor are less likely."""
        best = (features @ self._embedded(one).domain.T).softmax(-1).max(-1)
        for image, own, score, number in zip(images, found, best.values.tolist(), best.indices.tolist(), strict=True):
            if number > 1:
                own.append(whole(image, one.domain[number - 2], score))


def _log_odds(features: torch.Tensor, texts: _Texts) -> list[float]:
    with_concept, with_anchor = ((features @ each.T).logsumexp(-1) for each in (texts.own, texts.instead))
    values: list[float] = (with_concept - with_anchor).tolist()
    return values


def _mention(word: str, is_object: bool) -> str:
    """A noun with its article, as captions have it."""
    if not is_object or not word or word.split()[0] in ("a", "an", "the", "some", "something", "somebody"):
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _side(processor: Any) -> int:
    """Pixels of the square that the vision tower sees."""
    size = getattr(processor, "crop_size", None) or processor.size
    return int(size.get("height") or size.get("shortest_edge") or 0)


def _name(source: str) -> str:
    """What a CLIP is called with its figures: no path of this machine."""
    return "pocket" if source == str(bases.POCKET_FOLDER) else source if hub.is_identifier(source) else Path(source).name


def _load(card: Card, device: Any) -> Towers:
    """Both towers of the CLIP that a card names."""
    base = bases.resolve(card.weights)
    if base.family != "clip" and not base.pocket:
        raise UserError(
            f"Judge {card.name}: {card.weights} is no CLIP with a vision tower: pass the folder of a CLIPModel, or its hub id."
        )
    return load_towers(base, device, need_images=True, share_vision=True)
