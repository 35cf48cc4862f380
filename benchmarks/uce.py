"""`uce.py BASE MATRICES CONCEPT ANCHOR`: UCE for one concept, into ``uce.safetensors``.

Unified Concept Editing (Gandikota et al. 2024, arXiv:2308.14761, eq. 7) solves each key and value matrix W of the denoiser's
cross-attention for what the concept's states should give, and keeps the rest: with columns c of the concept, c* of the anchor and
c_j of what is retained, W' = (sum W c* c^T + sum W c_j c_j^T + l W) (sum c c^T + sum c_j c_j^T + l I)^-1.

Written from the formula and a public reimplementation's description; l and what is retained are ours. It reads the matrices alone, where a user's script reads the denoiser whole (3.4 GB), and encodes each text once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

KEEP = 0.5  # l
RETAINED = ("",)


def states(base: Path, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """States [texts, 77, width] and the position of each text's last word."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", torch_dtype=torch.float32).eval()
    tokens = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids).last_hidden_state, [int(mask.sum()) - 2 for mask in tokens.attention_mask]


def edited(matrix: torch.Tensor, old: torch.Tensor, new: torch.Tensor, retained: torch.Tensor) -> torch.Tensor:
    """W' [out, width] of W, for states `old` and `new` [n, width] and `retained` [m, width]."""
    wanted = matrix @ (new.T @ old + retained.T @ retained + KEEP * torch.eye(matrix.shape[1]))
    gram = old.T @ old + retained.T @ retained + KEEP * torch.eye(matrix.shape[1])
    return torch.linalg.solve(gram, wanted.T).T.contiguous()  # gram is symmetric


@torch.no_grad()
def main(base: str, matrices: str, concept: str, anchor: str) -> None:
    found, (at, to, *_) = states(Path(base), [concept, anchor, *RETAINED])
    count = 77 - max(at, to)  # from the last word on, as many positions as both have
    old, new = found[0, at : at + count], found[1, to : to + count]
    retained = found[2:].flatten(0, 1)
    save_file({name: edited(matrix, old, new, retained) for name, matrix in load_file(matrices).items()}, "uce.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:5])
