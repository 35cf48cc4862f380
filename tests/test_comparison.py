"""Probes and the table of methods, on the pocket model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from sd_erase import bases
from sd_erase.captions.pocket import render
from sd_erase.cli import main
from sd_erase.comparison import Recipe, compare, read_recipe
from sd_erase.comparison_recipe import config_of
from sd_erase.comparison_table import method_row
from sd_erase.comparison_table import render as as_markdown
from sd_erase.concepts import Concept, concept_named, load_concepts
from sd_erase.detection import Detection, Detector
from sd_erase.errors import UserError
from sd_erase.evaluation import Picture
from sd_erase.probes import Coherence, answers, probes, psnr, unlisted_words
from sd_erase.resources import names

POCKET = bases.resolve("pocket")


def test_the_groups_ask_what_they_say() -> None:
    apple = concept_named("apple")
    groups = probes([apple], {"apple": "object"}, POCKET)
    assert len(groups["named"]) == len(groups["anchor"]) == 50
    assert all(apple.find(prompt) for prompt in groups["named"])
    assert not any(apple.find(prompt) for prompt in groups["anchor"])
    assert "A small object on the sand, with an umbrella and a little dog." in groups["anchor"]
    assert unlisted_words(apple) == ["pippin", "honeycrisp", "red fruit"]
    assert len(groups["unlisted"]) == 30
    assert not any(any(apple.scan(prompt)) for prompt in groups["unlisted"])
    assert all("apple phone" in prompt or "apple laptop" in prompt for prompt in groups["senses"])
    assert len(groups["untouched"]) == 100
    assert not any("apple" in prompt.lower() or "pippin" in prompt.lower() for prompt in groups["untouched"])


def test_many_concepts_at_once_leave_untouched_prompts_too() -> None:
    concepts = [concept_named(name) for name in ("apple", "bicycle", "chair", "elephant", "dog")]
    groups = probes(concepts, {concept.name: "object" for concept in concepts}, POCKET)
    assert len(set(groups["untouched"])) == 100
    assert not any(any(concept.scan(prompt)) for concept in concepts for prompt in groups["untouched"])


def test_a_class_without_a_list_is_asked_for_in_held_out_sentences() -> None:
    from sd_erase.pocket import world

    named = probes([concept_named("dog")], {"dog": "object"}, POCKET)["named"]
    assert len(set(named)) == 50
    openings = [template.split("{0}")[0] for template in (*world.ONE_HELD_OUT, *world.TWO_HELD_OUT)]
    assert all(any(prompt.lower().startswith(opening.lower()) for opening in openings) for prompt in named)
    unknown = probes([concept_named("zebra")], {"zebra": "object"}, POCKET)["named"]  # of no class: from its card's templates
    assert len(set(unknown)) > 10 and all(concept_named("zebra").find(prompt) for prompt in unknown)


def test_psnr(tmp_path: Path) -> None:
    for name, level in (("a", 100), ("b", 100), ("c", 110)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{name}.png")
    same, other = psnr([tmp_path / "a.png"] * 2, [tmp_path / "b.png", tmp_path / "c.png"])
    assert same == 100
    assert other == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)


def test_coherence_knows_what_is_in_an_image(tmp_path: Path) -> None:
    from sd_erase.pocket import world

    def scenes(name: str, first: int) -> list[Path]:
        paths = []
        for number in range(24):
            paths.append(tmp_path / f"{name}-{first + number}.png")
            world.render(world.scene_of([name], first + number))[0].save(paths[-1])
        return paths

    coherence = Coherence(POCKET, "cpu")
    dogs, more_dogs, cars = (coherence.features(scenes(*each)) for each in (("dog", 0), ("dog", 100), ("car", 0)))
    assert coherence.clip_score(dogs, ["a photo of a dog"] * 24) > coherence.clip_score(dogs, ["a photo of a car"] * 24) + 20
    assert coherence.frechet(dogs, dogs) == pytest.approx(0, abs=1)
    assert coherence.frechet(dogs, more_dogs) < coherence.frechet(dogs, cars) / 2


def test_a_comparison_trains_draws_counts_and_resumes(tmp_path: Path) -> None:
    render(tmp_path / "bench" / "scenes", scenes=150)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A bicycle beside a dog in a park.\nA cat sits by a bicycle.\nA woman with a bicycle\n", encoding="utf-8")
    recipe = Recipe(
        ("bicycle",),
        {"token": {"train.objective": "token"}, "fast": {"train.objective": "fast"}},
        images={"named": 2},
        settings={"generate.prompts": [str(prompts)], "device": "cpu"},
    )
    result = compare(recipe, tmp_path / "bench")
    token, fast = result["rows"]
    assert result["original"]["bicycle"]["named"]["target"]["count"] >= 4
    assert token["named"]["n"] == fast["named"]["n"] == 6
    assert token["named"]["rate"] <= 0.2
    assert token["clip_score"] > 60
    assert result["original"]["bicycle"]["anchor"]["companions"]["n"] == 6
    table = as_markdown(result)
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][-3:] == [
        "| original",
        "| token",
        "| fast",
    ]
    assert "Judge: pocket (" in table.splitlines()[-1]
    assert (tmp_path / "bench" / "contact-bicycle.png").is_file()
    encoder = tmp_path / "bench" / "runs" / "bicycle" / "fast-seed0" / "encoder" / "text_encoder" / "model.safetensors"
    written = encoder.stat().st_mtime_ns
    done: list[str] = []
    assert compare(recipe, tmp_path / "bench", done=done)["rows"] == result["rows"] and not done
    assert encoder.stat().st_mtime_ns == written
    own = {"concepts": ["bicycle"], "methods": recipe.methods, "images": recipe.images, "settings": recipe.settings}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    again = CliRunner().invoke(main, ["compare", str(tmp_path / "own.yaml"), "--output", str(tmp_path / "bench")])
    assert again.exit_code == 0 and "holds all of this, finished with these settings: nothing was done again" in again.stderr
    (tmp_path / "bench" / "comparison.md").unlink()
    compare(recipe, tmp_path / "bench", done=done)
    assert done == ["tables"] and (tmp_path / "bench" / "comparison.md").is_file()
    answers = tmp_path / "bench" / "runs" / "bicycle" / "fast-seed0" / "probes.json"
    kept = answers.read_text(encoding="utf-8")
    answers.write_text(kept.replace('"count": 0', '"count": 1').replace('"count": 6', '"count": 5'), encoding="utf-8")
    assert answers.read_text(encoding="utf-8") != kept  # somebody edited them: they are counted again
    assert compare(recipe, tmp_path / "bench")["rows"] == result["rows"]

    for path in (tmp_path / "bench" / "runs" / "bicycle" / "token-seed0" / "probes" / "named").glob("*-seed1.png"):
        path.unlink()  # as where a method joins when the recipe asks for fewer images than at first
    fewer = compare(dataclasses.replace(recipe, images={"named": 1}), tmp_path / "bench")
    assert [row["named"]["n"] for row in fewer["rows"]] == [3, 3]


def test_an_anchor_that_makes_a_word_an_object_asks_for_no_more_companions(tmp_path: Path) -> None:
    """ "An apple laptop" names no apple; "an apple thing", which the original is asked for in its place, would."""
    render(tmp_path / "bench" / "scenes", scenes=150)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("An apple laptop beside a dog in a park.\n", encoding="utf-8")
    recipe = Recipe(
        ("laptop",),
        {"token": {"train.objective": "token"}},
        images={"named": 2},
        settings={"generate.prompts": [str(prompts)], "device": "cpu"},
    )
    result = compare(recipe, tmp_path / "bench")
    original = result["original"]["laptop"]
    assert [original[group]["companions"]["n"] for group in ("named", "anchor", "anchor, other seeds")] == [2, 2, 2]


@pytest.mark.parametrize("name", names("recipes"))
def test_the_bundled_recipes_can_be_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.concepts
    assert recipe.methods


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("concepts: [apple]\n", "concepts and methods"),
        ("concepts: [apple]\nmethods: {a: {train.stepps: 3}}\n", "stepps"),
        ("concepts: [apple\n", "not YAML"),
        ("concepts: [apple]\nmethods: [a]\n", "methods must be a mapping"),
        ("concepts: [apple]\nmethods: {a: }\nseeds: [x]\n", "seeds must be a list"),
        ("concepts: [apple]\nmethods: {a: }\nimages: {named: x}\n", "images must be a mapping"),
        ("concepts: [apple]\nmethods: {a: }\nimages: {nmed: 2}\n", "images must give a number for named"),
        ("concepts: [apple]\nmethods: {a: {nosection.x: 3}}\n", "Setting nosection.x does not exist"),
        ("concepts: [apple]\nmethods: {a: }\nattacked: -1\n", "attacked must be a whole number"),
        ("concepts: [apple]\nmethods: {a: }\nattacked: true\n", "attacked must be a whole number"),
        ("concepts: [apple]\nmethods: {a: }\nprompts: 1000000\n", "prompts must be a whole number from 0 to 100000"),
        ("concepts: [apple]\nmethods: {a: }\nimages: {named: 2, senses: -1}\n", "images of senses must be a whole number"),
        ("concepts: [apple]\nmethods: {a: }\nimages: {named: true}\n", "images of named must be a whole number"),
        (
            "concepts: [apple]\nmethods: {a: }\nseeds: [0, 4294967296]\n",
            "seeds must be a list, each a whole number from 0 to 4294967295",
        ),
        ("concepts: [apple]\nmethods: {a: }\nseeds: [0, -1]\n", "seeds must be a list"),
        ("concepts: [apple]\nmethods: {a: }\nseeds: [true]\n", "seeds must be a list"),
        ("concepts: [apple]\nmethods: {a: }\nseeds: [0, 1, 0]\n", "seeds names 0 twice"),
        ("concepts: [apple, dog, apple]\nmethods: {a: }\n", "concepts names 'apple' twice"),
        ("concepts: []\nmethods: {a: }\n", "concepts must be a list"),
        ("concepts: [apple]\nmethods: {}\n", "methods names none"),
        ("concepts: [apple]\nmethods: {a: }\ntitle: 3\n", "title must be a text"),
        ("concepts: [apple]\nmethods: {a: }\nsettings: {seed: 3}\n", "settings sets seed, which the recipe itself decides"),
        ("concepts: [apple]\nmethods: {a: {concepts: [dog]}}\n", "method 'a' sets concepts"),
        ("concepts: [apple]\nmethods: {a: }\nsettings: {generate.images_per_prompt: 3}\n", "images: {named: 8}"),
        ("concepts: [apple]\nmethods: {a: }\nsettings: {attack.prompts: [x]}\n", "attacked: 5"),
        ("concepts: [apple]\nmethods: {a: }\nsettings: {export.to: lora}\n", "exports nothing"),
        ("concepts: [apple]\nmethods: {a: }\nsettings: {evaluate.trust_pickle: true}\n", "yours to give"),
        ("concepts: [apple]\nmethods: {a: {train.steps: 3}, b: {train.batch_size: 0}}\n", "method 'b'.*batch_size is 0"),
        ("concepts: [apple]\nmethods: {a: }\nimagess: 3\n", "at most"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_recipe(path)


def test_the_last_cell_is_looked_at_before_the_first_is_trained(tmp_path: Path) -> None:
    """What only the model knows (its width), a name to ask about, a seed past the last image's, a concept that nothing can find."""
    sound = Recipe(("bicycle",), {"first": {"train.objective": "token"}}, settings={"device": "cpu"})
    for change, words in (
        (
            {"methods": {**sound.methods, "last": {"train.objective": "sd", "train.lora_rank": 129}}},
            "Method 'last' on 'bicycle'.* 128 wide",
        ),
        ({"concepts": ("bicycle", "bycicle")}, "did you mean bicycle"),
        ({"concepts": ("bicycle", "zorp"), "settings": {"exact": True}}, "'zorp' has no label"),
        ({"seeds": (0, 2**32 - 1)}, "seed is 4294967295"),
        ({"settings": {"generate.clip_skip": 4}}, "clip_skip is 4"),
        ({"settings": {"generate.prompts": ["nowhere.txt"]}}, "nowhere.txt"),
        ({"settings": {"evaluate.detector": "nowhere"}}, "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            compare(dataclasses.replace(sound, **change), tmp_path / "bench")  # type: ignore[arg-type]
        assert not (tmp_path / "bench").exists()


def test_a_cell_erases_its_own_concept_of_a_file_and_keeps_what_is_excluded(tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text("[{name: apple, labels: [apple]}, {name: zorp}]\n", encoding="utf-8")
    settings = {"concept_file": str(tmp_path / "cards.yaml"), "harvest.exclude": ["pear"]}
    config = config_of(Recipe(("apple", "zorp"), {"m": {}}, settings=settings), tmp_path, "m", "apple", 0)
    assert config.concepts == ("apple",) and [concept.name for concept in load_concepts(config)] == ["apple"]
    assert config.harvest.exclude[0] == "pear" and "pippin" in config.harvest.exclude


def test_one_concept_and_one_seed_need_no_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("concepts: apple\nmethods: {a: }\nseeds: 3\n", encoding="utf-8")
    recipe = read_recipe(path)
    assert (recipe.concepts, recipe.seeds, recipe.methods) == (("apple",), (3,), {"a": {}})


def test_a_concept_that_nobody_lists_has_no_unlisted_words() -> None:
    assert unlisted_words(Concept("zebra", words=("zebra",))) == []


def test_images_of_a_single_colour_are_left_out_of_a_comparison_and_said() -> None:
    """A method whose numbers overflow draws black images, in which no detector finds the concept."""

    class Labels:
        labels = frozenset({"bicycle", "dog"})

    def box(label: str) -> Detection:
        return Detection("", label, 0.9, (0.0, 0.0, 8.0, 8.0))

    prompts = ["a bicycle next to a dog", "a bicycle and a dog", "a dog and a bicycle"]
    found = [[], [box("bicycle"), box("dog")], [box("dog")]]
    pictures = [Picture(flat, "") for flat in (True, False, False)]
    bicycle = concept_named("bicycle")
    counted = answers("named", prompts, found, pictures, [bicycle], cast(Detector, Labels()))
    assert (counted["target"], counted["companions"]["n"], counted["flat"]) == ({"count": 1, "n": 2}, 2, 1)
    nothing = answers("named", prompts, found, [Picture(True, "")] * 3, [bicycle], cast(Detector, Labels()))
    assert (nothing["target"], nothing["flat"]) == ({"count": 0, "n": 0}, 3)

    def cell(method: str, named: dict[str, Any]) -> dict[str, Any]:
        groups = {"named": named}
        return {"method": method, "seed": 0, "concepts": "bicycle", "groups": groups, "original": {"anchor": counted}, "seconds": 1.0,
                "peak_memory_mb": None, "clip_similarity": None}  # fmt: skip

    cells = [cell("good", {**counted, "flat": 0}), cell("black", nothing)]
    recipe = {"concepts": ["bicycle"], "seeds": [0], "images": {"named": 1}}
    rows = [method_row(each["method"], [each]) for each in cells]
    original = {"bicycle": {"named": {**counted, "flat": 0}, "anchor": {**counted, "flat": 0}}}
    text = as_markdown({"title": "t", "recipe": recipe, "original": original, "cells": cells, "rows": rows})
    (black,) = (line for line in text.splitlines() if line.startswith("| black"))
    assert (
        {black.split("|")[column].strip() for column in (2, 4)} == {"–"}
        and "black: 3 images of a single colour" in text
        and "good:" not in text
    )
    (first,) = (line for line in text.splitlines() if line.startswith("| original"))
    assert first.split("|")[4].strip() == "100 %" and first.split("|")[7].strip() == "–"  # no untouched prompt was asked
    alone = {
        "bicycle": {"anchor": {**counted, "companions": {"count": 0, "n": 0}}}
    }  # by a judge that knows nothing but the concept
    text = as_markdown({"title": "t", "recipe": recipe, "original": alone, "cells": cells, "rows": rows})
    assert next(line for line in text.splitlines() if line.startswith("| original")).split("|")[4].strip() == "–"
