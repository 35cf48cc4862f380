"""Discrete prefix search: a few words before the prompt that bring an erased concept back.

The objective is the denoiser's own loss on images that do show the concept (UnlearnDiffAtk, Zhang et al. 2024,
arXiv:2310.11868); the gradient with respect to the prefix tokens' embeddings proposes swaps of one token, and the best of
those tried under the true loss is kept (greedy coordinate gradient, Zou et al. 2023, arXiv:2307.15043). All prompts are
searched side by side, so that the matrix products are large.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase.config import AttackConfig
from sd_erase.erasure.pseudo_words import vocabulary
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress, Progress

if TYPE_CHECKING:
    import torch

# Shares of the diffusion's length at which the denoiser is asked. On the pocket model with more noise (0.8 and above) the loss tells
# where objects stand rather than which they are, and words for the concept do not lower it; with less noise they do. Of 45 images
# of 15 prompts, 0.6 with 0.3 brought 29 back, 0.5 or 0.4 alone 22 and 21 at half the cost: suggestive, the intervals overlap.
NOISE_LEVELS = (0.6, 0.3)
TOP = 128  # swaps of a prefix that the gradient lets compete
BATCH_SIZE = 32  # noisy images at once


@dataclass(frozen=True)
class Attacked:
    """A prompt with the prefix that was found for it.

    Attributes:
        prompt: the prompt alone.
        prefix: the words before it.
        loss: denoising loss (mean squared error of the denoiser's prediction) behind the prefix.
        loss_before: the same without a prefix.
    """

    prompt: str
    prefix: str
    loss: float
    loss_before: float

    @property
    def text(self) -> str:
        """What is typed."""
        return f"{self.prefix} {self.prompt}"


def random_prefixes(pipeline: Any, prompts: Sequence[str], tokens: int, seed: int) -> list[str]:
    """As many random words for each prompt as the search would use: the floor that a search has to beat."""
    words = vocabulary(pipeline.tokenizer, pipeline.text_encoder.get_input_embeddings().weight)
    chosen = [random.Random(f"{seed} random {prompt}").choices(words, k=tokens) for prompt in prompts]
    return [pipeline.tokenizer.decode(prefix) for prefix in chosen]


def encode_images(pipeline: Any, images: Sequence[Any]) -> torch.Tensor:
    """Latents [images, channels, height, width] of PIL images of one size, scaled as the denoiser takes them."""
    import torch

    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(list(images)).to(pipeline.vae.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor


def search(
    pipeline: Any,
    prompts: Sequence[str],
    latents: torch.Tensor,
    settings: AttackConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Attacked]:
    """The prefix of each prompt behind which the denoiser best predicts images of the concept.

    A prompt's noises, first prefix and candidates depend on `seed` and the prompt alone, not on the prompts beside it.

    Args:
        pipeline: a StableDiffusionPipeline with the text encoder under attack, in float32.
        prompts: what is attacked.
        latents: [prompts, images, channels, height, width], images that show the concept, such as the original model's own
            of each prompt (see `encode_images`); each is looked at with every one of `NOISE_LEVELS`, under a noise of its own.
        settings: number of tokens, steps and candidates.
        seed: of noises, first prefixes and candidates.
        progress: told of each step.

    Raises:
        UserError: a prompt that is read otherwise behind other words.
    """
    settings, progress = settings or AttackConfig(), progress or NoProgress()
    denoiser = _Denoiser(pipeline, prompts, latents, seed)
    words = vocabulary(pipeline.tokenizer, denoiser.embeddings.weight)
    random_of = [random.Random(f"{seed} {prompt}") for prompt in prompts]
    everyone = range(len(prompts))
    best = [rng.choices(words, k=settings.tokens) for rng in random_of]
    loss = denoiser.losses(everyone, best)
    loss_before = denoiser.losses(everyone, [[] for _ in prompts])
    proposals: list[list[tuple[int, int]]] = [[] for _ in prompts]  # (place, token), not tried yet
    changed = set(everyone)
    with progress("prefix search", settings.steps) as task:
        for _ in range(settings.steps):
            numbers = sorted(changed)  # the gradient of a prefix that stayed is the same
            for number, swaps in zip(numbers, denoiser.swaps(numbers, [best[number] for number in numbers], words), strict=True):
                random_of[number].shuffle(swaps)
                proposals[number] = swaps
            tried = [(number, proposals[number].pop()) for number in everyone for _ in proposals[number][: settings.candidates]]
            prefixes = [[*best[number][:place], token, *best[number][place + 1 :]] for number, (place, token) in tried]
            numbers = [number for number, _ in tried]
            changed = set()
            for number, prefix, value in zip(numbers, prefixes, denoiser.losses(numbers, prefixes), strict=True):
                if value < loss[number]:
                    best[number], loss[number] = prefix, value
                    changed.add(number)
            task.advance()
    return [
        Attacked(prompt, _typed(pipeline.tokenizer, prefix, prompt), after, before)
        for prompt, prefix, after, before in zip(prompts, best, loss, loss_before, strict=True)
    ]


def _typed(tokenizer: Any, prefix: Sequence[int], prompt: str) -> str:
    """The prefix as text, which before the prompt is read as these tokens."""

    def read(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    text = tokenizer.decode(prefix)
    if read(f"{text} {prompt}") != [*prefix, *read(prompt)]:
        raise UserError(f"Prompt {prompt!r} is read otherwise behind the words {text!r}: leave it out.")
    return text


class _Denoiser:
    """What the denoiser loses on noisy images of each prompt, given a prefix."""

    def __init__(self, pipeline: Any, prompts: Sequence[str], latents: torch.Tensor, seed: int):
        import torch

        self.pipeline, self.tokenizer = pipeline, pipeline.tokenizer
        self.embeddings = pipeline.text_encoder.get_input_embeddings()
        self.ids = [self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
        scheduler = pipeline.scheduler
        levels = [int(level * scheduler.config.num_train_timesteps) for level in NOISE_LEVELS] * latents.shape[1]
        self.timesteps = torch.tensor(levels, device=latents.device)
        latents = latents.repeat_interleave(len(NOISE_LEVELS), 1)
        self.images = latents.shape[1]
        # always drawn on the CPU, so that all devices look at the same noise
        generators = [
            torch.Generator().manual_seed(random.Random(f"{seed} noise {prompt}").getrandbits(60)) for prompt in prompts
        ]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(latents)
        flat = latents.flatten(0, 1), noise.flatten(0, 1), self.timesteps.repeat(len(prompts))
        self.noisy = scheduler.add_noise(*flat).unflatten(0, latents.shape[:2])
        velocity = scheduler.config.prediction_type == "v_prediction"
        self.wanted = scheduler.get_velocity(*flat).unflatten(0, latents.shape[:2]) if velocity else noise

    def losses(self, numbers: Sequence[int], prefixes: Sequence[list[int]]) -> list[float]:
        """Mean squared error of the prediction for each prompt, given by number, behind the prefix beside it."""
        import torch

        with torch.no_grad():
            return [value for batch in self._batches(numbers, prefixes) for value in self._loss(*batch).tolist()]

    def swaps(self, numbers: Sequence[int], prefixes: Sequence[list[int]], words: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each prompt the `TOP` swaps (place in the prefix, new token) that by the gradient lower the loss most."""
        import torch

        found = []
        candidates = self.embeddings.weight[words].detach()
        for some, those in self._batches(numbers, prefixes):
            embedded: list[torch.Tensor] = []

            def keep(module: Any, arguments: Any, output: torch.Tensor, embedded: list[torch.Tensor] = embedded) -> torch.Tensor:
                embedded.append(output.detach().requires_grad_())
                return embedded[0]

            handle = self.embeddings.register_forward_hook(keep)
            try:
                with torch.enable_grad():
                    loss = self._loss(some, those).sum()
            finally:
                handle.remove()
            (gradient,) = torch.autograd.grad(loss, embedded)
            place = slice(1, 1 + len(those[0]))
            current = (gradient * embedded[0])[:, place].sum(-1, keepdim=True)
            change = gradient[:, place] @ candidates.T - current  # [prompts, places, words], to first order
            for row, prefix in zip(change.flatten(1).argsort(dim=1).tolist(), those, strict=True):
                swaps = ((number // len(words), words[number % len(words)]) for number in row)
                found.append(list(itertools.islice((swap for swap in swaps if prefix[swap[0]] != swap[1]), TOP)))
        return found

    def _batches(self, *columns: Sequence[Any]) -> Iterator[list[Sequence[Any]]]:
        size = max(1, BATCH_SIZE // self.images)
        for start in range(0, len(columns[0]), size):
            yield [column[start : start + size] for column in columns]

    def _loss(self, numbers: Sequence[int], prefixes: Sequence[list[int]]) -> torch.Tensor:
        """[numbers], the mean over images and pixels."""
        import torch

        length, rows = self.tokenizer.model_max_length, []
        for number, prefix in zip(numbers, prefixes, strict=True):  # cut and padded as the pipeline does
            ids = [self.tokenizer.bos_token_id, *prefix, *self.ids[number]][: length - 1] + [self.tokenizer.eos_token_id]
            rows.append(ids + [self.tokenizer.pad_token_id] * (length - len(ids)))
        states = self.pipeline.text_encoder(torch.tensor(rows, device=self.embeddings.weight.device))[0]
        index = torch.tensor(numbers)
        predicted = self.pipeline.unet(
            self.noisy[index].flatten(0, 1), self.timesteps.repeat(len(rows)), states.repeat_interleave(self.images, 0)
        ).sample
        error = (predicted - self.wanted[index].flatten(0, 1)).square().mean((1, 2, 3))
        return error.unflatten(0, (len(rows), self.images)).mean(1)
