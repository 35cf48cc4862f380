"""What the comparators share: the words that they erase, as captions, and that their last state is the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase import sharding
from sd_erase.erasure.method import Stateless
from sd_erase.erasure.names import KNOWN, Way
from sd_erase.erasure.sd import Redirect, fill, redirect
from sd_erase.errors import UserError

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.pairs import Pair

BARE = "{}"  # the concept's name alone, as papers prompt


class Peer(Stateless):
    """A published method on the text tower or the denoiser.

    Attributes:
        published_learning_rate: its paper's, for real models; the pocket model is eight times as narrow and has one of its own.
        keeps_last: papers take the state behind the last step, not the one that validates best.
        reads_images: none does, so no time of its training goes into them.
        takes_lora: each says itself which weights change.
    """

    needs_images = False
    reads_images = False
    only_matrices = False  # papers use Adam
    solves = False
    keeps_last = True
    takes_lora = False
    needs_denoiser = False
    published_learning_rate = 0.0
    default_steps = 0
    default_learning_rate = 0.0

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Gather the captions, and return what `chosen` makes train."""
        if both_towers:
            raise UserError("A published comparator changes the text tower or the denoiser: pass --towers text.")
        self.concepts = {concept.name: concept for concept in concepts}
        self.anchors = anchors
        self.phrases = {concept.name: _known(towers, concept, anchors[concept.name]) for concept in concepts}
        self.plain = [
            redirect(caption, list(spans), anchors[concept.name])
            for concept in concepts
            for phrase in self.phrases[concept.name]
            for caption, spans in (fill(form, phrase) for form in (BARE, *concept.templates))
        ]
        return self.chosen(towers)

    def chosen(self, towers: Towers) -> list[Any]:
        """The parameters to train; they require gradients."""
        raise NotImplementedError

    def named(self, pair: Pair, rng: random.Random) -> Redirect:
        """A forget caption with any of the concept's words in place of its own, beside the same with the anchor."""
        concept = self.concepts[str(pair.concept)]
        ends = (0, *(stop for _, stop in pair.spans))
        starts = (*(start for start, _ in pair.spans), len(pair.caption))
        pieces = [pair.caption[end:start].replace("{", "").replace("}", "") for end, start in zip(ends, starts, strict=True)]
        caption, spans = fill(BARE.join(pieces), rng.choice(self.phrases[concept.name]))
        return redirect(caption, list(spans), self.anchors[concept.name])


def _known(towers: Towers, concept: Concept, anchor: str) -> list[str]:
    """The card's words that the base reads as the concept: others are one and the same unknown word to it."""
    with sharding.sharing(False):
        measured = Way(towers, concept, anchor).measured(concept.phrases, "card")
    return [name.text for name in measured if name.along >= KNOWN] or list(concept.words) or [concept.name]


def last_words(towers: Towers, items: list[Redirect]) -> list[tuple[int, int]]:
    """The positions of the concept's last token in each caption and of the anchor's in its target."""
    from sd_erase.erasure.sd import span_tokens

    def last(text: str, spans: tuple[tuple[int, int], ...]) -> int:
        groups = [
            group for group in span_tokens(towers.tokenizer, text, spans, towers.text.config.max_position_embeddings) if group
        ]
        return groups[-1][-1] if groups else 1  # an anchor that is nothing

    return [(last(item.caption, item.words), last(item.target, item.target_spans)) for item in items]


def layers_of(text: Any) -> Any:
    """The blocks of a CLIPTextModel."""
    return getattr(text, "text_model", text).encoder.layers


def training(parameters: list[Any]) -> list[Any]:
    """`parameters`, which then require gradients."""
    for each in parameters:
        each.requires_grad_(True)
    return parameters


def relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The squared error [rows, width] over the variance of what is wanted."""
    spread = wanted.sub(wanted.mean(0)).square().mean().clamp(min=1e-12)
    return (found - wanted).square().mean() / spread
