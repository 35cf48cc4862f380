"""``--objective sd``: CLIPErase's modules plus the hidden states that the denoiser reads. The default, `robust`, builds on it.

Redirect: the forget captions' states become those that the frozen encoder gives the same caption with the concept's words
replaced by the anchor, aligned over the span, the words behind it, end-of-text and padding. Preserve: the states of
retain captions, of the empty prompt, of neighbours and of spared senses stay where they were.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase.clip import caption_of, encode, told_apart
from sd_erase.concepts import common_nouns
from sd_erase.erasure import names, pseudo_words
from sd_erase.erasure.method import Batch, Stateless, paper_terms
from sd_erase.erasure.rephrase import rephrased
from sd_erase.erasure.wordings import varied
from sd_erase.erasure.words import Words, other_words

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
    words: tuple[tuple[int, int], ...]  # characters of `caption`: the spans without an article that had to change


_ARTICLE = re.compile(r"(?<![^\W_])(an?|the)([\s_]+)$", re.IGNORECASE)


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
                start, word = article.start(), f"{fitting}{'_' if '_' in article[2] else ' '}{anchor}"
        pieces += [caption[end:start], word]
        length += start - end
        own_spans.append((start, stop))
        target_spans.append((length, length + len(word)))
        length += len(word)
        end = stop
    return Redirect(caption, "".join([*pieces, caption[end:]]), tuple(own_spans), tuple(target_spans), tuple(spans))


def anchored(prompt: str, concepts: Sequence[Concept], anchors: dict[str, str]) -> str:
    """`prompt` with each concept's words replaced by its anchor."""
    for concept in concepts:
        prompt = redirect(prompt, [(match.start, match.end) for match in concept.find(prompt)], anchors[concept.name]).target
    return prompt


_OFFSETS: weakref.WeakKeyDictionary[Any, dict[str, list[tuple[int, int]]]] = weakref.WeakKeyDictionary()  # by tokenizer and text
MOST_OFFSETS = 50_000  # texts that are remembered


def offsets(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """The characters of each token of each text, without begin- and end-of-text; one call for all that were not asked for before."""
    known = _OFFSETS.setdefault(tokenizer, {})
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    if missing and len(known) > MOST_OFFSETS:
        known.clear()
        missing = list(dict.fromkeys(texts))
    if missing:
        found = tokenizer(missing, truncation=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        known.update((text, places[1:-1]) for text, places in zip(missing, found, strict=True))
    return [known[text] for text in texts]


def span_tokens(tokenizer: Any, text: str, spans: tuple[tuple[int, int], ...], positions: int) -> list[list[int]]:
    """The token positions below `positions` that each span of characters covers; position 0 is begin-of-text."""
    (places,) = offsets(tokenizer, [text])
    return [
        [
            position
            for position, (start, stop) in enumerate(places, start=1)
            if start < right and stop > left and position < positions
        ]
        for left, right in spans
    ]


def alignment(tokenizer: Any, pair: Redirect, positions: int) -> list[int]:
    """For each position of the caption's tokens, the position of the target's tokens that it shall equal.

    Words outside the spans map to themselves; a span's tokens map to the anchor's, the last one repeated where the anchor
    is shorter; with an empty anchor they map to the token before. Padding maps to padding.
    """
    groups = span_tokens(tokenizer, pair.caption, pair.spans, positions)
    target_groups = span_tokens(tokenizer, pair.target, pair.target_spans, positions)
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


def alignments(tokenizer: Any, pairs: Sequence[Redirect], positions: int) -> list[list[int]]:
    """`alignment` of each pair; their texts are tokenised in one call."""
    offsets(tokenizer, [text for pair in pairs for text in (pair.caption, pair.target)])
    return [alignment(tokenizer, pair, positions) for pair in pairs]


TEMPLATES = ("{}", "{} and {}", "a {}", "the {}", "some {} here")  # the concept alone, twice, first and last
PSEUDO_SHARE = 0.3  # of the forget captions in which a pseudo-word stands for the concept's own
FULL_LENGTH_SHARE = 0.6  # of the training steps that look at all 77 positions; the others end shortly behind the captions


class StableDiffusionErasure(Stateless):
    """The default without its adversary. Vision tower, projection and temperature stay frozen; only linear weights train."""

    needs_images = False  # the paper's terms join in where the CLIP partner is at hand
    only_matrices = True
    asks_names = True  # of the base: what it reads as the concept
    # shares of the forget and retain captions that are brought into a form that no data set has (`wordings`), and of retain captions that are
    # the concept's templates with other words
    varied_forget, varied_retain, template_retain = 0.0, 0.5, 0.15
    solves = False
    default_steps = 300
    default_learning_rate = 4e-3
    default_weights = {
        "forgetting": 0.1, "retention": 0.1, "consistency": 0.1, "redirect": 10.0, "preserve": 30.0, "protect": 6.0, "empty": 6.0
    }  # fmt: skip

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Train the weights of attention and MLP, which a LoRA can carry."""
        import torch

        if both_towers:
            from sd_erase.errors import UserError

            raise UserError("Objective sd trains the text tower only: pass --towers text, or --objective paper.")
        self.names = {
            concept.name: names.find(towers, concept, anchors[concept.name], cheap=self.solves) if self.asks_names else names.NONE
            for concept in concepts
        }
        concepts = [names.named(concept, self.names[concept.name]) for concept in concepts]
        self.concepts = {concept.name: concept for concept in concepts}
        self.anchors = anchors
        self.words = {name: Words.of(found, self.concepts[name]) for name, found in self.names.items()}
        self.others: list[str] = []
        self.nouns: list[str] = []  # words for other things, which only captions of other forms hold
        if self.varied_forget or self.varied_retain or self.template_retain:
            self.others = other_words(towers, concepts, self.words.values())
            nouns = [noun for noun in common_nouns() if not any(any(concept.scan(noun)) for concept in concepts)]
            self.nouns = told_apart(towers, nouns, concepts)
        self.pseudo_words: dict[str, torch.Tensor] = {}  # found when a training batch first wants some
        captions = [
            caption_of(phrase, concept.kind)
            for concept in concepts
            for phrase in (*told_apart(towers, _kept(concept), concepts), *filter(None, [anchors[concept.name]]))
        ]
        self.protected = list(dict.fromkeys(captions))
        trained = [module.weight for module in towers.text.modules() if isinstance(module, torch.nn.Linear)]
        for weight in trained:
            weight.requires_grad_(True)
        return trained

    def augmented(
        self,
        caption: str,
        spans: tuple[tuple[int, int], ...],
        concept: Concept,
        rng: random.Random,
        *,
        held_out: bool = False,
    ) -> Redirect:
        """A forget caption with other words of the concept, in capitals, misspelt, in a template or another form, and its target.

        Args:
            held_out: whether the words that are kept out of training stand among them.
        """
        roll = rng.random()
        if roll < 0.3:
            word = self.words[concept.name].choose(rng, held_out)
            caption, spans = fill(rng.choice((*concept.templates, *TEMPLATES)), word)
        elif roll < 0.6:
            template = "{}".join(
                caption[start:stop].replace("{", "").replace("}", "")
                for start, stop in zip(
                    (0, *(stop for _, stop in spans)), (*(start for start, _ in spans), len(caption)), strict=True
                )
            )
            caption, spans = fill(template, self.words[concept.name].choose(rng, held_out))
        caption, spans = rephrased(caption, spans, rng)
        if rng.random() < self.varied_forget:
            caption, spans = varied(caption, spans, self.others, rng)
        if rng.random() < 0.1:
            caption = caption.upper()
        return redirect(caption, list(spans), self.anchors[concept.name])

    def retained(self, caption: str, rng: random.Random) -> str:
        """A retain caption in another form, or a noun or any other word in a template of the forget captions."""
        if rng.random() < self.template_retain:
            templates = (*rng.choice(list(self.concepts.values())).templates, *TEMPLATES)
            words = [group for group in (self.nouns, self.others) if group]
            caption = fill(rng.choice(templates), rng.choice(rng.choice(words)))[0] if words else caption
        caption, _ = rephrased(caption, (), rng)
        return varied(caption, (), self.others, rng)[0] if rng.random() < self.varied_retain else caption

    def _pseudo_word(self, towers: Towers, name: str, rng: random.Random) -> torch.Tensor:
        """One of the input embeddings that the frozen encoder reads as the concept, in plain captions of its listed words."""
        if name not in self.pseudo_words:
            concept = self.concepts[name]
            filled = [fill(template, phrase) for template in concept.templates for phrase in concept.phrases]
            captions = [caption for caption, _ in filled]
            spans = [span_tokens(towers.tokenizer, caption, places, 77)[0] for caption, places in filled]
            self.pseudo_words[name] = pseudo_words.find(towers, captions, spans, seed=0)
        pool = self.pseudo_words[name]
        return pool[rng.randrange(len(pool))]

    def _pseudo_words_in(
        self, towers: Towers, moved: list[Redirect], positions: int, batch: Batch
    ) -> AbstractContextManager[None]:
        """Put pseudo-words in the place of the concept's words in some of the first captions of a training batch."""
        import torch

        rows, places, values = [], [], []
        if batch.split == "train" and PSEUDO_SHARE:
            for row, (item, pair) in enumerate(zip(moved, batch.forget, strict=True)):
                if batch.random.random() < PSEUDO_SHARE:
                    word = self._pseudo_word(towers, str(pair.concept), batch.random)
                    for group in span_tokens(towers.tokenizer, item.caption, item.words, positions):
                        for order, position in enumerate(group):
                            rows.append(row)
                            places.append(position)
                            values.append(word[min(order, len(word) - 1)])
        return pseudo_words.replaced(towers.text, rows, places, torch.stack(values) if values else None)

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """The hidden-state terms, and the paper's three where images are at hand.

        ``redirect``: forget captions against the anchor's; ``preserve``: retain captions; ``protect``: spared senses,
        neighbours and anchors; ``empty``: the empty prompt, which guidance subtracts from every image. Where the denoiser reads
        the pooled state too (SDXL), its projection counts as one more layer.
        """
        import torch

        from sd_erase.erasure.losses import relative_error, spread

        rng, layers = batch.random, towers.layers
        held_out = batch.split == "validation"
        moved = [
            self.augmented(pair.caption, pair.spans, self.concepts[pair.concept or ""], rng, held_out=held_out)
            for pair in batch.forget
        ]
        groups = {
            "preserve": [self.retained(pair.caption, rng) for pair in batch.retain],
            "protect": rng.sample(self.protected, min(8, len(self.protected))),
            "empty": [""],
        }
        kept = [caption for group in groups.values() for caption in group]
        ids = towers.tokens([*(item.caption for item in moved), *kept])
        target_ids = towers.tokens([item.target for item in moved])
        if batch.split == "train" and rng.random() > FULL_LENGTH_SHARE:
            end = towers.end_of(ids)
            ids, target_ids = ids[:, :end], target_ids[:, :end]
        index = torch.tensor(alignments(towers.tokenizer, moved, ids.shape[1]), device=ids.device)
        with torch.no_grad():  # the targets and what is kept in one pass
            wanted, wanted_pooled = encode(towers.frozen_text, torch.cat([target_ids, ids[len(moved) :]]), layers)
        with self._pseudo_words_in(towers, moved, ids.shape[1], batch):
            states, pooled = encode(towers.text, ids, layers)

        count = len(moved)
        wanted = [torch.cat([want[:count].gather(1, index[..., None].expand_as(want[:count])), want[count:]]) for want in wanted]
        original_pooled = wanted_pooled[count:]
        if towers.projection is not None:  # one position of another width, all captions of the batch its spread
            wanted_pooled, own_pooled = (towers.projection(each)[:, None] for each in (wanted_pooled, pooled))
            pooled_spread = spread(wanted_pooled)
        terms, first = {}, 0
        for name, size in {"redirect": len(moved), **{name: len(group) for name, group in groups.items()}}.items():
            rows = slice(first, first + size)
            if size:
                errors = [relative_error(state[rows], want[rows]) for state, want in zip(states, wanted, strict=True)]
                if towers.projection is not None:
                    errors.append(relative_error(own_pooled[rows], wanted_pooled[rows], pooled_spread))
                terms[name] = torch.stack(errors).mean()
            first += size
        if batch.forget_images is not None:
            retained = slice(len(moved), len(moved) + len(batch.retain))
            terms |= paper_terms(towers, batch, pooled[: len(moved)], pooled[retained], original_pooled[: len(batch.retain)])
        return terms


def fill(template: str, word: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """`template` with `word` at every ``{}``, and where it then stands."""
    pieces = template.split("{}")
    caption, places = pieces[0], []
    for piece in pieces[1:]:
        places.append((len(caption), len(caption) + len(word)))
        caption += word + piece
    return caption, tuple(places)


def _kept(concept: Concept) -> list[str]:
    """The spared phrases and neighbours of `concept` that are plain words."""
    return [*(phrase for phrase in concept.spared if re.fullmatch(r"[a-z' ]+", phrase)), *concept.neighbours]
