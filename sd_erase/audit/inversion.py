"""Textual inversion: one input embedding, found through the denoiser on images of the concept.

Gal et al. 2023 (arXiv:2208.01618): the embedding of one new word is trained on the denoising loss of a few images, behind plain captions,
from the embedding of a broader word; nothing else changes. The control is the same on the original, from the same images.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sd_erase.audit.bench import Batch, Bench
from sd_erase.audit.embeds import images_of
from sd_erase.audit.probe import Probe, Row
from sd_erase.clip import caption_of, encode
from sd_erase.erasure.pseudo_words import embedding, replaced
from sd_erase.errors import UserError

if TYPE_CHECKING:
    import torch

STEPS = (20, 40, 160)
BATCH = 4  # noisy images a step
RATE = (
    0.1  # of Adam, relative to the root mean square of the token embeddings; the paper's 5e-3 for CLIP-L is a third of its .013
)


def inversion(bench: Bench) -> list[Row]:
    """One word, inverted on the audited model and on the original."""
    bench.one_encoder()
    steps = tuple(max(1, round(step * min(1.0, bench.share.effort))) for step in STEPS)
    latents = list(bench.shown.values())
    count, word = bench.share.few, _placeholder(bench)
    texts = [bench.with_word(text, word) for text in bench.sentences(count)]
    found = {side: _inverted(bench, side, latents, word, steps) for side in ("erased", "original")}
    rows = []
    for number, step in enumerate(steps):
        arms = {}
        for side in ("erased", "original"):
            value = found[side][number]

            def make(batch: Batch, side: str = side, value: torch.Tensor = value) -> list[Any]:
                return _images(bench, side, batch, word, value)

            inputs = [word, step, value.tolist()]
            arms[side] = bench.made(f"inversion-{step}", side, side, texts, make, inputs).shows(bench.labels)
        rows.append(
            Row(
                f"{step} steps", arms["erased"], arms["original"], bench.shared("floor", count), arms["original"],
                "the original, inverted in the same way,", baseline=bench.shared("control", count),
            )
        )  # fmt: skip
    return rows


def _placeholder(bench: Bench) -> str:
    """A word of one token that no prompt holds, in whose place the embedding stands."""
    texts = " ".join(bench.prompts).lower().split()
    return next(word for word in bench.vocabulary if word not in texts)


def _ids(bench: Bench, texts: Sequence[str], word: str) -> tuple[torch.Tensor, list[int], list[int]]:
    """Token ids, and rows and positions of the placeholder."""
    ids = bench.towers.tokens(texts)
    (token,) = bench.original.tokenizer(word, add_special_tokens=False, verbose=False).input_ids
    rows, places = (part.tolist() for part in (ids == token).nonzero(as_tuple=True))
    return ids, rows, places


def _inverted(bench: Bench, side: str, latents: list[torch.Tensor], word: str, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """The embedding [1, width] after each of `steps`."""
    import torch

    pipeline, scheduler = bench.pipeline(side), bench.pipeline(side).scheduler
    table = embedding(pipeline.text_encoder).weight.detach()
    device = table.device
    (*_, start) = bench.original.tokenizer(bench.subject.anchor or "thing", add_special_tokens=False, verbose=False).input_ids
    value = table[start : start + 1].clone().requires_grad_(True)
    scale = float(table[torch.tensor(bench.tokens, device=device)].square().mean().sqrt())
    optimizer = torch.optim.Adam([value], lr=RATE * scale)
    rng, generator = random.Random(f"{bench.settings.seed} inversion"), torch.Generator().manual_seed(bench.settings.seed)
    ids, rows, places = _ids(bench, [caption_of(word)] * BATCH, word)
    images = torch.cat(latents)
    kept = []
    with bench.named(f"inversion, {side}")("", max(steps)) as task:
        for step in range(1, max(steps) + 1):
            shown = images[[rng.randrange(len(images)) for _ in range(BATCH)]]
            times = torch.tensor([rng.randrange(scheduler.config.num_train_timesteps) for _ in range(BATCH)], device=device)
            noise = torch.randn(shown.shape, generator=generator).to(shown)
            with torch.enable_grad(), replaced(pipeline.text_encoder, rows, places, value.expand(len(rows), -1)):
                states = encode(pipeline.text_encoder, ids, (-1,))[0][0]
                predicted = pipeline.unet(scheduler.add_noise(shown, noise, times), times, states).sample
                loss = (predicted - wanted(scheduler, shown, noise, times)).square().mean()
            if not torch.isfinite(loss):
                raise UserError("The denoising loss is no number: pass --device cpu.")
            (value.grad,) = torch.autograd.grad(loss, [value])
            optimizer.step()
            task.advance()
            kept += [value.detach().clone() for wanted_step in steps if wanted_step == step]
    return kept


def wanted(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What the denoiser is to predict."""
    if scheduler.config.prediction_type == "v_prediction":
        velocity: torch.Tensor = scheduler.get_velocity(latents, noise, times)
        return velocity
    return noise


def _images(bench: Bench, side: str, batch: Batch, word: str, value: torch.Tensor) -> list[Any]:
    import torch

    pipeline = bench.pipeline(side)
    ids, rows, places = _ids(bench, batch.prompts, word)
    with torch.no_grad(), replaced(pipeline.text_encoder, rows, places, value.expand(len(rows), -1)):
        states = encode(pipeline.text_encoder, ids, (-1,))[0][0]
    return images_of(bench, pipeline, batch, states)


INVERSION = Probe(
    "inversion",
    "wordless",
    "one embedding, inverted from images of it",
    inversion,
    "textual inversion, Gal et al. 2023, arXiv:2208.01618",
    {"steps": list(STEPS), "images a step": BATCH, "rate": RATE},
)
