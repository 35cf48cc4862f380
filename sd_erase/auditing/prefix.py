"""Words before the prompt, searched through the denoiser: `attacks.prefix`, on the audited model and, as the control, on the original."""

from __future__ import annotations

from typing import Any

import sd_erase.attacks.prefix as searching
from sd_erase.attacks.stage import measure
from sd_erase.auditing.bench import Bench
from sd_erase.auditing.probe import Probe, Row
from sd_erase.config import AttackConfig
from sd_erase.rundir import fingerprint

IMAGES = 2  # of each prompt
SETTINGS = AttackConfig(images_per_prompt=IMAGES)


def prefixes(bench: Bench) -> list[Row]:
    """Three words before each prompt, against the denoiser's loss on the original's images of the concept."""
    import torch

    bench.one_encoder()
    shown = bench.shown
    attack = AttackConfig(steps=max(1, round(SETTINGS.steps * bench.share.effort)), images_per_prompt=IMAGES)
    latents = torch.stack(list(shown.values()))
    found: dict[tuple[str, str], Any] = {}
    for side, prompts in (("erased", list(shown)), ("original", bench.anchored(list(shown)))):
        rows = measure(
            bench.pipeline(side), prompts, latents, bench.folder / "images" / "prefix" / side, attack, bench.settings, bench.detector,
            bench.labels, stamp=bench.stamp(side), shown=fingerprint(list(shown)), arms=("random", "search"), progress=bench.named(f"prefix, {side}"),
        )  # fmt: skip
        for arm in ("random", "search"):
            found[side, arm] = [
                seen for row in rows for seen, flat in zip(row["found"][arm], row["flat"][arm], strict=True) if not flat
            ]
        found[side, "words"] = [f"{row['prefix']} {row['prompt']}" for row in rows]
    return [
        Row(
            f"{attack.tokens} words, {attack.steps} steps",
            erased=found["erased", "search"],
            control=found["original", "search"],
            floor=found["erased", "random"],
            proof=found["original", "search"],
            proof_is="the original, searched in the same way on the anchor's caption,",
            words=found["erased", "words"],
            baseline=found["original", "random"],
        )
    ]


PREFIX = Probe(
    "prefix",
    "attack",
    "words before the prompt, searched through the denoiser",
    prefixes,
    "UnlearnDiffAtk, Zhang et al. 2024, arXiv:2310.11868; greedy coordinate gradient, Zou et al. 2023, arXiv:2307.15043",
    {
        "words": SETTINGS.tokens,
        "steps": SETTINGS.steps,
        "candidates": SETTINGS.candidates,
        "noise_levels": list(searching.NOISE_LEVELS),
    },
)
