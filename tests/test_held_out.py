"""Prompts for concepts that no list ships for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_erase import bases
from sd_erase.asked import MADE_PROMPTS, MADE_STRANGERS, prompt_files
from sd_erase.captions import held_out, pocket, synthetic
from sd_erase.concepts import load_concepts
from sd_erase.config import GenerateConfig, HarvestConfig, RunConfig
from sd_erase.pairs import harvest, read_pairs, write_prompts
from sd_erase.prompts import read_prompts
from sd_erase.rundir import RunDir

KINDS = [("dog", "object"), ("zorp machine", "object"), ("van gogh", "style"), ("taylor swift", "person"), ("nudity", "nudity")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("base", ["pocket", "sd15"])
def test_sentences_name_the_concept_or_do_not(name: str, kind: str, base: str) -> None:
    concepts = load_concepts(RunConfig(concepts=(name,), kind=kind, exact=True))
    row = bases.resolve(base)
    named, strange = held_out.naming(concepts, row, 50), held_out.strangers(concepts, row, 10)
    assert len(set(named)) == 50 and len(set(strange)) == 10
    for text in named:
        matches, spared = concepts[0].scan(text)
        assert matches and not spared, text
    assert not any(any(concepts[0].scan(text)) for text in strange)
    assert named == held_out.naming(concepts, row, 50)
    used = {held_out.text_key(text) for text in named[:20]}
    assert not used & {held_out.text_key(text) for text in held_out.naming(concepts, row, 50, used)}


def test_several_concepts_share_the_places() -> None:
    concepts = load_concepts(RunConfig(concepts=("dog", "zorp machine"), exact=True))
    named = held_out.naming(concepts, bases.resolve("pocket"), 20)
    assert [sum(bool(concept.find(text)) for text in named) for concept in concepts] == [10, 10]
    assert not any(
        any(concept.scan(text)) for concept in concepts for text in held_out.strangers(concepts, bases.resolve("sd15"), 10)
    )


def test_no_data_set_that_is_made_here_uses_the_patterns() -> None:
    patterns = {template for texts in held_out.SCENES for template in texts}
    assert not patterns & {template for texts in synthetic.SCENES for template in texts}


@pytest.mark.parametrize("dataset", ["pocket", "synthetic"])
def test_the_documented_example_writes_prompts_that_no_pair_contains(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`harvest --write-prompts FILE -n 50`, the readme's example: on the pocket's scenes every caption is of an image of a pair."""
    monkeypatch.setattr(pocket.render, "__defaults__", (100, pocket.FIRST_SEED, None))  # scenes
    monkeypatch.setattr(synthetic, "FORGET", 60)
    monkeypatch.setattr(synthetic, "RETAIN", 60)
    config = RunConfig(concepts=("bicycle",), device="cpu", harvest=HarvestConfig(dataset=dataset))
    run = RunDir(tmp_path / "run")
    harvest(config, run)
    result = write_prompts(config, run, tmp_path / "held-out.txt", 50)
    lines = [prompt.text for prompt in read_prompts(tmp_path / "held-out.txt")]
    (concept,) = load_concepts(config)
    assert len(set(lines)) == result["prompts"] == 50 and all(concept.find(line) for line in lines)
    assert not {held_out.text_key(line) for line in lines} & {held_out.text_key(pair.caption) for pair in read_pairs(run)}


def test_a_run_without_prompts_takes_the_bundled_list_or_makes_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    assert prompt_files(RunConfig(concepts=("bicycle", "apple")), run) == (("bicycle", "apple"), [])
    assert prompt_files(RunConfig(concepts=("dog",), generate=GenerateConfig(prompts=("x.txt",))), run) == (("x.txt",), [])
    files, notes = prompt_files(RunConfig(concepts=("bicycle", "dog")), run)
    assert (
        files == ("bicycle", str(run.prompts)) and "No list of prompts ships for dog" in notes[0] and str(run.prompts) in notes[0]
    )
    made = [prompt.text for prompt in read_prompts(run.prompts)]
    dog, bicycle = load_concepts(RunConfig(concepts=("dog", "bicycle")))
    assert len(made) == MADE_PROMPTS + MADE_STRANGERS
    assert all(dog.find(text) for text in made[:MADE_PROMPTS])
    assert not any(dog.find(text) or bicycle.find(text) for text in made[MADE_PROMPTS:])
    before = run.prompts.stat().st_mtime_ns
    assert prompt_files(RunConfig(concepts=("bicycle", "dog")), run)[0] == files and run.prompts.stat().st_mtime_ns == before


def test_a_bundled_list_is_not_taken_for_another_thing_of_its_name(tmp_path: Path) -> None:
    """A card "apple" of one's own that is the firm's names no prompt of the fruit's list."""
    card = tmp_path / "firm.yaml"
    card.write_text("{name: apple, words: [apple inc], labels: [laptop]}", encoding="utf-8")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    files, _ = prompt_files(RunConfig(concept_file=str(card)), run)
    assert files == (str(run.prompts),) and "apple inc" in read_prompts(files[0])[0].text.lower()
