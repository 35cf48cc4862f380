"""Which words a base reads as a concept, and what a training does with them."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sd_erase import bases, resources
from sd_erase.cli import main, summary
from sd_erase.clip import load_towers
from sd_erase.concepts import Concept, concept_named
from sd_erase.concepts.typos import misspellings
from sd_erase.erasure import names
from sd_erase.erasure.pseudo_words import embedding, vocabulary
from sd_erase.erasure.stage import _told, without_names
from sd_erase.erasure.wordings import varied
from sd_erase.erasure.words import Words, other_words
from sd_erase.pairs import Pair
from sd_erase.pocket import world


@pytest.fixture(scope="module")
def towers() -> Any:
    return load_towers(bases.ROWS["pocket"], "cpu", need_images=False)


def single_words(name: str) -> set[str]:
    """The names, plurals and misspellings of a class of the world that are one token."""
    noun = world.BY_NAME[name]
    return {word for word in (*noun.words, *noun.plurals, *noun.misspellings) if " " not in word and "-" not in word}


@pytest.mark.parametrize(("name", "anchor"), [("dog", "object"), ("bus", "thing"), ("car", "item"), ("cat", "thing")])
def test_a_base_tells_every_name_of_one_token_and_no_other_class(towers: Any, name: str, anchor: str) -> None:
    concept = Concept(name=name, words=(name,))  # a card that knows one word
    found = set(names.find(towers, concept, anchor).of("vocabulary"))
    tokens = {word for word in single_words(name) if len(towers.tokenizer(word, add_special_tokens=False).input_ids) == 1}
    plurals = set(world.BY_NAME[name].plurals)
    assert tokens - {name} - plurals <= found
    others = {word for noun in world.NOUNS if noun.label != world.BY_NAME[name].label for word in (*noun.words, *noun.plurals)}
    assert not found & others


def test_what_a_card_keeps_is_never_its_name(towers: Any) -> None:
    bare = Concept(name="dog", words=("dog",))
    kept = dataclasses.replace(bare, neighbours=("pooch",), spared=("hound",))
    assert {"pooch", "hound"} <= set(names.find(towers, bare, "object").of("vocabulary"))
    assert not {"pooch", "hound"} & set(names.find(towers, kept, "object").of("vocabulary"))


def test_words_that_the_base_does_not_know_are_told_from_those_that_it_does(towers: Any) -> None:
    found = names.find(towers, concept_named("dog"), "object")
    assert {"dog", "puppy", "hound"} <= set(found.known) and not {"schnauzer", "corgi"} & set(found.known)
    assert all(name.along >= names.ALONG and name.distance <= found.reach for name in found.found)


def test_what_the_base_takes_for_nonsense_is_not_trained_on_as_the_concept(towers: Any) -> None:
    # the pocket model reads "schnauzer" as it reads "qxvzt": sent to the anchor, it would take every prompt with a strange word along
    found = names.find(towers, concept_named("dog"), "object")
    assert 0 < found.nonsense < names.KNOWN
    assert not {"schnauzer", "corgi"} & set(found.unknown)
    chosen = {Words.of(found, concept_named("dog")).choose(random.Random(number)) for number in range(300)}
    assert {"puppy", "hound"} <= chosen and not {"schnauzer", "corgi"} & chosen
    assert len(found.unknown) < 5 < len(found.card) - len(found.known)  # "black lab", of which it knows the colour
    half_known = dataclasses.replace(found, card=(names.Name("whelp", 0.4, 0.5, "card"), names.Name("mongrel", 0.1, 0.5, "card")))
    assert half_known.unknown == ("whelp",)


def test_words_that_stand_around_are_made_up_in_part(towers: Any) -> None:
    concept = concept_named("dog")
    around = other_words(towers, [concept], [Words.of(names.find(towers, concept, "object"), concept)])
    known = {towers.tokenizer.decode([token]).strip() for token in vocabulary(towers.tokenizer, embedding(towers.text).weight)}
    made_up = [word for word in around if word not in known]
    assert len(made_up) == pytest.approx(0.25 * len(around), rel=0.1)
    assert "dog" not in around and "umbrella" in around


def test_the_anchor_lies_at_the_start_of_the_way_and_the_concept_at_its_end(towers: Any) -> None:
    way = names.Way(towers, concept_named("dog"), "object")
    start, goal = way.measured(["object", "dog"], "card")
    assert (start.along, start.aside) == pytest.approx((0, 0), abs=1e-5)
    assert (goal.along, goal.aside) == pytest.approx((1, 0), abs=1e-3)


def test_an_encoder_that_still_reads_a_word_is_told(towers: Any) -> None:
    # the student is the original here: it reads all of them, and not a word for another thing
    left = names.still_read(towers, concept_named("dog"), "object", ["dog", "pooch", "umbrella"])
    assert [name.text for name in left] == ["dog", "pooch"]


def test_a_cheap_search_asks_a_wide_encoder_for_no_vocabulary(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "WIDE", 64)
    found = names.find(towers, Concept(name="cat", words=("cat",)), "thing", cheap=True)
    assert not found.of("vocabulary", "parts") and "catt" in found.of("misspelling")


def test_misspellings_of_three_letters_are_made_and_none_is_a_word_of_the_list() -> None:
    made = misspellings(["dog", "dogg", "guide dog"], random.Random(0))
    assert {"doog", "guide dogg"} <= set(made) and "dogg" not in made and len(made) == len(set(made))


def test_half_of_the_odd_words_are_kept_out_of_training(towers: Any) -> None:
    concept = concept_named("bicycle")
    words = Words.of(names.find(towers, concept, "object"), concept)
    assert words.held_out and not {*words.odd, *words.known} & set(words.held_out)
    rng = random.Random(0)
    assert not {words.choose(rng) for _ in range(500)} & set(words.held_out)
    assert {words.choose(rng, True) for _ in range(500)} & set(words.held_out)
    assert not {words.choose(rng, True) for _ in range(500)} & set(words.odd)


def test_captions_with_a_name_that_the_base_told_are_not_retained() -> None:
    concept = dataclasses.replace(concept_named("dog"), synonyms=("pooch",))
    pairs = [
        Pair("1", None, "a pooch on the grass", "retain", "train", None, (), "no concept"),
        Pair("2", None, "a cat on the grass", "retain", "train", None, (), "no concept"),
        Pair("3", None, "a dog on the grass", "forget", "train", "dog", ((2, 5),), "word: dog"),
    ]
    assert [pair.key for pair in without_names(pairs, [concept])] == ["2", "3"]


def test_varied_captions_hold_each_span_once_where_they_say() -> None:
    caption, spans = "A man with a red bicycle, near the bicycle's shop", ((17, 24), (35, 42))
    rng, seen = random.Random(0), set()
    for _ in range(300):
        text, places = varied(caption, spans, ("walrus", "blue"), rng)
        assert [text[start:stop] for start, stop in places] == ["bicycle", "bicycle"] and text.count("bicycle") == 2
        seen.add(text)
    assert len(seen) > 150 and any("walrus" in text for text in seen)
    assert varied("", (), (), rng) == ("", ())


def test_the_command_shows_what_the_card_lacks(tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("name: dog\nwords: [dog]\n", encoding="utf-8")
    runner = CliRunner()
    result = runner.invoke(main, ["names", "--concept-file", str(card), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    found = {name["text"]: name for name in told["concepts"]["dog"]["found"]}
    assert told["base"] == "pocket" and found["pooch"]["source"] == "vocabulary" and found["pooch"]["along"] > 0.85
    shown = runner.invoke(main, ["names", "dog"])
    assert "words that the card lacks: pooch" in shown.stdout
    wrong = runner.invoke(main, ["names"])
    assert wrong.exit_code == 2 and "No concept" in wrong.stderr


def test_states_do_not_depend_on_the_captions_beside(towers: Any) -> None:
    way = names.Way(towers, concept_named("dog"), "object")
    together = way.measured(["a very long word of many tokens indeed", "pooch"], "card")[1]
    (alone,) = way.measured(["pooch"], "card")
    assert torch.tensor([together.along, together.aside]) == pytest.approx(torch.tensor([alone.along, alone.aside]), abs=1e-4)


def test_a_run_says_what_the_card_lacks_and_which_words_its_encoder_still_reads(towers: Any) -> None:
    concept = Concept(name="dog", words=("dog",))
    told, warnings = _told(towers, concept, "object", names.find(towers, concept, "object"))  # the student is the original
    assert {"pooch", "dogg"} <= set(told["found"]) <= set(told["still_read"]) and told["held_out"]
    assert len(warnings) == 1 and "still reads" in warnings[0] and "as dog" in warnings[0]
    assert "names: dog → pooch, dogg" in summary("train", {"names": {"dog": "pooch, dogg"}, "read": {"dog": told}})
