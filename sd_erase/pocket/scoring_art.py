"""What the art model can do, measured on held-out scenes and sentence patterns by its own judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd_erase.pocket import world
from sd_erase.pocket.art import cast, scenes
from sd_erase.pocket.corpus import as_images, pixels
from sd_erase.pocket.packed import GUIDANCE, SCORED_SEED, STEPS, detector_of, load_pack, towers_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS

BARS = {
    "detector_map50": 0.99,
    "style_judge": 0.99,
    "style": 0.98,
    "object": 0.97,
    "person": 0.97,
    "two_objects_in_a_style_both": 0.90,
}
BATCH = 32
WORLD = WORLDS["art"]


class StyleJudge:
    """The pack's image classifier, loaded as any transformers model."""

    def __init__(self, target: Path) -> None:
        from transformers import AutoModelForImageClassification

        self._model = AutoModelForImageClassification.from_pretrained(target / "style", dtype=torch.float32).eval()
        self.labels = [self._model.config.id2label[number] for number in range(self._model.config.num_labels)]

    @torch.no_grad()
    def judge(self, pictures: np.ndarray) -> list[str]:
        """The manner of each picture [N, 128, 128, 3] in uint8."""
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        return [self.labels[int(best)] for part in parts for best in self._model(pixel_values=pixels(part)).logits.argmax(1)]


def psnr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio (dB) of each pair of pictures [N, H, W, 3] in uint8."""
    error = np.square(first.astype(np.float32) - second.astype(np.float32)).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-6))


def art_scores(recipe: Recipe, folder: Path, target: Path, images: int) -> dict[str, Any]:
    """All scores of the pack but its detector's.

    Args:
        images: generated images of each object, style and person.
    """
    return _renders(target) | _clip_scores(target) | _generator_scores(target, images)


@torch.no_grad()
def _renders(target: Path) -> dict[str, float]:
    """The style's judge and the autoencoder on renders of the held-out patterns."""
    found = [scenes.sample_scene(SCORED_SEED + number, held_out=True, noise=False) for number in range(360)]
    pictures = np.stack([scenes.pixels(scene)[0] for scene in found])
    right = [said == scene.style for said, scene in zip(StyleJudge(target).judge(pictures), found, strict=True)]
    autoencoder = load_pack(target, WORLD).vae
    parts = [pixels(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    decoded = np.concatenate([as_images(autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample) for part in parts])
    return {"style_judge": round(float(np.mean(right)), 4), "autoencoder_psnr": round(float(psnr(pictures, decoded).mean()), 2)}


@torch.no_grad()
def _clip_scores(target: Path) -> dict[str, float]:
    """Zero-shot top-1 of the CLIP among objects (plain), artists (over all objects) and people, on renders."""
    from sd_erase.clip import encode, image_embeddings, text_embeddings

    towers = towers_of(target, WORLD)

    def top1(some: Sequence[scenes.Scene], texts: list[str], right: list[int]) -> float:
        picture = pixels(np.stack([scenes.pixels(scene)[0] for scene in some]))
        said = text_embeddings(towers.clip, encode(towers.text, towers.tokens(texts), (-1,))[1])
        best = (image_embeddings(towers.clip, picture) @ said.T).argmax(1)
        return round(float((best == torch.tensor(right)).float().mean()), 4)

    objects = [(name, number) for name in cast.OBJECTS for number in range(8)]
    people = [(name, number) for name in cast.PERSON_OF for number in range(8)]
    styles = [(style.name, name) for style in cast.STYLES for name in cast.OBJECTS]
    return {
        "zero_shot_object": top1(
            [scenes.scene_of([name], SCORED_SEED + number) for name, number in objects],
            [f"a picture of {scenes.mention(name, _rng(), plain=True)}" for name in cast.OBJECTS],
            [cast.OBJECTS.index(name) for name, _ in objects],
        ),
        "zero_shot_style": top1(
            [scenes.scene_of([name], SCORED_SEED, style=style) for style, name in styles],
            [f"a picture by {style.artist}" for style in cast.STYLES],
            [[style.name for style in cast.STYLES].index(name) for name, _ in styles],
        ),
        "zero_shot_person": top1(
            [scenes.scene_of([name], SCORED_SEED + number) for name, number in people],
            [f"a picture of {name}" for name in cast.PERSON_OF],
            [list(cast.PERSON_OF).index(name) for name, _ in people],
        ),
    }


def _rng() -> Any:
    import random

    return random.Random(0)


def _generator_scores(target: Path, count: int) -> dict[str, Any]:
    """Rates in generated images of held-out sentence patterns; every prompt is drawn once, from its own seed."""
    detector, judge, pipeline = detector_of(target, WORLD), StyleJudge(target), load_pack(target, WORLD)

    def draw(captions: list[str]) -> tuple[list[set[str]], list[str]]:
        """Of each caption's image: the labels that are detected, and the manner."""
        labels: list[set[str]] = []
        manners: list[str] = []
        for start in range(0, len(captions), BATCH):
            some = captions[start : start + BATCH]
            generators = [torch.Generator().manual_seed(SCORED_SEED + start + number) for number in range(len(some))]
            pictures = pipeline(some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
            labels += [{each.label for each in found} for found in detector.detect(pictures)]
            manners += judge.judge(np.stack([np.asarray(picture) for picture in pictures]))
        return labels, manners

    def measured(some: list[scenes.Scene]) -> tuple[list[list[bool]], list[bool]]:
        labels, manners = draw([scene.caption for scene in some])
        seen = [[WORLD.label(name) in found for name in scene.objects] for scene, found in zip(some, labels, strict=True)]
        return seen, [said == scene.style for scene, said in zip(some, manners, strict=True)]

    result: dict[str, Any] = {}

    def rates(name: str, groups: dict[str, list[bool]]) -> None:
        every = {key: float(np.mean(values)) for key, values in groups.items()}
        worst = min(every, key=lambda key: every[key])
        result.update({name: round(float(np.mean([value for values in groups.values() for value in values])), 4),
                       f"{name}_worst": round(every[worst], 4), f"{name}_worst_is": worst})  # fmt: skip

    def chunks(values: list[bool], names: Sequence[str]) -> dict[str, list[bool]]:
        return {name: values[place * count : (place + 1) * count] for place, name in enumerate(names)}

    seen, _ = measured([scenes.scene_of([name], SCORED_SEED + number) for name in cast.OBJECTS for number in range(count)])
    rates("object", chunks([all(row) for row in seen], cast.OBJECTS))
    names = [style.name for style in cast.STYLES]
    one = [
        scenes.scene_of([cast.OBJECTS[number % len(cast.OBJECTS)]], SCORED_SEED + number, style=name)
        for name in names
        for number in range(count)
    ]
    seen, right = measured(one)
    rates("style", chunks(right, names))
    rates("object_in_a_style", chunks([all(row) for row in seen], names))
    seen, _ = measured([scenes.scene_of([name], SCORED_SEED + number) for name in cast.PERSON_OF for number in range(count)])
    rates("person", chunks([all(row) for row in seen], list(cast.PERSON_OF)))
    pairs = [
        scenes.scene_of(two, SCORED_SEED + number, style=names[number % len(names)]) for number, two in enumerate(_pairs(160))
    ]
    seen, right = measured(pairs)
    result["two_objects_in_a_style_each"] = round(float(np.mean(seen)), 4)
    result["two_objects_in_a_style_both"] = round(float(np.mean([all(row) for row in seen])), 4)
    result["two_objects_in_a_style_style"] = round(float(np.mean(right)), 4)
    beside = [
        scenes.scene_of([name, cast.OBJECTS[number % len(cast.OBJECTS)]], SCORED_SEED + number)
        for name in cast.PERSON_OF
        for number in range(count)
    ]
    seen, _ = measured(beside)
    result["person_beside_object_both"] = round(float(np.mean([all(row) for row in seen])), 4)
    unlisted = {"nickname": "a picture of a {o} by {s.nickname}", "manner": "{m} image of a {o}"}
    for name, pattern in unlisted.items():
        asked = [(style, cast.OBJECTS[number % 12]) for style in cast.STYLES for number in range(count)]
        _, manners = draw([pattern.format(o=thing, s=style, m=world.with_article(style.manners[0])) for style, thing in asked])
        result[name] = round(float(np.mean([said == style.name for (style, _), said in zip(asked, manners, strict=True)])), 4)
    for name in ("first_name", "role"):
        asked_people = [person for person in cast.PEOPLE for _ in range(count)]
        labels, _ = draw([f"a picture of {getattr(person, name)}" for person in asked_people])
        result[name] = round(
            float(np.mean([WORLD.label(person.name) in found for person, found in zip(asked_people, labels, strict=True)])), 4
        )
    return result


def _pairs(count: int) -> list[list[str]]:
    """Different objects, two by two."""
    every = [[first, second] for first in cast.OBJECTS for second in cast.OBJECTS if first != second]
    order = np.random.default_rng(0).permutation(len(every))
    return [every[order[number % len(every)]] for number in range(count)]
