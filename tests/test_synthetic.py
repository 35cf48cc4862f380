"""Synthetic captions: every kind of concept, nothing on the wrong side, the same each time; images only where they are needed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd_erase import bases, drawing, resources
from sd_erase.captions import open_dataset, synthetic
from sd_erase.concepts import Concept, all_cards, load_concepts
from sd_erase.config import HarvestConfig, RunConfig, TrainConfig
from sd_erase.errors import UserError
from sd_erase.pairs import harvest, read_pairs
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir

KINDS = [("bicycle", "object"), ("orange", "object"), ("van gogh", "style"), ("cubism", "style"), ("jane roe", "person"),
         ("nudity", "nudity"), ("xylophone", "object")]  # fmt: skip


def captions_of(concepts: list[Concept], seed: int = 0) -> list[str]:
    """As a base has them that tells every word from every other."""
    return [caption.text for caption in synthetic.read(Path("nowhere"), concepts=concepts, seed=seed)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_kind_of_concept_has_captions_on_both_sides(name: str, kind: str) -> None:
    (concept,) = load_concepts(RunConfig(concepts=(name,), kind=kind))
    captions = captions_of([concept])
    assert len(captions) == len(set(captions))
    named = [text for text in captions if concept.find(text)]
    assert captions[: len(named)] == named  # the captions to forget come first, and the others never name it
    assert len(named) > 400 and len(captions) - len(named) > 1500
    assert not any(concept.scan(text)[1] for text in named)  # never in a sense that the card spares
    found = {match.text.lower() for text in named for match in concept.find(text)}
    assert len(found) > len(set(concept.phrases)) * 0.7
    kept = captions[len(named) :]
    assert all(any(neighbour in text.lower() for text in kept) for neighbour in concept.neighbours)
    if concept.spared:
        assert any(concept.scan(text)[1] for text in kept)
    assert not any("{" in text or "  " in text for text in captions)


def test_what_the_base_reads_as_the_concept_is_not_retained() -> None:
    concepts = load_concepts(RunConfig(concepts=("bicycle",)))
    captions = [caption.text for caption in open_dataset("synthetic", bases.ROWS["pocket"], Path("nowhere"), concepts=concepts)]
    kept = [text for text in captions if not concepts[0].find(text)]
    # the pocket model has one state for all words that it does not know, "tandem" among them
    for known, word in ((True, "elephant"), (True, "laptop"), (False, "tricycle"), (False, "surfboard"), (False, "bike lane")):
        assert any(re.search(rf"\b{word}", text.lower()) for text in kept) == known, word
    assert any("surfboard" in text.lower() for text in captions_of(concepts))
    assert len(kept) > 1500


def test_the_base_reads_the_words_on_the_device_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def device(name: str) -> object:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(resources, "device", device)
    synthetic.vocabulary.cache_clear()
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    harvest(RunConfig(concepts=("bicycle",), device="mps", harvest=HarvestConfig("synthetic")), run)
    assert set(asked) == {"mps"}


def test_captions_depend_on_the_seed_alone() -> None:
    concepts = load_concepts(RunConfig(concepts=("bicycle",)))
    assert captions_of(concepts) == captions_of(concepts)
    assert set(captions_of(concepts, 1)) != set(captions_of(concepts))


def test_several_concepts_are_never_retained_for_each_other() -> None:
    concepts = load_concepts(RunConfig(concepts=("dog", "cat")))
    captions = captions_of(concepts)
    named = [text for text in captions if any(concept.find(text) for concept in concepts)]
    assert captions[: len(named)] == named
    assert all(sum(bool(concept.find(text)) for text in named) > 400 for concept in concepts)


def test_all_cards_at_once_leave_something_to_retain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred concepts leave no card's object: what stays are the cards' neighbours."""
    concepts = [card for card in all_cards().values() if card.kind == "object"]
    monkeypatch.setattr(synthetic, "FORGET", 3)
    monkeypatch.setattr(synthetic, "RETAIN", 60)
    captions = captions_of(concepts)
    kept = [text for text in captions if not any(concept.find(text) for concept in concepts)]
    assert len(kept) > 50 and len(captions) - len(kept) >= 2 * len(concepts)
    monkeypatch.setattr(synthetic, "common_nouns", lambda: ("thing",))
    synthetic.vocabulary.cache_clear()
    with pytest.raises(UserError, match="Hardly a thing is left .* erase fewer at once"):
        captions_of(concepts)
    synthetic.vocabulary.cache_clear()


def test_a_concept_that_its_own_card_spares_everywhere_is_refused(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("name: widget\nspared: ['widget unless {xylophone}']\n", encoding="utf-8")
    with pytest.raises(UserError, match="Templates give no caption that names concept 'widget'"):
        captions_of(load_concepts(RunConfig(concept_file=str(card))))


@pytest.mark.parametrize(
    ("concept", "base", "dataset"),
    [("bicycle", "pocket", "pocket"), ("van gogh", "pocket", "synthetic"), ("bicycle", "sd15", "synthetic")],
)
def test_auto_takes_the_pocket_scenes_for_objects_of_the_pocket_base_alone(
    concept: str, base: str, dataset: str, tmp_path: Path
) -> None:
    from sd_erase.captions import choose_dataset

    concepts = load_concepts(RunConfig(concepts=(concept,)))
    assert choose_dataset("auto", bases.ROWS[base], concepts) == dataset
    assert choose_dataset("jsonl:x", bases.ROWS[base], concepts) == "jsonl:x"


def config(**train: object) -> RunConfig:
    return RunConfig(
        concepts=("bicycle",), device="cpu", train=TrainConfig(**train),
        harvest=HarvestConfig(dataset="synthetic", max_forget=4, max_retain=6),
    )  # fmt: skip


def test_an_objective_that_works_from_text_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw", lambda *_: pytest.fail("images were drawn"))
    run = RunDir(tmp_path)
    manifest = harvest(config(), run)
    assert manifest["images"] == 0 and manifest["dataset"] == "synthetic"
    assert {pair.image for pair in read_pairs(run)} == {None}
    assert {reason.split(":")[0] for reason in manifest["reasons"]["retain"]} == {"names", "neighbour", "spared sense"}


def test_images_are_drawn_once_for_an_objective_that_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    harvest(config(), run)
    sizes: list[int] = []
    draw = drawing._draw
    monkeypatch.setattr(drawing, "_draw", lambda pipeline, jobs, *rest: sizes.append(len(jobs)) or draw(pipeline, jobs, *rest))
    for changes in ({"objective": "paper"}, {"objective": "paper", "towers": "both"}):  # both need images: harvested once
        assert harvest(config(**changes), run)["images"] == 10
        assert sum(sizes) == 10
    pairs = read_pairs(run)
    for pair in pairs:
        with Image.open(pair.image or "") as image:
            assert image.size == (64, 64) and image.text["prompt"] == pair.caption
        assert Path(pair.image or "").is_relative_to(run.data.absolute())
    Path(pairs[3].image or "").unlink()
    base, captions = bases.ROWS["pocket"], [(pair.key, pair.caption) for pair in pairs]
    import torch

    synthetic.draw(captions, run.data, base, 0, torch.device("cpu"), NoProgress())
    assert sum(sizes) == 11 and Path(pairs[3].image or "").is_file()  # what is missing is drawn again, and no more
    other = dataclasses.replace(base, steps=base.steps + 1)
    synthetic.draw(captions[:2], run.data, other, 0, torch.device("cpu"), NoProgress())
    assert sum(sizes) == 13  # by another setting, all
