"""``--robust``: the objective `sd` with an adversary that looks for other ways to say the concept, and training against them.

Two kinds of attack are kept in pools and go on from step to step, each towards the states that the frozen encoder gives
the concept (min over attack of the distance to them), while training redirects what they find (min over weights):

* pseudo-words: free input embeddings in the place of the concept's words (projected gradient descent, Madry et al. 2018,
  arXiv:1706.06083), which stand for the synonyms, compounds and learned embeddings that nobody listed;
* prefixes: real tokens before the caption, exchanged one at a time by the embedding's gradient (HotFlip, Ebrahimi et al. 2018,
  arXiv:1712.06751), as attacks on prompts do (UnlearnDiffAtk, Zhang et al. 2024, arXiv:2310.11868).

The attacks look at the text encoder alone, unlike AdvUnlearn (Zhang et al. 2024, arXiv:2405.15234), which needs the denoiser in the
loop and hours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sd_erase.erasure.sd import Redirect, StableDiffusionErasure, alignment, span_tokens

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.erasure.method import Batch

POOL = 48  # attacks of each kind that are kept
ATTACKED = 8  # captions a step and kind
PREFIX_TOKENS = 3
PSEUDO_TOKENS = 3  # at most, in place of a concept's words
ATTACK_STEPS = 3  # of gradient, each training step
STEP_SIZE = 0.15  # of a pseudo-word, relative to the root mean square of the token embeddings
RADIUS = 2.0  # of a pseudo-word, relative to the largest norm of a token embedding
SUCCESS = 0.3  # of the way back to the concept's states (as squared errors) from which an attack is trained against
RESTART = 0.02  # share of the attacks that begin anew


class RobustErasure(StableDiffusionErasure):
    """The term ``adversarial`` beside those of `StableDiffusionErasure`."""

    default_weights = StableDiffusionErasure.default_weights | {"adversarial": 5.0}

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """Fill the pools: pseudo-words from the concept's words and from random tokens, prefixes from random tokens."""
        import random

        import torch

        trained = super().prepare(towers, concepts, anchors, both_towers)
        self.vocabulary = _words(towers).to(towers.text.device)
        self.table = _embedding(towers.text).weight.detach()
        rng = random.Random("attacks")
        self.pseudo_words = torch.stack([self._fresh(towers, concepts, rng) for _ in range(POOL)])
        self.prefixes = torch.stack([self._random_words(PREFIX_TOKENS, rng) for _ in range(POOL)])
        return trained

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs beside the weights."""
        return {"pseudo_words": self.pseudo_words, "prefixes": self.prefixes}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self.pseudo_words = state["pseudo_words"].to(self.pseudo_words)
        self.prefixes = state["prefixes"].to(self.prefixes)

    def _random_words(self, count: int, rng: random.Random) -> torch.Tensor:
        return self.vocabulary[[rng.randrange(len(self.vocabulary)) for _ in range(count)]]

    def _fresh(self, towers: Towers, concepts: Sequence[Concept], rng: random.Random) -> torch.Tensor:
        """A new pseudo-word [PSEUDO_TOKENS, width]: a word of a concept, moved by noise of about its own size."""
        import torch

        own = towers.tokenizer(rng.choice(rng.choice(concepts).phrases), add_special_tokens=False).input_ids
        values = self.table[(own * PSEUDO_TOKENS)[:PSEUDO_TOKENS]]
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(values)
        return values + noise * values.square().mean().sqrt() * rng.choice((0.5, 1.0, 1.5))

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms of `sd`, and ``adversarial``: the redirect of what the attacks found."""
        terms = super().losses(towers, batch)
        pairs = [self.augmented(pair.caption, pair.spans, self.concepts[pair.concept], batch.random) for pair in batch.forget]
        terms["adversarial"] = self._adversarial(towers, pairs[: 2 * ATTACKED], batch)
        return terms

    def _adversarial(self, towers: Towers, pairs: list[Redirect], batch: Batch) -> torch.Tensor:
        """Attack the pairs, half of them by pseudo-words and half by prefixes, and return their redirect error.

        A validation batch attacks in the same way but leaves the pools as they are.
        """
        import torch

        from sd_erase.clip import encode

        half = (len(pairs) + 1) // 2
        chosen = [torch.tensor(batch.random.sample(range(POOL), len(part))) for part in (pairs[:half], pairs[half:])]
        # a neutral prefix keeps the place of the attack, in the reference and in the target
        filler = " ".join([next(iter(self.anchors.values())) or "thing"] * PREFIX_TOKENS)
        filler = towers.tokenizer.decode(towers.tokenizer(filler, add_special_tokens=False).input_ids[-PREFIX_TOKENS:])
        prefixed = [_with_prefix(pair, filler) for pair in pairs[half:]]
        pairs = [*pairs[:half], *prefixed]
        ids, target_ids = towers.tokens([pair.caption for pair in pairs]), towers.tokens([pair.target for pair in pairs])
        end = min(ids.shape[1], max(towers.end_of(ids), towers.end_of(target_ids)))
        ids, target_ids = ids[:, :end], target_ids[:, :end]
        index = torch.tensor([alignment(towers.tokenizer, pair, end) for pair in pairs], device=ids.device)
        with torch.no_grad():
            concept, _ = encode(towers.frozen_text, ids, towers.layers)
            targets, _ = encode(towers.frozen_text, target_ids, towers.layers)
        wanted = [target.gather(1, index[..., None].expand_as(target)) for target in targets]

        rows, places, parts = [], [], []  # where the attacks stand, and which of their tokens stands there
        for row, pair in enumerate(pairs):
            groups = span_tokens(towers.tokenizer, pair.caption, pair.spans, end)
            spots = [(spot, min(order, PSEUDO_TOKENS - 1)) for group in groups for order, spot in enumerate(group)]
            if row >= half:
                spots = [(1 + order, order) for order in range(PREFIX_TOKENS)]
            rows += [row] * len(spots)
            places += [place for place, _ in spots]
            parts += [part for _, part in spots]
        where = (torch.tensor(rows), torch.tensor(places))
        attack = torch.cat([self.pseudo_words[chosen[0]], self.table[self.prefixes[chosen[1]]]]).clone()
        tokens = self.prefixes[chosen[1]].clone()

        def states(attack: torch.Tensor) -> list[torch.Tensor]:
            with replaced(towers.text, where, attack[rows, parts]):
                return encode(towers.text, ids, towers.layers)[0]

        spreads = [target.sub(target.mean((0, 1))).square().mean() for target in targets]

        def distances(found: list[torch.Tensor], to: list[torch.Tensor]) -> torch.Tensor:
            """Of each caption, the squared error over the variance of the targets (as `relative_error`, but one by one)."""
            parts = zip(found, to, spreads, strict=True)
            return torch.stack([(one - other).square().mean((1, 2)) / spread for one, other, spread in parts]).mean(0)

        for _ in range(ATTACK_STEPS):
            attack.requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(distances(states(attack), concept).sum(), attack)
            attack = attack.detach()
            attack[:half] = self._descended(attack[:half], gradient[:half])
            tokens = self._swapped(tokens, attack[half:], gradient[half:], batch)
            attack[half:] = self.table[tokens]
        if batch.split == "train":
            self.pseudo_words[chosen[0]] = attack[:half]
            self.prefixes[chosen[1]] = tokens
            for number in range(POOL):
                if batch.random.random() < RESTART:
                    self.pseudo_words[number] = self._fresh(towers, list(self.concepts.values()), batch.random)
        found = states(attack)
        errors = distances(found, wanted)
        # an attack that does not bring the concept back is no reason to move anything: it may be another word
        succeeds = errors > SUCCESS / (1 - SUCCESS) * distances(found, concept)
        return (errors * succeeds.detach()).mean()

    def _descended(self, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """One step of pseudo-words against the gradient, at most `RADIUS` from the origin."""
        size = gradient.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        values = values - STEP_SIZE * self.table.square().mean().sqrt() * gradient / size
        limit = RADIUS * self.table.norm(dim=-1).max()
        return values * (limit / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)

    def _swapped(self, tokens: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor, batch: Batch) -> torch.Tensor:
        """In each prefix one token exchanged for the one that the gradient holds best (a random one of the best four)."""
        import torch

        tokens = tokens.clone()
        for row in range(len(tokens)):
            place = batch.random.randrange(PREFIX_TOKENS)
            gain = -(self.table[self.vocabulary] - values[row, place]) @ gradient[row, place]
            best = torch.topk(gain, min(4, len(gain))).indices
            tokens[row, place] = self.vocabulary[best[batch.random.randrange(len(best))]]
        return tokens


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
    )


def _embedding(text: Any) -> Any:
    return getattr(text, "text_model", text).embeddings.token_embedding


def _words(towers: Towers) -> torch.Tensor:
    """Ids of the tokens that are whole words of letters, one of each embedding vector."""
    import torch

    table, seen, ids = _embedding(towers.frozen_text).weight, set(), []
    for token, number in sorted(towers.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token.endswith("</w>") and token[:-4].isalpha() and token.isascii():
            vector = table[number].detach().cpu().numpy().tobytes()
            if vector not in seen:
                seen.add(vector)
                ids.append(number)
    return torch.tensor(ids)


@contextmanager
def replaced(text: Any, where: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> Iterator[None]:
    """Give the text encoder other input embeddings for a while.

    Args:
        text: a CLIPTextModel.
        where: rows and positions, [places] each.
        values: the embeddings there, [places, width]; gradients flow to them.
    """

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_put(tuple(part.to(output.device) for part in where), values.to(output.dtype))

    handle = _embedding(text).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
