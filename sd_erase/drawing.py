"""A pipeline's images of prompts, each from a seed of its own: how they are drawn and how they are stored."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import bases, digests
from sd_erase.config import GenerateConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.progress import Progress
from sd_erase.rundir import fingerprint, replacing


@dataclass(frozen=True)
class Settings:
    """How images are drawn; every number is resolved (no "default" left)."""

    seed: int = 0
    images_per_prompt: int = 8
    steps: int = 15
    guidance: float = 4.0
    height: int = 64  # pixels
    width: int = 64
    negative_prompt: str = ""
    scheduler: str = "auto"
    batch_size: int = 32  # images
    clip_skip: int = 0  # layers left out before the last, as diffusers counts: 1 reads layer -2

    def __post_init__(self) -> None:
        own = {one.name for one in dataclasses.fields(GenerateConfig)}
        GenerateConfig(**{name: value for name, value in vars(self).items() if name in own})  # whose rules hold here too
        for name in ("steps", "height", "width", "batch_size"):
            if not getattr(self, name):
                raise UserError(f"Setting generate.{name} is 0 where a number is wanted: pass 1 or more.")

    @classmethod
    def of(cls, config: RunConfig, base: bases.Base) -> Settings:
        """The settings of a run, with the base's defaults where the configuration names none."""
        wanted = config.generate
        return cls(
            seed=config.seed,
            images_per_prompt=wanted.images_per_prompt,
            steps=wanted.steps or base.steps,
            guidance=base.guidance if wanted.guidance < 0 else wanted.guidance,
            height=wanted.height or base.resolution,
            width=wanted.width or base.resolution,
            negative_prompt=wanted.negative_prompt,
            scheduler=wanted.scheduler,
            batch_size=wanted.batch_size or base.batch_size,
            clip_skip=wanted.clip_skip,
        )


@dataclass(frozen=True)
class Job:
    prompt_index: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.prompt_index:04d}-seed{self.seed}.png"


class Batches:
    """Images of jobs, batch by batch; where memory runs out, the batch is halved and stays so."""

    def __init__(self, size: int):
        self.size = size

    def draw(self, pipeline: Any, jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[Sequence[Job], list[Any]]]:
        """Yield each batch of jobs with its images."""
        start = 0
        while start < len(jobs):
            batch = jobs[start : start + self.size]
            images = None
            try:
                images = _draw(pipeline, batch, settings)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise UserError(
                        f"One image of {settings.width} x {settings.height} pixels does not fit into the memory of "
                        f"{pipeline.device}: pass a smaller --height and --width, or --device cpu."
                    ) from error
            if images is None:  # outside the handler, so that the failed attempt's tensors are free
                self.size = len(batch) // 2
                _empty_cache()
                continue
            yield batch, images
            start += len(batch)


SMALL = 128 * 128  # pixels of an image of which a processor computes several at once
FILLED = 16  # how many: from 16 on its matrix products are the same with one thread and with several


def _draw(pipeline: Any, jobs: Sequence[Job], settings: Settings) -> list[Any]:
    """The images of one batch, as PIL images.

    A processor computes always as many at once, the last one repeated where there are fewer: other shapes are other matrix products,
    which round otherwise, and an image shall depend on its prompt and seed alone.
    """
    if pipeline.device.type != "cpu":
        return _together(pipeline, jobs, settings)
    size = FILLED if settings.height * settings.width <= SMALL else 1
    images: list[Any] = []
    for start in range(0, len(jobs), size):
        some = jobs[start : start + size]
        images += _together(pipeline, [*some, *[some[-1]] * (size - len(some))], settings)[: len(some)]
    return images


def _together(pipeline: Any, jobs: Sequence[Job], settings: Settings) -> list[Any]:
    """The images of jobs in one call of the pipeline."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, settings.height // factor, settings.width // factor)
    # always drawn in float32: half-precision draws differ from it
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    options = {"negative_prompt": [settings.negative_prompt] * len(jobs)} if settings.negative_prompt else {}
    return pipeline(
        prompt=[job.prompt for job in jobs],
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        latents=noise.to(pipeline.unet.dtype),
        generator=generators,  # for schedulers that add noise of their own
        clip_skip=settings.clip_skip or None,
        output_type="pil",
        **options,
    ).images


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises over a file that is no image, or one that unfolds to more pixels than any image has."""
    from PIL import Image, UnidentifiedImageError

    # ImportError: ultralytics' Image.open, where it was imported first; SyntaxError and ValueError: chunks of a damaged PNG
    return UnidentifiedImageError, Image.DecompressionBombError, OSError, ImportError, SyntaxError, ValueError


def pixel_digest(image: Any) -> str:
    """SHA-256 of a PIL image's pixels, mode and size."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def is_drawn(path: Path, stamp: str) -> bool:
    """Whether `path` is an image drawn from these inputs, with the very pixels that were drawn."""
    from PIL import Image

    if not stamp or not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            stated = image.info.get("inputs") == stamp and image.info.get("pixels")
            return bool(stated) and pixel_digest(image) == stated
    except unreadable():
        return False


def save_png(image: Any, path: Path, text: dict[str, str]) -> None:
    """Write a PNG with text chunks through a temporary file, so that an interruption leaves no half of it.

    One chunk, "pixels", is the digest of the pixels: `is_drawn` knows an image by both.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in {**text, "pixels": pixel_digest(image)}.items():
        chunks.add_text(key, value)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def precision(base: bases.Base, device: Any) -> Any:
    """The `torch.dtype` to draw in: half of it on a card, where a model of 64 pixels gains nothing from it."""
    import torch

    return torch.float16 if device.type == "cuda" and base.resolution > 64 else torch.float32


def base_stamp(base: bases.Base, progress: Progress | None = None) -> str:
    """A fingerprint of the base's weights and configuration, by content; of a hub's model by its revision."""
    return fingerprint(digests.of_base(base, progress) or base.source)
