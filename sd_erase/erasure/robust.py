"""``--robust``, the default: the objective `sd` with an adversary that looks for ways to say the concept still.

Two kinds of attack are kept in pools and go on from step to step, each towards the states that the frozen encoder gives the
concept (min over the attack of the distance to them), while training redirects what they find (min over the weights):

* perturbed pseudo-words: input embeddings that the frozen encoder reads as the concept (`pseudo_words`), moved by projected
  gradient descent (Madry et al. 2018, arXiv:1706.06083) within a ball, in the place of the concept's words;
* prefixes: real tokens before the caption, exchanged one at a time by the embedding's gradient (HotFlip, Ebrahimi et al. 2018,
  arXiv:1712.06751), as attacks on prompts do (UnlearnDiffAtk, Zhang et al. 2024, arXiv:2310.11868). An exchange stays where it brings
  the caption further: to first order alone, exchanges wander no better than at random. Half of the prefixes are no result of a search but random:
  where the concept is named, random words before the caption shall say nothing. A denoiser draws a concept from strange words that name
  nothing too (of the words that a search found without the random ones, most drew the chair in the original, with the anchor in its place).

The attacks look at the text encoder alone, unlike AdvUnlearn (Zhang et al. 2024, arXiv:2405.15234), which needs the denoiser in the
loop and hours.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sd_erase.clip import encode
from sd_erase.erasure.pseudo_words import TOKENS, embedding, replaced, vocabulary
from sd_erase.erasure.sd import Redirect, StableDiffusionErasure, alignments, span_tokens

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.erasure.method import Batch

PREFIXES = 48  # that are kept
PREFIX_TOKENS = TOKENS  # so that both kinds make one tensor
ATTACKED = 8  # captions a step and kind
RANDOM = 4  # of these, whose prefix is random: in the pool it takes the place of a searched one, which begins anew
ATTACK_STEPS = 4  # of gradient, each training step
STEP_SIZE = 0.15  # of a perturbation, relative to the root mean square of the token embeddings
RADIUS = 0.75  # of a perturbation, likewise (root mean square over an embedding's numbers)
BEST = 4  # tokens that the gradient holds best, of which one is taken
SUCCESS = 0.4  # of the way back to the concept's states from which a perturbation is trained against
SPARED = 0.3  # of that way, which words before a caption may say: all words go some of it


class RobustErasure(StableDiffusionErasure):
    """The term ``adversarial`` beside those of `StableDiffusionErasure`."""

    default_steps = 450
    default_weights = StableDiffusionErasure.default_weights | {"adversarial": 5.0}

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Begin with random prefixes and unmoved pseudo-words."""
        import random

        import torch

        trained = super().prepare(towers, concepts, anchors, both_towers)
        self.table = embedding(towers.text).weight.detach()
        self.vocabulary = torch.tensor(vocabulary(towers.tokenizer, self.table), device=self.table.device)
        self.scale = self.table[self.vocabulary].square().mean().sqrt()
        anchor = next((anchor for anchor in anchors.values() if anchor), "thing")
        self.neutral = towers.tokenizer.decode(towers.tokenizer(anchor, add_special_tokens=False).input_ids[-1:]).strip()
        self.prefixes = self._random_prefixes(PREFIXES, random.Random("prefixes"))
        self.moves: dict[str, torch.Tensor] = {}  # concept -> the perturbation of each of its pseudo-words
        return trained

    def _random_prefixes(self, count: int, rng: random.Random) -> torch.Tensor:
        """Tokens [count, PREFIX_TOKENS] of the vocabulary."""
        import torch

        numbers = [[rng.randrange(len(self.vocabulary)) for _ in range(PREFIX_TOKENS)] for _ in range(count)]
        return self.vocabulary[torch.tensor(numbers, device=self.vocabulary.device)]

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs beside the weights."""
        return {"prefixes": self.prefixes, **self.moves}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self.prefixes = state.pop("prefixes").to(self.prefixes)
        self.moves = {name: moves.to(self.table) for name, moves in state.items()}

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms of `sd`, and ``adversarial``: the redirect error where an attack brings the concept back."""
        return super().losses(towers, batch) | {"adversarial": self._adversarial(towers, batch)}

    def _adversarial(self, towers: Towers, batch: Batch) -> torch.Tensor:
        """Attack some forget captions by perturbed pseudo-words and others by prefixes.

        A validation batch is attacked in the same way, but what it finds is not kept.
        """
        import torch

        rng = batch.random
        chosen = [rng.choice(batch.forget) for _ in range(2 * ATTACKED)]
        pairs = [self.augmented(pair.caption, pair.spans, self.concepts[str(pair.concept)], rng) for pair in chosen]
        # words for nothing in particular keep a prefix's place, in what it shall reach and in what it is trained to give
        neutral = " ".join([self.neutral] * PREFIX_TOKENS)
        pairs[ATTACKED:] = [_with_prefix(pair, neutral) for pair in pairs[ATTACKED:]]
        captions = _Attacked(towers, pairs)

        starts, numbers = [], []
        for pair in chosen[:ATTACKED]:
            name = str(pair.concept)
            self._pseudo_word(towers, name, rng)  # finds them, the first time
            self.moves.setdefault(name, torch.zeros_like(self.pseudo_words[name]))
            numbers.append((name, rng.randrange(len(self.pseudo_words[name]))))
            starts.append(self.pseudo_words[name][numbers[-1][1]])
        start = torch.stack(starts)
        moves = torch.stack([self.moves[name][number] for name, number in numbers])
        kept = rng.sample(range(PREFIXES), ATTACKED)
        tokens = self.prefixes[kept].clone()

        moves, tokens = self._attacked(towers, captions, start, moves, tokens, rng)
        tokens[:RANDOM] = self._random_prefixes(RANDOM, rng)
        if batch.split == "train":
            self.prefixes[kept] = tokens
            for (name, number), move in zip(numbers, moves, strict=True):
                self.moves[name][number] = move
        values = torch.cat([start + moves, self.table[tokens]])
        wanted = captions.wanted_behind(values)
        found = captions.states(towers.text, values)
        with torch.no_grad():
            # a perturbation that does not bring the concept back may well be another word, and is no reason to move anything
            counts = captions.progress(found, wanted) > SUCCESS
            counts[ATTACKED:] = True  # what a prefix may say is in what is wanted
        return (captions.distances(found, wanted) * counts).mean()

    def _attacked(
        self,
        towers: Towers,
        captions: _Attacked,
        start: torch.Tensor,
        moves: torch.Tensor,
        tokens: torch.Tensor,
        rng: random.Random,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturbations and prefixes after `ATTACK_STEPS`; a prefix never says less of the concept than it did.

        Args:
            captions: what is attacked.
            start: pseudo-words [attacks, tokens, width].
            moves: their perturbations so far.
            tokens: prefixes [attacks, PREFIX_TOKENS].
            rng: chooses the exchanges.
        """
        import torch

        best, direction = tokens, torch.zeros_like(self.table[tokens])  # the gradient at the best
        reached = torch.full((len(tokens),), -torch.inf, device=tokens.device)  # its progress
        for _ in range(ATTACK_STEPS):
            with torch.enable_grad():
                values = torch.cat([start + moves, self.table[tokens]]).requires_grad_(True)
                found = captions.states(towers.text, values)
                progress = captions.progress(found, captions.wanted)[ATTACKED:]
                goal = captions.distances(found, captions.reached)[:ATTACKED].sum() - progress.sum()
                (gradient,) = torch.autograd.grad(goal, values)
            further = progress > reached
            best = torch.where(further[:, None], tokens, best)
            reached = torch.where(further, progress.detach(), reached)
            direction = torch.where(further[:, None, None], gradient[ATTACKED:], direction)
            moves = self._descended(moves, gradient[:ATTACKED])
            tokens = self._exchanged(best, direction, rng)
        with torch.no_grad():
            found = captions.states(towers.text, torch.cat([start + moves, self.table[tokens]]))
            further = captions.progress(found, captions.wanted)[ATTACKED:] > reached
        return moves, torch.where(further[:, None], tokens, best)

    def _descended(self, moves: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Perturbations [attacks, tokens, width] after a step against the gradient, within `RADIUS`."""

        def size(values: torch.Tensor) -> torch.Tensor:
            return values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

        moves = moves - STEP_SIZE * self.scale * gradient / size(gradient)
        return moves * (RADIUS * self.scale / size(moves)).clamp(max=1)

    def _exchanged(self, tokens: torch.Tensor, gradient: torch.Tensor, rng: random.Random) -> torch.Tensor:
        """Prefixes [attacks, tokens] with one token of each exchanged for one that the gradient holds good."""
        import torch

        tokens = tokens.clone()
        for row in range(len(tokens)):
            place = rng.randrange(PREFIX_TOKENS)
            gain = -self.table[self.vocabulary] @ gradient[row, place]
            best = torch.topk(gain, min(BEST, len(gain))).indices
            tokens[row, place] = self.vocabulary[best[rng.randrange(len(best))]]
        return tokens


class _Attacked:
    """Forget captions in which attacks put embeddings of their own: the concept's words in the first, prefixes in the last.

    Attributes:
        reached: what the frozen encoder says of each caption, hidden states [captions, positions, width] of each layer: the
            attacks' goal.
        wanted: the same of the captions that shall stand in their place, aligned.
    """

    def __init__(self, towers: Towers, pairs: list[Redirect]):
        """
        Args:
            towers: the student and its frozen copy.
            pairs: `ATTACKED` captions, and as many behind a prefix of `PREFIX_TOKENS` tokens.
        """
        import torch

        self.towers = towers
        ids, target_ids = towers.tokens([pair.caption for pair in pairs]), towers.tokens([pair.target for pair in pairs])
        end = max(towers.end_of(ids), towers.end_of(target_ids))
        self._ids, self._target_ids = ids[:, :end], target_ids[:, :end]
        self._index = torch.tensor(alignments(towers.tokenizer, pairs, end), device=ids.device)
        places = []  # row, position, and which token of the attack stands there
        for row, pair in enumerate(pairs):
            groups = (
                span_tokens(towers.tokenizer, pair.caption, pair.words, end) if row < ATTACKED else [range(1, PREFIX_TOKENS + 1)]
            )
            places += [(row, spot, min(order, PREFIX_TOKENS - 1)) for group in groups for order, spot in enumerate(group)]
        self._places = places
        with torch.no_grad():
            self.reached, _ = encode(towers.frozen_text, self._ids, towers.layers)
            targets, _ = encode(towers.frozen_text, self._target_ids, towers.layers)
        self.wanted = self._aligned(targets, 0)
        self._spreads = [target.sub(target.mean((0, 1))).square().mean() for target in targets]

    def _aligned(self, targets: list[torch.Tensor], first: int) -> list[torch.Tensor]:
        """The states of the targets from caption `first` on, where the captions' tokens have theirs."""
        return [target.gather(1, self._index[first:, :, None].expand_as(target)) for target in targets]

    def _put(self, text: Any, ids: torch.Tensor, values: torch.Tensor, first: int) -> list[torch.Tensor]:
        """States of `ids` with the attacks' embeddings in those of the captions from `first` on."""
        places = [place for place in self._places if place[0] >= first]
        rows, positions, parts = (list(part) for part in zip(*places, strict=True))
        with replaced(text, [row - first for row in rows], positions, values[rows, parts]):
            return encode(text, ids, self.towers.layers)[0]

    def states(self, text: Any, values: torch.Tensor) -> list[torch.Tensor]:
        """What `text` says of the captions under the attacks `values` [captions, PREFIX_TOKENS, width]."""
        return self._put(text, self._ids, values, 0)

    def _behind(self, values: torch.Tensor) -> list[torch.Tensor]:
        """What the frozen encoder says of the targets behind the prefixes `values`; pseudo-words' captions as they are wanted."""
        import torch

        beside = self._put(self.towers.frozen_text, self._target_ids[ATTACKED:], values, ATTACKED)
        both = zip(self.wanted, self._aligned(beside, ATTACKED), strict=True)
        return [torch.cat([want[:ATTACKED], one]) for want, one in both]

    def wanted_behind(self, values: torch.Tensor) -> list[torch.Tensor]:
        """`wanted`, but what a searched prefix says stays as it was, less what the original reads in it of the concept beyond `SPARED`.

        Nouns lie on each other's ways from "nothing in particular": of the way to "chair", "orange" alone goes nearly all. To take
        the prefix as a whole from what is wanted would teach that beside a dog there is no clock.
        """
        import torch

        with torch.no_grad():
            beside = self._behind(values)
            too_far = (self.progress(beside, self.wanted) - SPARED).clamp(min=0)[:, None, None]
            ways = zip(beside, self.reached, self.wanted, strict=True)
            found = [one - too_far * (goal - want) for one, goal, want in ways]
            for one, want in zip(found, self.wanted, strict=True):
                one[ATTACKED : ATTACKED + RANDOM] = want[ATTACKED : ATTACKED + RANDOM]
            return found

    def distances(self, found: list[torch.Tensor], to: list[torch.Tensor]) -> torch.Tensor:
        """[captions], the squared error over the variance of the targets (as `relative_error`, but one by one)."""
        import torch

        both = zip(found, to, self._spreads, strict=True)
        return torch.stack([(one - other).square().mean((1, 2)) / spread for one, other, spread in both]).mean(0)

    def progress(self, found: list[torch.Tensor], origin: list[torch.Tensor]) -> torch.Tensor:
        """[captions], how far `found` has come from `origin` along the way to the concept; what lies aside does not count."""
        import torch

        along, whole = [], []
        for one, start, goal, want, spread in zip(found, origin, self.reached, self.wanted, self._spreads, strict=True):
            way = goal - want
            along.append(((one - start) * way).mean((1, 2)) / spread)
            whole.append(way.square().mean((1, 2)) / spread)
        return torch.stack(along).sum(0) / torch.stack(whole).sum(0).clamp(min=1e-12)


def _with_prefix(pair: Redirect, prefix: str) -> Redirect:
    """`pair` behind `prefix`, in its caption and in its target."""
    shift = len(prefix) + 1

    def moved(spans: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple((start + shift, stop + shift) for start, stop in spans)

    return dataclasses.replace(
        pair,
        caption=f"{prefix} {pair.caption}",
        target=f"{prefix} {pair.target}",
        spans=moved(pair.spans),
        target_spans=moved(pair.target_spans),
        words=moved(pair.words),
    )
