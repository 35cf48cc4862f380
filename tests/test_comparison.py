"""Probes and the table of methods, on the pocket model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from sd_erase import bases
from sd_erase.captions.pocket import render
from sd_erase.comparison import Recipe, compare, read_recipe
from sd_erase.comparison import render as as_markdown
from sd_erase.concepts import Concept, concept_named
from sd_erase.errors import UserError
from sd_erase.probes import Coherence, probes, psnr, unlisted_words
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
    assert [line.split(" | ")[0] for line in table.splitlines()[-3:]] == ["| original", "| token", "| fast"]
    assert (tmp_path / "bench" / "contact-bicycle.png").is_file()
    encoder = tmp_path / "bench" / "runs" / "bicycle" / "fast-seed0" / "encoder" / "text_encoder" / "model.safetensors"
    written = encoder.stat().st_mtime_ns
    assert compare(recipe, tmp_path / "bench")["rows"] == result["rows"]
    assert encoder.stat().st_mtime_ns == written
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
        ("concepts: [apple]\nmethods: {a: }\nimagess: 3\n", "at most"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_recipe(path)


def test_one_concept_and_one_seed_need_no_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("concepts: apple\nmethods: {a: }\nseeds: 3\n", encoding="utf-8")
    recipe = read_recipe(path)
    assert (recipe.concepts, recipe.seeds, recipe.methods) == (("apple",), (3,), {"a": {}})


def test_a_concept_that_nobody_lists_has_no_unlisted_words() -> None:
    assert unlisted_words(Concept("zebra", words=("zebra",))) == []
