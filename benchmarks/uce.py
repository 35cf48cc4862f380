"""`uce.py BASE MATRICES CONCEPT ANCHOR`: UCE for one concept, into ``uce.safetensors``.

The solve is that of `sd_erase.erasure.peers.uce`, which says what is the paper's and what ours; here nothing but the empty prompt is retained. It reads
the matrices alone, where a user's script reads the denoiser whole (3.4 GB), and encodes each text once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from sd_erase.erasure.peers.uce import edited

RETAINED = ("",)


def states(base: Path, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """States [texts, 77, width] and the position of each text's last word."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", torch_dtype=torch.float32).eval()
    tokens = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids).last_hidden_state, [int(mask.sum()) - 2 for mask in tokens.attention_mask]


@torch.no_grad()
def main(base: str, matrices: str, concept: str, anchor: str) -> None:
    found, (at, to, *_) = states(Path(base), [concept, anchor, *RETAINED])
    count = 77 - max(at, to)  # from the last word on, as many positions as both have
    old, new = found[0, at : at + count], found[1, to : to + count]
    retained = found[2:].flatten(0, 1)
    save_file({name: edited(matrix, old, new, retained) for name, matrix in load_file(matrices).items()}, "uce.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:5])
