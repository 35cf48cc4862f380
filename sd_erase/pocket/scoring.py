"""The card of a pack: what it can do, measured on held-out scenes and sentence patterns."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd_erase.pocket import scoring_art, scoring_pocket
from sd_erase.pocket.packed import GUIDANCE, STEPS, detector_map50
from sd_erase.pocket.recipe import Recipe
from sd_erase.rundir import write_json_atomic, write_text_atomic

log = logging.getLogger("sd_erase.pocket")
_LICENCES = (
    "Weights: Apache-2.0. Sprites: Noto Color Emoji, OFL-1.1 ({}). Detector (detector/): AGPL-3.0, trained with "
    "ultralytics. Tokenizer: OpenAI CLIP, MIT."
)
# of each world: the card's title, what the model is, its bars, its licences
ABOUT = {
    "pocket": (
        "The pocket model",
        "A small Stable Diffusion (64 x 64 pixels, 20 classes of emoji) trained from scratch by `python -m sd_erase.pocket build`. "
        "It is a test bench: it knows its 20 classes, their synonyms, five backgrounds and nothing else.",
        scoring_pocket.BARS,
        _LICENCES.format("../sprites/LICENSE.txt"),
    ),
    "art": (
        "The pocket art model",
        "A small Stable Diffusion (128 x 128 pixels; 12 objects, 8 styles, 6 people) trained from scratch by "
        "`python -m sd_erase.pocket build --world art`. It is a test bench: it knows these, their names, five backgrounds and nothing else. "
        "Its artists and people are invented.",
        scoring_art.BARS,
        _LICENCES.format("../../sprites/LICENSE.txt"),
    ),
}


def scores(recipe: Recipe, folder: Path, target: Path, images: int = 20) -> dict[str, Any]:
    """Measure the pack on held-out scenes and sentence patterns, and write ``card.json`` and ``README.md`` beside it.

    Args:
        recipe: what it was built with.
        folder: the work folder, with the detector's validation scenes.
        target: the pack.
        images: generated images of each class.
    """
    found: dict[str, Any] = {"detector_map50": detector_map50(recipe, folder, target)}
    if recipe.world == "art":
        found |= scoring_art.art_scores(recipe, folder, target, images)
    else:
        found |= scoring_pocket.clip_scores(target) | scoring_pocket.generator_scores(target, images)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    card = {
        "recipe": asdict(recipe),
        "sampler": {"steps": STEPS, "guidance": GUIDANCE},
        "megabytes": round(size / 1e6, 1),
        "scores": found,
    }
    write_json_atomic(target / "card.json", card)
    write_text_atomic(target / "README.md", _card_text(card, recipe.world))
    for name, value in found.items():
        log.info("%s: %s", name, value)
    return card


def _card_text(card: dict[str, Any], name: str) -> str:
    title, about, bars, licences = ABOUT[name]
    rows = [f"| {name.replace('_', ' ')} | {value} | {bars.get(name, '')} |" for name, value in card["scores"].items()]
    return "\n".join([
        f"# {title}",
        "",
        about,
        "",
        f"Measured on held-out scenes and sentence patterns, {card['sampler']['steps']} DDIM steps, guidance {card['sampler']['guidance']:g}, "
        f"by the pack's own detector; the pack is {card['megabytes']} MB.",
        "",
        "| score | measured | bar |",
        "| --- | --- | --- |",
        *rows,
        "",
        "Recipe: " + ", ".join(f"{key} {value}" for key, value in card["recipe"].items()) + ".",
        "",
        licences,
        "",
    ])  # fmt: skip
