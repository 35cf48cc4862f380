"""What the pocket model can do, measured on held-out scenes and sentence patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd_erase.pocket import world
from sd_erase.pocket.corpus import pixels
from sd_erase.pocket.packed import GUIDANCE, SCORED_SEED, STEPS, detector_of, load_pack, towers_of

BARS = {"detector_map50": 0.99, "zero_shot_top1": 0.99, "one_object": 0.98, "one_object_worst": 0.93, "two_objects_each": 0.93,
        "two_objects_both": 0.85}  # fmt: skip


@torch.no_grad()
def clip_scores(target: Path) -> dict[str, float]:
    """Zero-shot top-1 over the 20 classes (held-out one-object scenes), and image to text R@1 over 150 two-object scenes."""
    from sd_erase.clip import encode, image_embeddings, text_embeddings

    towers = towers_of(target)

    def embed(scenes: list[world.Scene], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        picture = pixels(np.stack([np.asarray(world.render(scene)[0]) for scene in scenes]))
        return image_embeddings(towers.clip, picture), text_embeddings(
            towers.clip, encode(towers.text, towers.tokens(captions), (-1,))[1]
        )

    single = [world.scene_of([name], SCORED_SEED + number) for name in world.CLASSES for number in range(20)]
    images, texts = embed(single, [f"a photo of {world.with_article(name)}" for name in world.CLASSES])
    top1 = ((images @ texts.T).argmax(1) == torch.arange(len(world.CLASSES)).repeat_interleave(20)).float().mean()
    pairs = [world.scene_of(names, SCORED_SEED + number) for number, names in enumerate(_two_objects(150))]
    images, texts = embed(pairs, [scene.caption for scene in pairs])
    recall = ((images @ texts.T).argmax(1) == torch.arange(len(pairs))).float().mean()
    return {"zero_shot_top1": round(float(top1), 4), "retrieval_r1_of_150_pairs": round(float(recall), 4)}


def _two_objects(count: int) -> list[list[str]]:
    """Pairs of classes with different detector labels."""
    rng = np.random.default_rng(0)
    pairs = [[a, b] for a in world.CLASSES for b in world.CLASSES if world.BY_NAME[a].label != world.BY_NAME[b].label]
    return [pairs[index] for index in rng.permutation(len(pairs))[:count]]


def generator_scores(target: Path, count: int) -> dict[str, Any]:
    """Detection rates in generated images of held-out sentence patterns; every prompt is drawn once, from its own seed."""
    detector, pipeline = detector_of(target), load_pack(target)

    def draw(captions: list[str], labels: list[list[str]], absent: str = "") -> tuple[list[list[bool]], int]:
        found: list[list[bool]] = []
        strangers = 0
        for start in range(0, len(captions), 32):
            generators = [
                torch.Generator().manual_seed(SCORED_SEED + start + number) for number in range(len(captions[start : start + 32]))
            ]
            pictures = pipeline(
                captions[start : start + 32], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators
            ).images
            for wanted, detections in zip(labels[start : start + 32], detector.detect(pictures), strict=True):
                seen = {each.label for each in detections}
                found.append([label in seen for label in wanted])
                strangers += bool(seen - set(wanted)) if not absent else absent in seen
        return found, strangers

    result: dict[str, Any] = {}
    one = [world.scene_of([name], SCORED_SEED + number) for name in world.CLASSES for number in range(count)]
    found, _ = draw([scene.caption for scene in one], [[world.BY_NAME[name].label for name in scene.objects] for scene in one])
    by_class = {name: float(np.mean(found[i * count : (i + 1) * count])) for i, name in enumerate(world.CLASSES)}
    worst = min(by_class, key=lambda name: by_class[name])
    result |= {
        "one_object": round(float(np.mean(found)), 4),
        "one_object_worst": round(by_class[worst], 4),
        "one_object_worst_class": worst,
    }
    pairs = [world.scene_of(names, SCORED_SEED + number) for number, names in enumerate(_two_objects(300))]
    found, strangers = draw(
        [scene.caption for scene in pairs], [[world.BY_NAME[name].label for name in scene.objects] for scene in pairs]
    )
    result |= {"two_objects_each": round(float(np.mean(found)), 4), "two_objects_both": round(float(np.mean([all(row) for row in found])), 4),
               "two_objects_unnamed": round(strangers / len(pairs), 4)}  # fmt: skip
    words = [(word, noun.label) for noun in world.NOUNS for word in noun.words[1:]]
    found, _ = draw(
        [f"a photo of {world.with_article(word)}" for word, _ in words for _ in range(4)],
        [[label] for _, label in words for _ in range(4)],
    )
    result["synonyms"] = round(float(np.mean(found)), 4)
    for name in ("apple phone", "apple laptop"):
        found, fruits = draw([f"an {name} on a table"] * 40, [[world.BY_NAME[name].label]] * 40, absent="apple")
        result[name.replace(" ", "_")] = round(float(np.mean(found)), 4)
        result[f"{name.replace(' ', '_')}_shows_fruit"] = fruits / 40
    _, strangers = draw(
        [phrase for phrase in ("an object on the grass", "something in a room", "a thing on the street") for _ in range(20)],
        [[]] * 60,
    )
    result["anchor_shows_an_object"] = round(strangers / 60, 4)
    return result
