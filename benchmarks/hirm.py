"""`hirm.py BASE CONCEPT STEPS`: HiRM for one concept, into ``hirm``.

High-level Representation Misdirection (ICLR 2026, arXiv:2602.19631) trains CLIP's first layer alone so that what the last layer's
attention gives for the concept's name comes to lie at one random direction of a fixed length; nothing is retained.
Written from a public reimplementation's description: the number of steps, the direction's length and the rate are ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 20.0  # of the direction, over all positions
RATE = 1e-5


def main(base: str, concept: str, steps: int) -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(Path(base) / "tokenizer")
    model = CLIPTextModel.from_pretrained(Path(base) / "text_encoder", torch_dtype=torch.float32)
    layers = getattr(model, "text_model", model).encoder.layers
    model.requires_grad_(False)
    layers[0].requires_grad_(True)
    optimizer = torch.optim.AdamW(layers[0].parameters(), lr=RATE)
    given: list[torch.Tensor] = []
    layers[-1].self_attn.out_proj.register_forward_hook(lambda module, read, output: given.append(output))
    tokens = tokenizer([concept], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    direction = torch.rand(1, 77, model.config.hidden_size)
    target = direction / direction.norm() * LENGTH
    for _ in range(steps):
        given.clear()
        model(tokens)
        functional.mse_loss(given[0], target).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("hirm")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
