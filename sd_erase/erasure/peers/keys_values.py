"""What UCE and SPEED share: both solve the denoiser's key and value matrices, from states of the text encoder alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sd_erase.erasure.peers.denoising import CrossAttentionPeer, read_states
from sd_erase.erasure.peers.peer import last_words, relative
from sd_erase.erasure.sd import alignments

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sd_erase.clip import Towers
    from sd_erase.erasure.method import Batch
    from sd_erase.erasure.sd import Redirect
    from sd_erase.pairs import Pair

AT_ONCE = 64  # captions
MOST_NAMED = 150  # forget captions that are solved for beside plain prompts, and
MOST_RETAINED = 300  # retain captions; papers name some hundred concepts


class KeysAndValues(CrossAttentionPeer):
    """Solves before the first step; the terms ``edit`` and ``keep`` measure the keys and values of validation captions."""

    endings: tuple[str, ...] = ("to_k.weight", "to_v.weight")
    solves = True
    default_weights = {"edit": 1.0, "keep": 1.0}
    default_learning_rate = 1e-4  # of --steps behind the solution, which no paper has

    def prompts(self, forget: Sequence[Pair], seed: int) -> list[Redirect]:
        """What is edited: the plain prompts, and forget captions with any of the concept's words."""
        rng = random.Random(seed)
        chosen = rng.sample(list(forget), min(MOST_NAMED, len(forget)))
        return [*self.plain, *(self.named(pair, rng) for pair in chosen)]

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """How far keys and values of forget captions are from the anchor captions' and those of retain captions from what they were."""
        import torch

        old, new = aligned(towers, [self.named(pair, batch.random) for pair in batch.forget])
        kept = states_of(towers, [pair.caption for pair in batch.retain]).flatten(0, 1)
        errors = []
        for name, matrix in self.of_denoiser.items():
            original = self.denoiser.unet.get_parameter(name)
            errors.append((relative(old @ matrix.T, new @ original.T), relative(kept @ matrix.T, kept @ original.T)))
        edit, keep = (torch.stack(each).mean() for each in zip(*errors, strict=True))
        return {"edit": edit, "keep": keep}


def retained(retain: Sequence[Pair], seed: int) -> list[str]:
    """Retain captions to solve for."""
    return [pair.caption for pair in random.Random(seed).sample(list(retain), min(MOST_RETAINED, len(retain)))]


def states_of(towers: Towers, captions: Sequence[str]) -> torch.Tensor:
    """The frozen encoder's states [captions, positions, width]."""
    import torch

    with torch.no_grad():
        parts = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
        return torch.cat([read_states(towers.frozen_text, towers, part) for part in parts])


def aligned(towers: Towers, items: list[Redirect]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of captions from the concept's last token on, and those of their targets in the same places, [rows, width] each."""
    import torch

    old, new = states_of(towers, [item.caption for item in items]), states_of(towers, [item.target for item in items])
    index = torch.tensor(alignments(towers.tokenizer, items, old.shape[1]), device=old.device)
    new = new.gather(1, index[..., None].expand_as(new))
    firsts = torch.tensor([last for last, _ in last_words(towers, items)], device=old.device)
    behind = torch.arange(old.shape[1], device=old.device) >= firsts[:, None]
    return old[behind], new[behind]
