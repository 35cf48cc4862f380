"""A whole prompt, searched by greedy coordinate gradient until the audited encoder reads it as the original reads the concept's prompt.

MMA-Diffusion's attack by text (Yang et al. 2024, arXiv:2311.17516): no word of the concept's own may be used; the gradient with respect to
the tokens proposes exchanges, and of those tried the one is kept whose end-of-text state has the largest cosine with the target's.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from sd_erase.auditing.bench import Bench
from sd_erase.auditing.probe import Probe, Row
from sd_erase.auditing.prompts_found import TOKENS, counted, padded, starts, typed
from sd_erase.clip import encode
from sd_erase.erasure.pseudo_words import embedding

if TYPE_CHECKING:
    import torch

STEPS, CANDIDATES, TOP = 60, 48, 64  # the paper's: 1,000 steps, 512 candidates, the best 256 tokens of each place


def whole_prompt(bench: Bench) -> list[Row]:
    """The search on the audited encoder and, as the control, on the original's."""
    import torch

    bench.one_encoder()
    texts = bench.sentences(bench.share.searched)
    with torch.no_grad():
        targets = encode(bench.original.text_encoder, bench.towers.tokens(texts), (-1,))[1]
    steps = max(1, round(STEPS * bench.share.effort))
    found = {}
    for side in ("erased", "original"):
        text = bench.pipeline(side).text_encoder
        rows = []
        with bench.named(f"gradient, {side}")("", len(texts) * steps) as task:
            for number, target in enumerate(targets):
                rows.append(_searched(bench, text, target, steps, number))
                task.advance(steps)
        found[side] = typed(bench, rows)
    return [counted(bench, "gradient", f"{TOKENS} words, {steps} steps of {CANDIDATES}", found["erased"], found["original"])]


def _searched(bench: Bench, text: Any, target: torch.Tensor, steps: int, number: int) -> list[int]:
    """The tokens whose pooled state comes nearest to `target` [width]."""
    import torch

    rng = random.Random(f"{bench.settings.seed} gradient {number}")
    (best,) = starts(bench, 1, f"gradient {number}")
    words = torch.tensor(bench.tokens, device=target.device)
    table = embedding(text).weight.detach()[words]

    def pooled(rows: list[list[int]]) -> torch.Tensor:
        return encode(text, torch.tensor(padded(bench, rows), device=target.device), (-1,))[1]

    def cosines(rows: list[list[int]]) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(pooled(rows), target[None])

    with torch.no_grad():
        value = float(cosines([best]))
    for _ in range(steps):
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        handle = embedding(text).register_forward_hook(keep)
        try:
            with torch.enable_grad():
                loss = -cosines([best]).sum()
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(loss, kept)
        nearest = (
            (gradient[0, 1 : 1 + TOKENS] @ table.T).topk(min(TOP, len(words)), largest=False).indices.tolist()
        )  # [TOKENS, TOP]
        tried = []
        for _ in range(CANDIDATES):
            place = rng.randrange(TOKENS)
            tried.append([*best[:place], bench.tokens[rng.choice(nearest[place])], *best[place + 1 :]])
        with torch.no_grad():
            values = cosines(tried)
        if float(values.max()) > value:
            best, value = tried[int(values.argmax())], float(values.max())
    return best


GRADIENT = Probe(
    "gradient",
    "attack",
    "a whole prompt without its words, searched on the audited encoder",
    whole_prompt,
    "MMA-Diffusion, Yang et al. 2024, arXiv:2311.17516",
    {"words": TOKENS, "steps": f"{STEPS} (the paper's 1,000)", "candidates": f"{CANDIDATES} (512)"},
)
