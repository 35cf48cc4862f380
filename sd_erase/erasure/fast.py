"""``--objective fast``: the closed form alone. No image, no gradient, seconds on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_erase.erasure import closed_form
from sd_erase.erasure.sd import StableDiffusionErasure, alignments

if TYPE_CHECKING:
    from random import Random

    from sd_erase.clip import Towers
    from sd_erase.pairs import Pair
    from sd_erase.progress import Progress

VARIANTS = 2  # forms of each forget caption
MOST_FORGET = 210  # captions of each concept,
MOST_TOGETHER = 2100  # of all concepts together, so that a hundred take ten times one's, and
MOST_RETAIN = 630  # captions that are solved for: more take longer and were not seen to help


class ClosedForm(StableDiffusionErasure):
    """`closed_form.edit` on captions and templates; its loss terms are only measured. ``--steps N`` trains on from it as ``sd``."""

    default_steps = 0
    solves = True
    # with captions of any wording on both sides, and the base's own names (nonsense among them yet), untouched prompts keep 38.9 dB in the
    # median and 27.2 for the tenth percentile, with neither 35.0 and 18.8 (the pocket model's dog, prompts of 14 wordings)
    varied_forget, varied_retain, template_retain = 0.35, 0.5, 0.15

    def solve(self, towers: Towers, forget: list[Pair], retain: list[Pair], seed: int, progress: Progress) -> None:
        """The closed form over each forget caption in `VARIANTS` forms, against the retain captions and what is protected."""
        import random

        import torch

        rng = random.Random(seed)
        forget = _sampled(forget, min(MOST_FORGET, MOST_TOGETHER // len(self.concepts)), rng)
        retain = rng.sample(retain, MOST_RETAIN) if len(retain) > MOST_RETAIN else retain
        moved = [
            self.augmented(pair.caption, pair.spans, self.concepts[str(pair.concept)], rng)
            for pair in forget
            for _ in range(VARIANTS)
        ]
        kept = [(self.retained(pair.caption, rng), 1.0) for pair in retain]
        # few captions that must not drown among the many
        kept += [(caption, max(1.0, 0.1 * len(retain) / len(self.protected))) for caption in self.protected]
        kept.append(("", 0.05 * len(retain) + 1.0))
        ids = towers.tokens([*(item.caption for item in moved), *(caption for caption, _ in kept)])
        end = towers.end_of(ids)
        index = torch.tensor(alignments(towers.tokenizer, moved, end), device=ids.device)
        targets = towers.tokens([item.target for item in moved])[:, :end]
        weights = torch.tensor([weight for _, weight in kept])
        forget_ids, kept_ids = ids[: len(moved), :end], ids[len(moved) :, :end]
        closed_form.edit(towers.text, towers.frozen_text, forget_ids, targets, index, kept_ids, weights, progress=progress)


def _sampled(forget: list[Pair], most: int, rng: Random) -> list[Pair]:
    """At most so many of each concept's pairs, one at least."""
    groups: dict[str | None, list[Pair]] = {}
    for pair in forget:
        groups.setdefault(pair.concept, []).append(pair)
    most = max(1, most)
    return [pair for group in groups.values() for pair in (rng.sample(group, most) if len(group) > most else group)]
