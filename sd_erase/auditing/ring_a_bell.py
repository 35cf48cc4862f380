"""A concept vector added to a harmless prompt's states, and a genetic search for words that come near: Ring-A-Bell.

Tsai et al. 2024 (arXiv:2310.10012): the vector is the mean difference of the text encoder's states between prompts with and without the
concept; the target is the harmless prompt's states plus a multiple of it; tokens are evolved towards the target. The attacker needs the
public text encoder alone, so that the words are found on the original and then tried on the audited model.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sd_erase.auditing.bench import Bench
from sd_erase.auditing.probe import Probe, Row
from sd_erase.auditing.prompts_found import TOKENS, counted, padded, starts, typed
from sd_erase.clip import encode

if TYPE_CHECKING:
    import torch

STRENGTH = 3.0  # multiple of the concept vector (the paper's eta; 3 for nudity)
POPULATION, GENERATIONS = 64, 120  # the paper's: 200, 3,000
CROSSOVER, MUTATION = 0.5, 0.25  # the paper's
PAIRS = 24  # of prompts, from which the vector is averaged


def ring_a_bell(bench: Bench) -> list[Row]:
    """Words evolved towards the anchor's caption plus the concept vector."""
    import torch

    bench.one_encoder()
    texts = list(dict.fromkeys(bench.sentences(PAIRS)))
    length = TOKENS + 5
    with torch.no_grad():
        states = [_states(bench, bench.towers.tokens(part)[:, :length]) for part in (texts, bench.anchored(texts))]
    vector = (states[0] - states[1]).mean(0)
    targets = states[1][: bench.share.searched] + STRENGTH * vector
    generations = max(1, round(GENERATIONS * bench.share.effort))
    found = []
    with bench.named("ring-a-bell, words")("", len(targets) * generations) as task:
        for number, target in enumerate(targets):
            found.append(_evolved(bench, target, generations, number))
            task.advance(generations)
    words = typed(bench, found)
    return [counted(bench, "ring-a-bell", f"{TOKENS} words, {generations} generations of {POPULATION}", words, words)]


def _states(bench: Bench, ids: torch.Tensor) -> torch.Tensor:
    """The original's last hidden states [rows, positions, width]."""
    return encode(bench.original.text_encoder, ids, (-1,))[0][0]


def _evolved(bench: Bench, target: torch.Tensor, generations: int, number: int) -> list[int]:
    """The tokens whose states come nearest to `target` [positions, width] of all generations."""
    import torch

    rng = random.Random(f"{bench.settings.seed} ring-a-bell {number}")
    people = starts(bench, POPULATION, f"ring-a-bell {number}")
    for generation in range(generations + 1):
        with torch.no_grad():
            ids = torch.tensor(padded(bench, people), device=target.device)
            losses = (_states(bench, ids) - target).square().mean((1, 2)).tolist()
        ranked = [person for _, person in sorted(zip(losses, people, strict=True), key=lambda pair: pair[0])]
        if generation == generations:
            break
        elite = ranked[: POPULATION // 2]
        children: list[list[int]] = []
        while len(elite) + len(children) < POPULATION:
            one, other = rng.choice(elite), rng.choice(elite)
            cut = rng.randrange(1, TOKENS) if rng.random() < CROSSOVER else TOKENS
            child = one[:cut] + other[cut:]
            if rng.random() < MUTATION or child in elite:
                child[rng.randrange(TOKENS)] = rng.choice(bench.tokens)
            children.append(child)
        people = elite + children
    return ranked[0]


RING_A_BELL = Probe(
    "ring-a-bell",
    "attack",
    "words evolved towards a concept vector, on the original's encoder alone",
    ring_a_bell,
    "Ring-A-Bell, Tsai et al. 2024, arXiv:2310.10012",
    {"words": TOKENS, "eta": STRENGTH, "population": f"{POPULATION} (the paper's 200)", "generations": f"{GENERATIONS} (3,000)"},
)
