"""`plain_drawing.py ours|plain` in a folder with a trained run: seconds for the images of both encoders, into the file ``seconds``.

"plain" is what a user of diffusers would write: the pipeline twice, once with the erased encoder in it, prompt batches, PNGs.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from sd_erase.bases import POCKET_FOLDER
from sd_erase.config import load
from sd_erase.images import generate
from sd_erase.rundir import RunDir

PROMPTS = [
    f"a {thing} beside a {other}" for thing in ("bicycle", "dog", "car", "apple") for other in ("cat", "chair", "horse", "bus")
]
IMAGES, STEPS, GUIDANCE, BATCH = 8, 15, 4.0, 32


def ours(run: RunDir) -> float:
    """`sd-erase generate` as a function, with the base's own settings."""
    shutil.rmtree(run.images, ignore_errors=True)
    run.reopen("generate")
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    config = load(run.config)
    wanted = dataclasses.replace(
        config.generate, prompts=("prompts.txt",), images_per_prompt=IMAGES, steps=STEPS, guidance=GUIDANCE
    )
    began = time.perf_counter()
    generate(dataclasses.replace(config, generate=wanted), run)
    return time.perf_counter() - began


def plain(run: RunDir) -> float:
    """Both pipelines one after the other."""
    began = time.perf_counter()
    folder = Path("plain")
    folder.mkdir(exist_ok=True)
    jobs = [(prompt, number) for prompt in PROMPTS for number in range(IMAGES)]
    for name in ("original", "erased"):
        pipe = StableDiffusionPipeline.from_pretrained(POCKET_FOLDER, torch_dtype=torch.float32, safety_checker=None)
        if name == "erased":
            pipe.text_encoder = CLIPTextModel.from_pretrained(run.encoder / "text_encoder")
        pipe.set_progress_bar_config(disable=True)
        for start in range(0, len(jobs), BATCH):
            part = jobs[start : start + BATCH]
            images = pipe(
                [prompt for prompt, _ in part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=64,
                width=64,
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            ).images
            for number, image in enumerate(images, start):
                image.save(folder / f"{name}-{number}.png")
    return time.perf_counter() - began


if __name__ == "__main__":
    seconds = {"ours": ours, "plain": plain}[sys.argv[1]](RunDir(Path("run")))
    Path("seconds").write_text(str(seconds))
