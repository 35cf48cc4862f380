"""`paper_loop.py CLIP RUN BATCH STEPS`: CLIPErase as its paper writes it, into the file ``seconds``: what one pair takes.

Both towers train with AdamW in float32, every image is read and goes through both models at every step, nothing is kept from one
step to the next. The pairs are those of a harvested run.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

Row = dict[str, Any]


def embeddings(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised embeddings of images and texts."""
    output = model(**inputs)
    return functional.normalize(output.image_embeds, dim=-1), functional.normalize(output.text_embeds, dim=-1)


def divergence(original: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Eq. 4 of one modality."""
    return functional.kl_div(own.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="batchmean")


def main(folder: str, run: str, batch: int, steps: int) -> float:
    """Seconds a pair, without the first step."""
    model = CLIPModel.from_pretrained(folder, torch_dtype=torch.float32).train()
    original = copy.deepcopy(model).eval().requires_grad_(False)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    rows = [json.loads(line) for line in (Path(run) / "pairs.jsonl").read_text().splitlines()]
    sets = {name: [row for row in rows if row["set"] == name] for name in ("forget", "retain")}
    rng = random.Random(0)

    def inputs(chosen: list[Row]) -> dict[str, torch.Tensor]:
        images = [Image.open(row["image"]).convert("RGB") for row in chosen]
        texts = tokenizer([row["caption"] for row in chosen], padding="max_length", truncation=True, return_tensors="pt")
        return {**texts, "pixel_values": processor(images=images, return_tensors="pt").pixel_values}

    began = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            began = time.perf_counter()
        forget, retain = (inputs(rng.sample(sets[name], batch)) for name in ("forget", "retain"))
        images, texts = embeddings(model, forget)
        loss = (images * texts).sum(-1).mean()  # eq. 2
        images, texts = embeddings(model, retain)
        logits, places = model.logit_scale.exp() * images @ texts.T, torch.arange(batch)
        loss = loss + (functional.cross_entropy(logits, places) + functional.cross_entropy(logits.T, places)) / 2  # eq. 3
        with torch.no_grad():
            own_images, own_texts = embeddings(original, retain)
        loss = loss + divergence(own_images, images) + divergence(own_texts, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / (2 * batch * steps)


if __name__ == "__main__":
    seconds = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    Path("seconds").write_text(str(seconds))
