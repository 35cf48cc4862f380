"""The embedded world and its model: reproducible scenes, the data set on disk, the pack as any diffusers model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sd_erase.bases import POCKET_FOLDER
from sd_erase.captions.pocket import IMAGES, TOKEN_FILE, read, render
from sd_erase.pocket import build, scoring_pocket, world


def test_a_scene_is_a_function_of_its_number() -> None:
    for number in (0, 1, 17):
        first, second = world.sample_scene(number), world.sample_scene(number)
        assert first == second
        assert numpy.array_equal(world.render(first)[0], world.render(second)[0])
    assert world.render(world.sample_scene(0))[0].size == (world.SIZE, world.SIZE)
    assert len({world.sample_scene(number).caption for number in range(300)}) > 250


def test_twins_show_the_same_objects_in_the_opposite_order() -> None:
    twins = [(world.sample_scene(number), world.sample_scene(number + 1)) for number in range(0, 400, 2)]
    several = [(left, right) for left, right in twins if len(set(left.slots)) > 1 and len(left.slots) == len(right.slots) == 2]
    assert len(several) > 60
    assert all(left.slots == right.slots[::-1] and left.background == right.background for left, right in several)


def test_the_first_named_object_stands_left_and_boxes_hold_the_objects() -> None:
    scene = world.scene_of(["apple", "bicycle"], 3)
    picture, boxes = world.render(scene)
    assert scene.caption.lower().index("apple") < scene.caption.lower().index("bicycle")
    assert [name for name, _ in boxes] == ["apple", "bicycle"]
    assert boxes[0][1][2] <= boxes[1][1][2] and all(0 <= side <= world.SIZE for _, box in boxes for side in box)
    left, top, right, bottom = (int(side) for side in boxes[0][1])
    red = numpy.asarray(picture)[top:bottom, left:right].reshape(-1, 3).mean(0)
    assert red[0] > red[2] + 30  # the apple is there, and red


def test_held_out_patterns_never_occur_in_training() -> None:
    marks = ("together with", "rests alongside", "that waits by", "snapshot", "can be found", "somebody left")
    trained = [world.sample_scene(number).caption.lower() for number in range(3000)]
    assert not any(mark in caption for caption in trained for mark in marks)
    held_out = [world.scene_of(["dog", "cat"], number).caption.lower() for number in range(20)]
    assert all(any(mark in caption for mark in marks) for caption in held_out)


def test_an_anchor_leaves_its_place_empty() -> None:
    scenes = [world.sample_scene(number) for number in range(2000)]
    empty = [scene for scene in scenes if None in scene.slots]
    assert len(empty) > 100
    for scene in empty[:50]:
        assert len(world.render(scene)[1]) == len(scene.objects) == len(scene.slots) - 1


def test_every_word_of_the_world_has_its_own_vector_and_a_strange_one_has_none() -> None:
    tokenizer, known = build.tokenizer(), set(build.known_ids())
    for word in ("bicycle", "velocipede", "apple", "honeycrisp", "an object", "red"):
        assert set(tokenizer(word).input_ids) <= known
    assert not set(tokenizer("qzx helicopter", add_special_tokens=False).input_ids) & known
    compact = build.compact_ids(numpy.array([[49406, 320, 49407]]), sorted(known))
    assert compact.max() < len(known)


def test_the_data_set_has_flickr30ks_layout_and_is_the_same_everywhere(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    token_file = render(first, scenes=12)
    render(second, scenes=12)
    assert token_file == first / TOKEN_FILE
    assert token_file.read_bytes() == (second / TOKEN_FILE).read_bytes()
    images = sorted(path.name for path in (first / IMAGES).iterdir())
    assert len(images) == 12
    captions = list(read(first))
    assert len(captions) == 60 and captions[0].key == f"{images[0]}#0"
    assert all(Path(str(caption.image)).is_file() for caption in captions)
    assert not any(world.UNKNOWN in caption.text for caption in captions)


def test_the_pack_is_small_and_without_pickles() -> None:
    files = [path for path in POCKET_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".txt", ".md"}


def test_the_pack_loads_as_any_other_model() -> None:
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_FOLDER, safety_checker=None)
    assert len(pipeline.tokenizer) == 49_408 and pipeline.tokenizer("a bicycle").input_ids == [49406, 320, 11652, 49407]
    stored = load_file(POCKET_FOLDER / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in stored)
    state = pipeline.text_encoder.state_dict()
    key = next(key for key in state if key.endswith("layers.3.mlp.fc2.weight"))
    assert torch.equal(state[key].half(), stored["text_model.encoder.layers.3.mlp.fc2.weight"])
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_the_card_states_the_bars_and_meets_them() -> None:
    card = json.loads((POCKET_FOLDER / "card.json").read_text(encoding="utf-8"))
    assert {name: card["scores"][name] for name, bar in build.BARS.items() if card["scores"][name] < bar} == {}
    text = (POCKET_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(str(value) in text for value in card["scores"].values())


def test_one_prompt_a_class_shows_that_class() -> None:
    """A quick look that the shipped weights are the ones of the card, which `pytest -m slow` measures in full."""
    from sd_erase.detection import load_detector

    detector, pipeline = load_detector("pocket"), build.load_pack(POCKET_FOLDER)
    prompts = [f"a photo of {world.with_article(name)}" for name in world.CLASSES]
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=15, guidance_scale=4.0, generator=generators).images
    found = [{each.label for each in one} for one in detector.detect(images)]
    missed = [name for name, labels in zip(world.CLASSES, found, strict=True) if world.BY_NAME[name].label not in labels]
    assert len(missed) <= 1, missed


@pytest.mark.slow
def test_the_card_is_what_is_measured() -> None:
    card = json.loads((POCKET_FOLDER / "card.json").read_text(encoding="utf-8"))["scores"]
    measured = scoring_pocket.clip_scores(POCKET_FOLDER) | scoring_pocket.generator_scores(POCKET_FOLDER, 20)
    for name in set(build.BARS) & set(measured):
        assert measured[name] == pytest.approx(card[name], abs=0.01), name


QUICK: dict[str, Any] = {"scenes": 64, "clip_steps": 2, "vae_steps": 2, "decoder_steps": 2, "unet_steps": 3, "unet_batch": 4}


def test_a_build_step_resumes_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, 6)

    def stop(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, 6, stop)
    steps: list[int] = []
    found = train(parts, 6, steps.append)
    assert steps == [4, 5]
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    train(parts, 6, lambda step: pytest.fail(f"step {step} was done again"))


def train(folder: Path, steps: int, tell: Any = lambda step: None) -> dict[str, torch.Tensor]:
    """A few steps of `build.fit` on a small regression."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)

    def loss_of(step: int) -> torch.Tensor:
        tell(step)
        return model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean()

    return build.fit("toy", folder, model, loss_of, steps=steps, learning_rate=0.01, warmup=2, ema_decay=0.5, checkpoint_every=2)


def test_folding_the_latents_statistics_changes_no_reconstruction() -> None:
    torch.manual_seed(0)
    images = numpy.random.default_rng(0).integers(0, 255, (2048, 64, 64, 3), dtype=numpy.uint8)
    model = build.vae_model().eval()
    pixels = build.pixels(images[:4])
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mean).sample
        build.fold_statistics(model, images)
        latents = model.encode(build.pixels(images[:64])).latent_dist.mean
        after = model.decode(latents[:4]).sample
    assert torch.allclose(before, after, atol=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_whole_build_runs_at_toy_size(tmp_path: Path) -> None:
    """All steps but the detector, which has ultralytics' own trainer."""
    recipe = dataclasses.replace(build.Recipe(), **QUICK)
    build.train_clip(recipe, tmp_path)
    build.train_decoder(recipe, tmp_path)
    build.train_unet(recipe, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"clip.safetensors", "vae.safetensors", "decoder.safetensors", "latents.safetensors", "unet.safetensors"} <= names
    assert not any("checkpoint" in name for name in names)
    assert len(build.full_clip(recipe, tmp_path).state_dict()) > 100
