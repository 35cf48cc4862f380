"""``--objective sd``: CLIPErase's modules plus the hidden states that the denoiser reads.

Redirect: the forget captions' states become those that the frozen encoder gives the same caption with the concept's words
replaced by the anchor, aligned over the span, the words behind it, end-of-text and padding. Preserve: the states of
retain captions, of the empty prompt, of neighbours and of spared senses stay where they were.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase.erasure.method import Batch, paper_terms

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept


@dataclass(frozen=True)
class Redirect:
    """A forget caption, the caption that stands in its place, and which words were exchanged."""

    caption: str
    target: str
    spans: tuple[tuple[int, int], ...]  # characters of `caption`
    target_spans: tuple[tuple[int, int], ...]  # characters of `target`


_ARTICLE = re.compile(r"\b(an?|the)\s+$", re.IGNORECASE)


def redirect(caption: str, spans: list[tuple[int, int]], anchor: str) -> Redirect:
    """`caption` with every span replaced by `anchor` ("" removes it); an article that no longer fits joins the span.

    "a bicycle" becomes "an object", "the bicycle" becomes "the object"; without an anchor the article goes too.
    """
    own_article = re.match(r"(an?|the)\s", anchor) is not None
    pieces, own_spans, target_spans, end, length = [], [], [], 0, 0
    for start, stop in spans:
        word = anchor
        article = _ARTICLE.search(caption, end, start)
        if article is not None:
            fitting = "an" if anchor[:1].lower() in tuple("aeiou") else "a"
            if own_article or not anchor:
                start = article.start()
            elif article[1].lower() not in ("the", fitting):
                start, word = article.start(), f"{fitting} {anchor}"
        pieces += [caption[end:start], word]
        length += start - end
        own_spans.append((start, stop))
        target_spans.append((length, length + len(word)))
        length += len(word)
        end = stop
    return Redirect(caption, "".join([*pieces, caption[end:]]), tuple(own_spans), tuple(target_spans))


def alignment(tokenizer: Any, pair: Redirect, positions: int) -> list[int]:
    """For each position of the caption's tokens, the position of the target's tokens that it shall equal.

    Words outside the spans map to themselves; a span's tokens map to the anchor's, the last one repeated where the anchor
    is shorter; with an empty anchor they map to the token before. Padding maps to padding.
    """

    def tokens_of(text: str, spans: tuple[tuple[int, int], ...]) -> list[list[int]]:
        encoded = tokenizer(text, truncation=False, return_offsets_mapping=True, verbose=False)
        groups: list[list[int]] = [[] for _ in spans]
        offsets = encoded["offset_mapping"]
        for position, (start, stop) in enumerate(offsets[1:-1], start=1):
            for number, (left, right) in enumerate(spans):
                if start < right and stop > left:
                    groups[number].append(position)
        return groups

    groups = tokens_of(pair.caption, pair.spans)
    target_groups = tokens_of(pair.target, pair.target_spans)
    mapping, shift = [], 0
    inside = {position: number for number, group in enumerate(groups) for position in group}
    for position in range(positions):
        number = inside.get(position)
        if number is None:
            mapping.append(position + shift)
            continue
        group, target_group = groups[number], target_groups[number]
        place = group.index(position)
        start = group[0] + shift
        mapping.append(target_group[min(place, len(target_group) - 1)] if target_group else max(0, start - 1))
        if position == group[-1]:
            shift += len(target_group) - len(group)
    return [min(max(value, 0), positions - 1) for value in mapping]


_TYPOS = ("swap", "drop", "double")


def misspell(word: str, rng: random.Random) -> str:
    """One typing error inside a word of four letters or more."""
    if len(word) < 4:
        return word
    place = rng.randrange(1, len(word) - 1)
    kind = rng.choice(_TYPOS)
    if kind == "swap":
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :] if kind == "drop" else word[: place + 1] + word[place:]


class StableDiffusionErasure:
    """The default objective. Vision tower, projection and temperature stay frozen; only linear weights train."""

    needs_images = False  # the paper's terms join in where the CLIP partner is at hand
    default_steps = 160
    default_learning_rate = 3e-4
    default_weights = {"forgetting": 0.1, "retention": 0.1, "consistency": 0.1, "redirect": 10.0, "preserve": 10.0}

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Train the weights of attention and MLP, which a LoRA can carry."""
        import torch

        if both_towers:
            from sd_erase.errors import UserError

            raise UserError("Objective sd trains the text tower only: pass --towers text, or --objective paper.")
        self.concepts = {concept.name: concept for concept in concepts}
        self.anchors = anchors
        self.spared = [f"a photo of an {phrase}" if phrase[0] in "aeiou" else f"a photo of a {phrase}"
                       for concept in concepts for phrase in concept.spared if re.fullmatch(r"[a-z' ]+", phrase)]  # fmt: skip
        self.kept = ["", *self.spared, *(f"a photo of a {word}" for concept in concepts for word in concept.neighbours),
                     *(f"a photo of a {anchor}" for anchor in anchors.values() if anchor)]  # fmt: skip
        trained = [module.weight for module in towers.text.modules() if isinstance(module, torch.nn.Linear)]
        for weight in trained:
            weight.requires_grad_(True)
        return trained

    def _augmented(self, caption: str, spans: tuple[tuple[int, int], ...], concept: Concept, rng: random.Random) -> Redirect:
        """A forget caption with other words of the concept, in capitals, misspelt or in a template, and its target."""
        roll = rng.random()
        if roll < 0.3:  # short prompts, where the concept stands alone, first, last or twice
            word = rng.choice(concept.phrases)
            template = rng.choice((*concept.templates, "{}", "{} and {}", "a {}", "the {}", "some {} here"))
            pieces = template.split("{}")
            caption, places = pieces[0], []
            for piece in pieces[1:]:
                places.append((len(caption), len(caption) + len(word)))
                caption += word + piece
            spans = tuple(places)
        elif roll < 0.6:  # the same sentence with a synonym, sometimes misspelt
            replaced, places, end = "", [], 0
            for start, stop in spans:
                word = rng.choice(concept.phrases) if roll < 0.5 else misspell(caption[start:stop], rng)
                replaced += caption[end:start]
                places.append((len(replaced), len(replaced) + len(word)))
                replaced += word
                end = stop
            caption, spans = replaced + caption[end:], tuple(places)
        if rng.random() < 0.1:
            caption = caption.upper()
        return redirect(caption, list(spans), self.anchors[concept.name])

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """`redirect` and `preserve` on hidden states, and the paper's three terms where images are at hand."""
        import torch

        from sd_erase.clip import encode
        from sd_erase.erasure.losses import relative_error

        rng, layers = batch.random, towers.layers
        moved = [self._augmented(pair.caption, pair.spans, self.concepts[pair.concept], rng) for pair in batch.forget]
        kept = [pair.caption for pair in batch.retain]
        extra = [self.kept[0], *rng.sample(self.kept, min(8, len(self.kept)))]
        ids = towers.tokens([*(item.caption for item in moved), *kept, *extra])
        positions = ids.shape[1]
        index = torch.tensor([alignment(towers.tokenizer, item, positions) for item in moved], device=ids.device)
        with torch.no_grad():
            targets, _ = encode(towers.frozen_text, towers.tokens([item.target for item in moved]), layers)
            originals, _ = encode(towers.frozen_text, ids[len(moved) :], layers)
        states, pooled = encode(towers.text, ids, layers)
        terms = {
            "redirect": sum(
                relative_error(state[: len(moved)], target.gather(1, index[..., None].expand_as(target)))
                for state, target in zip(states, targets, strict=True)
            ) / len(layers),
            "preserve": sum(relative_error(state[len(moved) :], original) for state, original in zip(states, originals, strict=True)) / len(layers),
        }  # fmt: skip
        if batch.forget_images is not None:
            forget_ids = towers.tokens([pair.caption for pair in batch.forget])
            forget_pooled = encode(towers.text, forget_ids, (-1,))[1]
            terms |= paper_terms(towers, batch, forget_pooled, pooled[len(moved) : len(moved) + len(kept)])
        return terms
