"""A pipeline's images of prompts, each from a seed of its own: how they are drawn and how they are stored."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import bases, digests
from sd_erase.config import GenerateConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.progress import Progress
from sd_erase.rundir import fingerprint, replacing

SAVERS = 4  # threads that compress and write images: a PNG of 512 pixels takes longer than a card's share of its drawing


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

    def draw(self, pipeline: Any, jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[Sequence[Job], Any]]:
        """Yield each batch of jobs with its images [batch, 3, height, width] in 0 to 1; on a card they may still be in the making."""
        arrange(pipeline)
        states = States(pipeline, settings)
        start = 0
        while start < len(jobs):
            batch = jobs[start : start + self.size]
            images = None
            try:
                images = _draw(pipeline, batch, settings, states)
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

    def write(
        self,
        pipeline: Any,
        jobs: Sequence[Job],
        settings: Settings,
        save: Callable[[Job, Any], None],
        advance: Callable[[int], None],
    ) -> None:
        """Draw `jobs`; each PIL image is made and given to `save` in a thread while the next batch is denoised.

        Whatever ends it, an interruption too, the images that were drawn before are saved.

        Args:
            advance: told, in the caller's thread, of each batch that is saved.
        """
        with ThreadPoolExecutor(min(SAVERS, os.cpu_count() or 1)) as pool:
            waiting: list[Future[None]] = []
            for batch, images in self.draw(pipeline, jobs, settings):
                _finish(waiting, advance)  # no more than one batch waits, and what went wrong with it is told now
                waiting = [pool.submit(_save, pipeline, job, image, save) for job, image in zip(batch, images, strict=True)]
            _finish(waiting, advance)


def _save(pipeline: Any, job: Job, image: Any, save: Callable[[Job, Any], None]) -> None:
    processor = pipeline.image_processor
    save(job, processor.numpy_to_pil(processor.pt_to_numpy(image[None]))[0])


def _finish(waiting: Sequence[Future[None]], advance: Callable[[int], None]) -> None:
    for one in waiting:
        one.result()
    advance(len(waiting))


class States:
    """What the denoiser reads of each prompt; a prompt is encoded once for all of its seeds.

    Each is encoded alone, so that its states do not depend on which prompts stand beside it.
    """

    def __init__(self, pipeline: Any, settings: Settings):
        self._pipeline, self._settings = pipeline, settings
        self._guided = settings.guidance > 1 and pipeline.unet.config.time_cond_proj_dim is None  # as diffusers decides
        self._negative: dict[str, Any] = {}
        self._kept: dict[str, dict[str, Any]] = {}

    def of(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The keywords of a pipeline's call: states [batch, positions, width], and of SDXL the pooled ones [batch, width]."""
        import torch

        with torch.no_grad():
            # in order, each once; of earlier batches' only what is wanted again, so that they do not fill the memory
            self._kept = {prompt: self._kept.get(prompt) or self._encoded(prompt) for prompt in dict.fromkeys(prompts)}
            names = next(iter(self._kept.values()))
            states = {name: torch.cat([self._kept[prompt][name] for prompt in prompts]) for name in names}
            return states | {name: state.expand(len(prompts), *state.shape[1:]) for name, state in self._negative.items()}

    def _encoded(self, prompt: str) -> dict[str, Any]:
        found = self._pipeline.encode_prompt(
            prompt=prompt,
            device=self._pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self._guided and not self._negative,
            negative_prompt=self._settings.negative_prompt or None,
            clip_skip=self._settings.clip_skip or None,
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        states = {name: state for name, state in zip(names, found, strict=False) if state is not None}
        self._negative |= {name: states.pop(name) for name in names if name.startswith("negative") and name in states}
        return states


SMALL = 128 * 128  # pixels of an image of which a processor computes several at once
FILLED = 16  # how many: from 16 on its matrix products are the same with one thread and with several


def _draw(pipeline: Any, jobs: Sequence[Job], settings: Settings, states: States) -> Any:
    """The images of one batch, as a tensor [batch, 3, height, width] in 0 to 1.

    A processor computes always as many at once, the last one repeated where there are fewer: other shapes are other matrix products,
    which round otherwise, and an image shall depend on its prompt and seed alone.
    """
    import torch

    if pipeline.device.type != "cpu":
        return _together(pipeline, jobs, settings, states)
    size = FILLED if settings.height * settings.width <= SMALL else 1
    parts = []
    for start in range(0, len(jobs), size):
        some = jobs[start : start + size]
        parts.append(_together(pipeline, [*some, *[some[-1]] * (size - len(some))], settings, states)[: len(some)])
    return torch.cat(parts)


def _together(pipeline: Any, jobs: Sequence[Job], settings: Settings, states: States) -> Any:
    """The images of jobs in one call of the pipeline."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, settings.height // factor, settings.width // factor)
    # always drawn in float32: half-precision draws differ from it
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    with kept_keys(pipeline.unet):
        return pipeline(
            **states.of([job.prompt for job in jobs]),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            latents=noise.to(pipeline.unet.dtype),
            generator=generators,  # for schedulers that add noise of their own
            output_type="pt",
        ).images


@contextmanager
def kept_keys(unet: Any) -> Iterator[None]:
    """Let each cross-attention of a denoiser compute its keys and values of the text once, not again in each step.

    They depend on the text's states alone, which are one tensor for all steps of a pipeline's call; the images stay the same
    bit for bit.
    """
    layers = [
        layer
        for module in unet.modules()
        if type(module).__name__ == "Attention" and module.is_cross_attention
        for layer in (module.to_k, module.to_v)
    ]
    own = [layer.__dict__.get("forward") for layer in layers]  # set where another tool hooked into it
    for layer in layers:
        layer.forward = _once(layer.forward)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, which gives its last result again for the same tensor (the very object, so that nothing is compared)."""
    last: list[Any] = [None, None]

    def forward(states: Any, *rest: Any) -> Any:
        if last[0] is not states:
            last[:] = [states, compute(states, *rest)]
        return last[1]

    return forward


def arrange(pipeline: Any) -> str:
    """Lay the denoiser's and the decoder's weights out in memory as their device likes it; says how.

    On a CPU convolutions of channels-last tensors take 0.84 of the time (the pocket's, one thread; group norms lose a part of
    it). On a card alone it was 11 % slower (SD 1.5, H200), so weights stay there as they are.
    """
    import torch

    if pipeline.device.type != "cpu":
        return "contiguous"
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
    return "channels-last"


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


FLAT_SPREAD = 3  # of 255: an image whose every channel spans no more is a single colour


def is_flat(image: Any) -> bool:
    """Whether a PIL image is of a single colour, as pipelines write where the numbers overflowed."""
    channels: Any = image.convert("RGB").getextrema()  # of one channel a pair, of several a tuple of pairs
    return all(high - low <= FLAT_SPREAD for low, high in channels)


def opened(path: Path, mend: str) -> Any:
    """The PIL image of a file, read whole.

    Args:
        mend: the command that draws it again.

    Raises:
        UserError: it is missing, or no image.
    """
    import PIL.Image

    try:
        image = PIL.Image.open(path)
        image.load()
    except unreadable() as error:
        raise UserError(f"Image {path} is missing or damaged: run `{mend}` again.") from error
    return image


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
