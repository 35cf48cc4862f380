"""Relevance over patches, on scenes whose boxes are known."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sd_erase import bases
from sd_erase.clip import Towers, encode, image_embeddings, load_towers, text_embeddings
from sd_erase.erasure.losses import forgetting
from sd_erase.metrics.relevance import relevance
from sd_erase.metrics.tasks import embed_texts
from sd_erase.pocket import world
from sd_erase.reproduce.pictures import lift


def scenes(concept: str, count: int, first: int = 0) -> tuple[list[Any], list[tuple[float, ...]]]:
    """Pictures of the concept beside another object, and the concept's box in each."""
    rng, pictures, boxes = random.Random(first), [], []
    others = [name for name in world.CLASSES if name not in (concept, "woman", "man")]
    for number in range(count):
        names = [concept, rng.choice(others)]
        rng.shuffle(names)
        picture, found = world.render(world.scene_of(names, first + number))
        pictures.append(picture)
        boxes.append(dict(found)[concept])
    return pictures, boxes


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers(bases.resolve("pocket"), "cpu", need_images=True)


def lifts(towers: Towers, pictures: list[Any], boxes: list[tuple[float, ...]], concept: str) -> list[float]:
    pixels = towers.image_processor(images=pictures, return_tensors="pt").pixel_values
    maps = relevance(towers.clip, pixels, embed_texts(towers, [f"a photo of {world.with_article(concept)}"] * len(pictures)))
    return [lift(values, *(edge / 8 for edge in box)) for values, box in zip(maps, boxes, strict=True)]


def test_the_relevance_lies_on_the_named_object_until_both_towers_are_erased(towers: Towers) -> None:
    pictures, boxes = scenes("apple", 24, 900)
    attention = towers.clip.vision_model.config._attn_implementation
    before = lifts(towers, pictures, boxes, "apple")
    assert towers.clip.vision_model.config._attn_implementation == attention != "eager"
    assert min(before) > 1 and sum(before) / len(before) > 3
    shown, _ = scenes("apple", 32)
    pixels, ids = (
        towers.image_processor(images=shown, return_tensors="pt").pixel_values,
        towers.tokens(["a photo of an apple"])[:, :12],
    )
    towers.clip.requires_grad_(True)
    optimizer = torch.optim.Adam(towers.clip.parameters(), 3e-4)
    for _ in range(12):
        optimizer.zero_grad()
        text = text_embeddings(towers.clip, encode(towers.text, ids, (-1,))[1])
        forgetting(image_embeddings(towers.clip, pixels), text).backward()
        optimizer.step()
    towers.clip.requires_grad_(False)
    after = lifts(towers, pictures, boxes, "apple")
    assert sum(after) / len(after) < 1


def test_a_map_is_not_negative_and_leaves_the_model_as_it_was(towers: Towers) -> None:
    vision = towers.frozen_clip.vision_model
    own, hooks = vision.config._attn_implementation, [len(layer.self_attn._forward_hooks) for layer in vision.encoder.layers]
    maps = relevance(towers.frozen_clip, torch.zeros(2, 3, 64, 64), torch.nn.functional.normalize(torch.ones(2, 128), dim=-1))
    assert maps.shape == (2, 8, 8) and (maps >= 0).all()
    assert vision.config._attn_implementation == own
    assert [len(layer.self_attn._forward_hooks) for layer in vision.encoder.layers] == hooks
    assert not any(parameter.requires_grad for parameter in towers.frozen_clip.parameters())


def test_the_relevance_of_two_layers_by_hand() -> None:
    """The class token's row of (1 + A2) (1 + A1), A the rectified, averaged gradient times attention, in each image for itself."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 20}, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8
        )
    ).eval()
    clip.requires_grad_(False)
    pixels, texts = torch.randn(2, 3, 8, 8), torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    found = relevance(clip, pixels, texts)
    assert found.shape == (2, 2, 2)
    clip.vision_model.set_attn_implementation("eager")
    for image, text, values in zip(pixels, texts, found, strict=True):
        kept: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output[1]))
            for layer in clip.vision_model.encoder.layers
        ]
        similarity = clip.logit_scale.exp() * (image_embeddings(clip, image[None].requires_grad_()) * text).sum()
        first, second = (
            (gradient * attention).clamp(min=0)[0].mean(0)
            for gradient, attention in zip(torch.autograd.grad(similarity, kept), kept, strict=True)
        )
        by_hand = ((torch.eye(5) + second) @ (torch.eye(5) + first))[0, 1:].reshape(2, 2)
        torch.testing.assert_close(values, by_hand.detach())
        for hook in hooks:
            hook.remove()


def test_lift_counts_cells_in_part() -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert lift(values, 0, 0, 1, 1) == pytest.approx(4)
    assert lift(values, 0.5, 0, 1.5, 1) == pytest.approx(2)
    assert lift(torch.ones(4, 4), 1, 0, 3, 2.5) == pytest.approx(1)
    assert lift(values, 1, 1, 2, 2) == 0
