"""``--objective uce``: UCE's closed form on the denoiser's keys and values. A published comparator.

Unified Concept Editing (Gandikota et al. 2024, arXiv:2308.14761, eq. 7) solves each key and value matrix W of the cross-attention for
what the concept's states should give, and keeps the rest: with columns c of the concept, c* of the anchor and c_j of what is
retained, W' = (sum W c* c^T + sum W c_j c_j^T + l W) (sum c c^T + sum c_j c_j^T + l I)^-1. A prompt's states count from the concept's
last token on. Ours: l, prompts of all words of the card, retain captions in place of other concepts' names, and that each side is divided by
its number of prompts, since there are hundreds of retain captions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.peers.keys_values import KeysAndValues, aligned, retained, states_of

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.pairs import Pair
    from sd_erase.progress import Progress

KEEP = 0.5  # l, beside the sum of one prompt, as where one concept is edited
PRESERVE = 1.0  # of a retain caption's states against a concept prompt's


class UCE(KeysAndValues):
    """`edited` of each matrix."""

    def solve(self, towers: Towers, forget: list[Pair], retain: list[Pair], seed: int, progress: Progress) -> None:
        """From plain captions, the empty prompt and retain captions."""
        import torch

        prompts = self.prompts(forget, seed)
        old, new = (rows * len(prompts) ** -0.5 for rows in aligned(towers, prompts))
        captions = ["", *retained(retain, seed)]
        kept = states_of(towers, captions).flatten(0, 1) * (PRESERVE / len(captions)) ** 0.5
        with torch.no_grad(), progress("closed form", len(self.of_denoiser)) as task:
            for matrix in self.of_denoiser.values():
                matrix.copy_(edited(matrix, old, new, kept))
                task.advance()


def edited(matrix: torch.Tensor, old: torch.Tensor, new: torch.Tensor, kept: torch.Tensor, keep: float = KEEP) -> torch.Tensor:
    """W' [out, width] of W, for states `old` and `new` [n, width] and `kept` [m, width]; `keep` is l."""
    import torch

    own = kept.T @ kept + keep * torch.eye(matrix.shape[1], device=matrix.device)
    # both sums of products are symmetric but for new.T @ old
    return torch.linalg.solve(old.T @ old + own, (matrix @ (new.T @ old + own)).T).T.contiguous()
