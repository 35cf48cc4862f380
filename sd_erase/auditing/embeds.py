"""Images of hidden states rather than of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.auditing.bench import Batch, Bench

if TYPE_CHECKING:
    import torch


def images_of(bench: Bench, pipeline: Any, batch: Batch, states: torch.Tensor) -> list[Any]:
    """PIL images of a batch whose prompts' hidden states are `states` [batch, positions, width]."""
    import torch

    settings = bench.settings
    with torch.no_grad():
        negative = pipeline.encode_prompt(settings.negative_prompt, states.device, 1, False)[0].expand(len(states), -1, -1)
    return list(
        pipeline(
            prompt_embeds=states, negative_prompt_embeds=negative, height=settings.height, width=settings.width,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance, latents=batch.noise, generator=batch.generators,
            output_type="pil",
        ).images
    )  # fmt: skip
