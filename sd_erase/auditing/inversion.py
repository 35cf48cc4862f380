"""Textual inversion: one input embedding, found through the denoiser on images of the concept.

Gal et al. 2023 (arXiv:2208.01618): the embedding of one new word is trained on the denoising loss of a few images from the embedding of a
broader word; nothing else changes. The captions are the images' own prompts with that word in the concept's place: behind plain ones
("a photo of a ...") and at all levels of noise not even the control succeeded on the pocket model (0 of 12 images after 160 steps, so 8),
since those images show other things too. The control is the same on the original, from the same images.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sd_erase.auditing.bench import Batch, Bench
from sd_erase.auditing.embeds import images_of
from sd_erase.auditing.probe import Probe, Row
from sd_erase.clip import encode
from sd_erase.erasure.pseudo_words import embedding, replaced
from sd_erase.errors import UserError

if TYPE_CHECKING:
    import torch

STEPS = (20, 40, 160)
BATCH = 4  # noisy images a step
# of Adam, relative to the root mean square of the token embeddings (the paper's 5e-3 is a third of CLIP-L's .013). On the pocket model's control
# .3 brings the concept back after 40 steps, .1 after 80
RATE = 0.3
# shares of the diffusion's length; with more noise the loss tells where things stand, with less which colour they have (see `attacks.prefix`)
NOISE = (0.2, 0.8)


def inversion(bench: Bench) -> list[Row]:
    """One word, inverted on the audited model and on the original."""
    bench.one_encoder()
    steps = tuple(max(1, round(step * min(1.0, bench.share.effort))) for step in STEPS)
    count, word = bench.share.few, _placeholder(bench)
    texts = [bench.with_word(text, word) for text in bench.sentences(count)]
    found = {side: _inverted(bench, side, word, steps) for side in ("erased", "original")}
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


def _inverted(bench: Bench, side: str, word: str, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """The embedding [1, width] after each of `steps`."""
    import torch

    pipeline, scheduler = bench.pipeline(side), bench.pipeline(side).scheduler
    table = embedding(pipeline.text_encoder).weight.detach()
    device = table.device
    (*_, start) = bench.original.tokenizer(bench.subject.anchor or "thing", add_special_tokens=False, verbose=False).input_ids
    value = table[start : start + 1].clone().requires_grad_(True)
    scale = float(table[torch.tensor(bench.tokens, device=device)].square().mean().sqrt())
    optimizer = torch.optim.Adam([value], lr=RATE * scale)
    examples, kept = Examples(bench, lambda text: bench.with_word(text, word)), []
    with bench.named(f"inversion, {side}")("", max(steps)) as task:
        for step in range(1, max(steps) + 1):
            texts, noisy, times, target = examples.batch(scheduler)
            ids, rows, places = _ids(bench, texts, word)
            with torch.enable_grad(), replaced(pipeline.text_encoder, rows, places, value.expand(len(rows), -1)):
                states = encode(pipeline.text_encoder, ids, (-1,))[0][0]
                loss = (pipeline.unet(noisy, times, states).sample - target).square().mean()
            if not torch.isfinite(loss):
                raise UserError("The denoising loss is no number: pass --device cpu.")
            (value.grad,) = torch.autograd.grad(loss, [value])
            optimizer.step()
            task.advance()
            kept += [value.detach().clone() for wanted_step in steps if wanted_step == step]
    return kept


class Examples:
    """Noisy images of the concept with captions, a batch at a time.

    Args:
        bench: whose images are taken (`Bench.shown`).
        caption: an image's own prompt into the caption that it is learnt under.
    """

    def __init__(self, bench: Bench, caption: Callable[[str], str]):
        import torch

        self.captions, self.images = [caption(text) for text in bench.shown], torch.cat(list(bench.shown.values()))
        self.random, self.generator = random.Random(bench.settings.seed), torch.Generator().manual_seed(bench.settings.seed)

    def batch(self, scheduler: Any) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """`BATCH` captions, noisy latents, their timesteps, and what the denoiser is to predict."""
        import torch

        chosen = [self.random.randrange(len(self.images)) for _ in range(BATCH)]
        shown, length = self.images[chosen], scheduler.config.num_train_timesteps
        times = torch.tensor([int(length * self.random.uniform(*NOISE)) for _ in chosen], device=shown.device)
        noise = torch.randn(shown.shape, generator=self.generator).to(shown)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(shown, noise, times) if velocity else noise
        return [self.captions[number] for number in chosen], scheduler.add_noise(shown, noise, times), times, target


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
    {"steps": list(STEPS), "images a step": BATCH, "rate": RATE, "noise": list(NOISE)},
)
