"""`hirm.py BASE CONCEPT STEPS`: HiRM for one concept, into ``hirm``.

What trains, the direction and what is read are those of `sd_erase.erasure.peers.hirm`, which says what is the paper's and what ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from sd_erase.erasure.peers.hirm import HiRM, direction, last_attention, parameters


def main(base: str, concept: str, steps: int) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(Path(base) / "tokenizer")
    model = CLIPTextModel.from_pretrained(Path(base) / "text_encoder", torch_dtype=torch.float32)
    model.requires_grad_(False)
    trained = parameters(model)
    for each in trained:
        each.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=HiRM.published_learning_rate)
    tokens = tokenizer([concept], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    target = direction(model.config)
    for _ in range(steps):
        functional.mse_loss(last_attention(model, tokens), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("hirm")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
