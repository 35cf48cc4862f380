"""The paper's pictures: what the figures hold, on a bench small enough for a test."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sd_erase import bases, components
from sd_erase.clip import load_towers
from sd_erase.errors import UserError
from sd_erase.metrics.tasks import embed_images, embed_texts
from sd_erase.pocket import variants, world
from sd_erase.reproduce import Recipe, architectures, generator, pictures, read_recipe
from sd_erase.reproduce import bench as benches
from sd_erase.reproduce.bench import Bench

TINY = {"train.steps": 2, "train.batch_size": 4, "train.validate_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture
def bench(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One folder for all tests: what one has trained the next one finds."""
    monkeypatch.setattr(benches, "CLASS_SCENES", {"train": 4, "validation": 2, "test": 3})
    monkeypatch.setattr(benches, "CAPTION_SCENES", {"train": 60, "validation": 40, "test": 60})
    bench = Bench(folder, device="cpu")
    bench.experiment_folder = folder / request.node.name
    return bench


def small(name: str, **sizes: Any) -> Recipe:
    """A bundled recipe with one erasure, one method of two steps and these sizes."""
    recipe = read_recipe(name, TINY)
    side, erasures = next(iter(recipe.concepts.items()))
    methods = {"CLIPErase": recipe.methods["CLIPErase"]}
    return dataclasses.replace(recipe, concepts={side: erasures[:1]}, methods=methods, sizes={**recipe.sizes, **sizes})


def embedded_images(svg: Path) -> int:
    return len(re.findall(r"<image ", svg.read_text(encoding="utf-8")))


def test_a_grid_has_a_row_for_each_encoder_and_the_same_prompts_for_all(bench: Bench) -> None:
    found = pictures.grids(small("figure4", prompts={"apple": ["an apple", "an apple and a dog"]}, across=1), bench)
    (svg,) = found.figures
    assert svg.with_suffix(".png").is_file()
    assert embedded_images(svg) == 2 * 2
    text = svg.read_text(encoding="utf-8")
    assert all(part in text for part in ("erased: apple", "an apple and a dog", "CLIPErase"))


def test_the_originals_images_of_one_concept_outlive_those_of_the_next(bench: Bench) -> None:
    from PIL import Image

    from sd_erase.reproduce.generator import Generator

    generator = Generator(bench)
    first = generator.draw(None, ["an apple"], 1, "grid")
    generator.draw(None, ["a dog"], 1, "grid")
    with Image.open(first[0]) as image:
        assert image.info["prompt"] == "an apple"


def test_heat_maps_lie_on_the_named_objects_before_the_erasure(bench: Bench) -> None:
    found = pictures.heat_maps(small("figure5", images=20, shown=2), bench)
    before = [row for row in found.rows if row["CLIP"] == "before"]
    assert [row["text names"] for row in before] == ["concept", "another object"]
    assert all(row["relevance in its box / chance"] > 2 for row in before)
    # two pictures; below each the grey picture and its map, for two texts before and after; and the colour bar
    assert embedded_images(found.figures[0]) >= 2 + 2 * 2 * 4


def test_tsne_places_images_and_texts_of_all_classes(bench: Bench) -> None:
    found = pictures.tsne(small("figure6", classes=4, images=3), bench)
    assert [row["CLIP"] for row in found.rows] == ["before", "after"]
    assert found.rows[0]["cosine, apple"] > 0.4
    text = found.figures[0].read_text(encoding="utf-8")
    assert "apple (erased)" in text and "apple: text" in text


def test_the_detection_rate_counts_images_and_has_an_interval(bench: Bench) -> None:
    found = generator.detection(small("table6", prompts=3, images=1), bench)
    assert [row["encoder"] for row in found.rows] == ["CLIP", "CLIPErase"]
    assert found.rows[0]["detected %"] == 100 and found.rows[0]["images"] == 3
    assert found.rows[0]["95 % interval"] == "43.9–100.0"  # Wilson's, of 3 of 3


def test_a_patch_variant_of_the_pocket_clip_starts_near_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SCENES", 128)
    own = load_towers(bases.resolve(str(variants.patch_clip(8, tmp_path))), "cpu", need_images=True)
    shipped = load_towers(bases.resolve("pocket"), "cpu", need_images=True)
    world.render(world.scene_of(["dog"], 3))[0].save(tmp_path / "dog.png")
    image = [str(tmp_path / "dog.png")]
    assert embed_images(own, image).allclose(embed_images(shipped, image), atol=1e-4)
    coarse = variants.patch_clip(16, tmp_path, steps=2)
    towers = load_towers(bases.resolve(str(coarse)), "cpu", need_images=True)
    assert towers.clip.config.vision_config.patch_size == 16
    assert embed_texts(towers, ["a dog"]).allclose(embed_texts(shipped, ["a dog"]), atol=1e-4)
    stamp = (coarse / "model.safetensors").stat().st_mtime_ns
    assert variants.patch_clip(16, tmp_path) == coarse and (coarse / "model.safetensors").stat().st_mtime_ns == stamp


def test_blip_goes_through_the_same_training_and_tasks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SCENES", 128)
    found = architectures.blip(small("table5", training_steps=2), bench)
    assert [row["method"] for row in found.rows] == ["BLIP", "BLIP + CLIPErase"]
    assert all(0 <= row["prediction, retain %"] <= 100 for row in found.rows)


def test_blip_embeds_as_transformers_own_model_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BlipForImageTextRetrieval

    from sd_erase.clip import read_pixels

    monkeypatch.setattr(variants, "SCENES", 128)
    source = variants.blip(bench.folder / "bench" / "models", 2)
    towers = load_towers(bases.resolve(str(source)), "cpu", need_images=True)
    world.render(world.scene_of(["dog"], 3))[0].save(bench.folder / "dog.png")
    images = [str(bench.folder / "dog.png")]
    captions = ["a photo of a dog", "a horse and a cat on the grass"]
    tokens = towers.tokenizer(captions, padding=True, return_tensors="pt")
    model = BlipForImageTextRetrieval.from_pretrained(source).eval()
    score = model(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_itm_head=False,
        pixel_values=read_pixels(towers.image_processor, images),
    ).itm_score  # fmt: skip
    assert (embed_images(towers, images) @ embed_texts(towers, captions).T).allclose(score, atol=1e-5)


def test_other_bases_must_name_their_models(bench: Bench) -> None:
    bench.base = dataclasses.replace(bench.base, source="elsewhere")
    for experiment, table in ((architectures.patches, "table8"), (architectures.blip, "table5")):
        with pytest.raises(UserError, match="--set"):
            experiment(read_recipe(table), bench)


def test_a_clip_folder_draws_no_images(folder: Path) -> None:
    with pytest.raises(UserError, match="no denoiser"):
        components.load_pipeline(bases.resolve(str(variants.patch_clip(8, folder))))


def test_what_was_erased_from_a_clip_alone_is_not_exported(folder: Path, tmp_path: Path) -> None:
    from sd_erase.config import ExportConfig, RunConfig
    from sd_erase.export.text_encoder import export
    from sd_erase.rundir import RunDir

    run = RunDir(tmp_path / "run")
    run.complete("train", "inputs", {})
    config = RunConfig(base=str(variants.patch_clip(8, folder)), export=ExportConfig(to="comfyui"))
    with pytest.raises(UserError, match="no image generator"):
        export(config, run)
