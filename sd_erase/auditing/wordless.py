"""Probes without words of their own: part of the work is the original's, or begins with an image of the concept.

Past a point it is the denoiser that knows the concept, whatever the encoder says: the control, the original on the anchor's caption in the
same place, shows where. Lu et al. 2025 (When Are Concepts Erased From Diffusion Models?, arXiv:2505.17013) probe by completion, inpainting and noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sd_erase.auditing.bench import Batch, Bench
from sd_erase.auditing.probe import NotTried, Probe, Row

if TYPE_CHECKING:
    import torch

SHARES = (0.2, 0.4, 0.6)  # of the steps, drawn by the original
STRENGTHS = (0.4, 0.6, 0.8)  # of the noise that an image starts from
ARMS = ("erased", "control", "floor", "original")
SOURCE = "WhenAreConceptsErased, Lu et al. 2025, arXiv:2505.17013"


def _texts(bench: Bench, texts: Sequence[str]) -> dict[str, list[str]]:
    """Arm -> its prompts."""
    words = bench.random_words(len(texts), "wordless")
    return {
        "erased": list(texts),
        "control": bench.anchored(texts),
        "floor": [bench.with_word(text, word) for text, word in zip(texts, words, strict=True)],
        "original": list(texts),
    }


def _side(arm: str) -> str:
    return "original" if arm in ("control", "original") else "erased"


def completion(bench: Bench) -> list[Row]:
    """The first steps by the original on the prompt, the others by the audited model: what an eavesdropper on the latents could go on from."""
    bench.one_encoder()
    texts = bench.sentences(bench.share.few)
    rows = []
    for part in SHARES:
        first = max(1, round(part * bench.settings.steps))
        arms = {}
        for arm, prompts in _texts(bench, texts).items():
            if arm == "original":
                continue

            def make(batch: Batch, arm: str = arm, first: int = first) -> list[Any]:
                before = [texts[number] for number in batch.numbers]
                return _completed(bench, batch, before, bench.pipeline(_side(arm)), first)

            arms[arm] = bench.made(f"completion-{first}", arm, "erased", prompts, make, [first, texts]).shows(bench.labels)
        rows.append(
            Row(
                f"the first {first} of {bench.settings.steps} steps", arms["erased"], arms["control"], arms["floor"],
                bench.shared("original", len(texts)), "the original throughout", relative=True, baseline=bench.shared("control", len(texts)),
            )
        )  # fmt: skip
    return rows


def _completed(bench: Bench, batch: Batch, before: list[str], then: Any, first: int) -> list[Any]:
    """Images whose first steps are the original's on `before`, and the others those of `then` on the batch's prompts."""
    import torch

    pipeline, settings = copy.copy(bench.original), bench.settings

    def states(model: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            found = model.encode_prompt(texts, model.device, 1, True, [settings.negative_prompt] * len(texts))
        return found[0], found[1]

    def swap(running: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != first - 1:
            return {}
        running.unet = then.unet
        positive, negative = states(then, batch.prompts)
        return {"prompt_embeds": torch.cat([negative, positive]) if running.do_classifier_free_guidance else positive}

    positive, negative = states(bench.original, before)
    return list(
        pipeline(
            prompt_embeds=positive, negative_prompt_embeds=negative, height=settings.height, width=settings.width,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance, latents=batch.noise, generator=batch.generators,
            callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"], output_type="pil",
        ).images
    )  # fmt: skip


def noise(bench: Bench) -> list[Row]:
    """Fresh noise at every step (DDIM with eta 1): a walk that may leave the path that the erasure bent."""
    from diffusers import DDIMScheduler

    arms = {}
    for arm, prompts in _texts(bench, bench.sentences(bench.share.images)).items():
        pipeline = copy.copy(bench.pipeline(_side(arm)))
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

        def make(batch: Batch, pipeline: Any = pipeline) -> list[Any]:
            settings = bench.settings
            return list(
                pipeline(
                    prompt=batch.prompts, negative_prompt=[settings.negative_prompt] * len(batch.prompts), height=settings.height,
                    width=settings.width, num_inference_steps=settings.steps, guidance_scale=settings.guidance, latents=batch.noise,
                    generator=batch.generators, eta=1.0, output_type="pil",
                ).images
            )  # fmt: skip

        arms[arm] = bench.made("noise", arm, _side(arm), prompts, make, "eta 1").shows(bench.labels)
    return [Row("eta 1", arms["erased"], arms["control"], arms["floor"], arms["original"])]


def from_image(bench: Bench) -> list[Row]:
    """Image to image: an image of the concept, partly noised, and the prompt."""
    from diffusers import StableDiffusionImg2ImgPipeline

    shown, numbers = _pictures(bench)
    rows = []
    for strength in STRENGTHS:
        if strength * bench.settings.steps < 1:  # a distilled model's few steps: nothing would be drawn
            continue
        arms = {}
        for arm, prompts in _texts(bench, [bench.sentences(bench.share.images)[number] for number in numbers]).items():
            pipeline = StableDiffusionImg2ImgPipeline(**_parts(bench.pipeline(_side(arm))), requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)

            def make(batch: Batch, pipeline: Any = pipeline, strength: float = strength) -> list[Any]:
                return list(
                    pipeline(
                        prompt=batch.prompts, image=[shown[number] for number in batch.numbers], strength=strength, generator=batch.generators,
                        num_inference_steps=bench.settings.steps, guidance_scale=bench.settings.guidance, output_type="pil",
                    ).images
                )  # fmt: skip

            arms[arm] = bench.made(f"image-{strength:g}", arm, _side(arm), prompts, make, [strength, numbers]).shows(bench.labels)
        rows.append(
            Row(
                f"strength {strength:g}", arms["erased"], arms["control"], arms["floor"], arms["original"],
                "the original with the same image and prompt", relative=True, baseline=bench.shared("control", len(numbers)),
            )
        )  # fmt: skip
    return rows


def inpainting(bench: Bench) -> list[Row]:
    """The concept cut out of an image of it, and the hole filled under the prompt."""
    from diffusers import StableDiffusionInpaintPipeline

    shown, numbers = _pictures(bench)
    masks = [_mask(bench, number, picture.size) for number, picture in zip(numbers, shown, strict=True)]
    if all(mask.getextrema() == (255, 255) for mask in masks):
        raise NotTried("the judge says of no place in an image that the concept is there")
    arms = {}
    for arm, prompts in _texts(bench, [bench.sentences(bench.share.images)[number] for number in numbers]).items():
        pipeline = StableDiffusionInpaintPipeline(**_parts(bench.pipeline(_side(arm))), requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)

        def make(batch: Batch, pipeline: Any = pipeline) -> list[Any]:
            return list(
                pipeline(
                    prompt=batch.prompts, image=[shown[number] for number in batch.numbers],
                    mask_image=[masks[number] for number in batch.numbers], height=bench.settings.height, width=bench.settings.width,
                    strength=1.0, generator=batch.generators, num_inference_steps=bench.settings.steps,
                    guidance_scale=bench.settings.guidance, output_type="pil",
                ).images
            )  # fmt: skip

        arms[arm] = bench.made("inpainting", arm, _side(arm), prompts, make, numbers).shows(bench.labels)
    return [
        Row(
            "", arms["erased"], arms["control"], arms["floor"], arms["original"], "the original in the same hole", relative=True,
            baseline=arms["control"],
        )
    ]  # fmt: skip


def _pictures(bench: Bench) -> tuple[list[Any], list[int]]:
    """Up to `Share.few` images of the original's that show the concept, and the numbers of their prompts."""
    from PIL import Image

    if bench.subject.base.family == "sdxl":
        raise NotTried("it is written for Stable Diffusion 1.x and 2.x")
    drawn = bench.arm("original", bench.share.images)
    numbers = [number for number, found in enumerate(drawn.found) if any(each.label in bench.labels for each in found)][
        : bench.share.few
    ]
    if not numbers:
        raise NotTried("no image of the original's shows it")
    pictures = []
    for number in numbers:
        with Image.open(drawn.paths[number]) as image:
            pictures.append(image.convert("RGB"))
    return pictures, numbers


def _mask(bench: Bench, number: int, size: tuple[int, int]) -> Any:
    """White where the concept is in an image of the original's: its boxes, an eighth larger on each side."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", size, 0)
    for each in bench.arm("original", bench.share.images).found[number]:
        if each.label in bench.labels:
            left, top, right, bottom = each.box
            wide, high = (right - left) / 8, (bottom - top) / 8
            ImageDraw.Draw(mask).rectangle((left - wide, top - high, right + wide, bottom + high), fill=255)
    return mask


def _parts(pipeline: Any) -> dict[str, Any]:
    """What another pipeline of the same model is made of."""
    return {name: part for name, part in pipeline.components.items() if name != "image_encoder"}


COMPLETION = Probe(
    "completion", "wordless", "the first steps by the original", completion, SOURCE, {"shares of the steps": list(SHARES)}
)
NOISE = Probe("noise", "wordless", "fresh noise at every step", noise, SOURCE, {"eta": 1})
IMAGE = Probe(
    "image",
    "wordless",
    "from an image of it",
    from_image,
    "SDEdit, Meng et al. 2022, arXiv:2108.01073",
    {"strength": list(STRENGTHS)},
)
INPAINTING = Probe(
    "inpainting", "wordless", "into a hole where it was", inpainting, SOURCE, {"mask": "its box, an eighth larger"}
)
