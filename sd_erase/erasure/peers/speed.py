"""``--objective speed``: SPEED's edit of the denoiser's values in the null space of what is retained. A published comparator.

SPEED (Li et al., ICLR 2026, arXiv:2503.07392): with columns C1 of the concept's states, C* of the anchor's, C2 of what must stay
exactly, and P the projector onto the directions in which retained states have next to nothing, the change of a matrix W is

    W (C* C1^T - C1 C1^T) P Q M,  M = (C1 C1^T P + I)^-1,  Q = I - M C2 (C2^T P M C2)^-1 C2^T P.

What is retained is filtered to the states that an unprojected edit would move more than their mean (prior filtering) and
augmented by noise along the direction in which W gives least (directed augmentation). C2 is the begin of text and three clusters of the empty
prompt's states. The paper is not at hand: written from a public reimplementation's description, and the order of the factors follows
from the problem: minimise |(W + D P) C1 - W C*|^2 + |D P|^2 with D P C2 = 0. Ours: states count from the concept's last token on (the
paper: that token alone), the threshold relative to the mean of the eigenvalues, ten augmentations, and retain captions' states
of a few random tokens in place of names' last tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure.peers.keys_values import KeysAndValues, aligned, retained, states_of

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.pairs import Pair
    from sd_erase.progress import Progress

THRESHOLD = 0.1  # of eigenvalues, relative to their mean, below which a direction is free
AUGMENTED = 10  # noisy copies of a retained state
PLACES = 8  # random tokens of each retain caption
CLUSTERS = 3  # of the empty prompt's states


class SPEED(KeysAndValues):
    """`change` of each value matrix."""

    endings = ("to_v.weight",)

    def solve(self, towers: Towers, forget: list[Pair], retain: list[Pair], seed: int, progress: Progress) -> None:
        """From plain captions, the empty prompt and retain captions."""
        import torch

        prompts = self.prompts(forget, seed)
        old, new = (rows * len(prompts) ** -0.5 for rows in aligned(towers, prompts))
        generator = torch.Generator().manual_seed(seed)
        kept = states_of(towers, retained(retain, seed))
        places = 1 + torch.rand(kept.shape[:2], generator=generator)[:, 1:].argsort(1)[:, :PLACES].to(kept.device)
        rows = kept.gather(1, places[..., None].expand(-1, -1, kept.shape[2])).flatten(0, 1)
        exact = _exact(states_of(towers, [""])[0])
        with torch.no_grad(), progress("closed form", len(self.of_denoiser)) as task:
            for matrix in self.of_denoiser.values():
                matrix += change(matrix, old, new, rows, exact, generator)
                task.advance()


def _exact(empty: torch.Tensor) -> torch.Tensor:
    """The begin of text and the clusters' centres of the other states [positions, width] of the empty prompt, [1 + CLUSTERS, width]."""
    import torch
    from sklearn.cluster import KMeans

    centres = KMeans(CLUSTERS, n_init=1, random_state=0).fit(empty[1:].cpu().numpy()).cluster_centers_
    return torch.cat([empty[:1], torch.as_tensor(centres).to(empty)])


def change(
    matrix: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    kept: torch.Tensor,
    exact: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """What is added to W [out, width].

    Args:
        matrix: W.
        old: the concept's states [n, width].
        new: the anchor's, likewise.
        kept: retained states [m, width].
        exact: states [few, width] that give what they gave.
        generator: of the augmentations.
    """
    import torch

    width = matrix.shape[1]
    one = torch.eye(width, dtype=torch.float64, device=matrix.device)
    weight, old, new, kept, exact = (each.double() for each in (matrix, old, new, kept, exact))
    own, wanted = old.T @ old, new.T @ old
    free = weight @ (wanted - own) @ torch.linalg.inv(one + own)  # the edit that nothing holds back
    least = torch.linalg.svd(weight, full_matrices=False)[2][-1:]
    kept = _influenced(kept, free)
    noise = torch.randn(AUGMENTED * len(kept), width, generator=generator, dtype=torch.float64).to(kept.device)
    noisy = _influenced(kept.repeat(AUGMENTED, 1) + noise @ least.T @ least, free)
    rows = torch.cat([kept, noisy])
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    null = vectors[:, values < THRESHOLD * values.mean()]
    onto = null @ null.T
    inner = torch.linalg.inv(own @ onto + one)
    held = exact.T
    inside = held.T @ onto @ inner @ held
    stays = one - inner @ held @ torch.linalg.pinv(inside) @ held.T @ onto
    return (weight @ (wanted - own) @ onto @ stays @ inner).to(matrix)


def _influenced(rows: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
    """Those of `rows` that `edit` would move more than their mean; all, where it moves all alike."""
    moved = (rows @ edit.T).norm(dim=1)
    chosen = rows[moved > moved.mean()]
    return chosen if len(chosen) else rows
