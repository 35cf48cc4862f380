"""The bundled prompt lists: what an evaluation needs of them, for the pocket base and for any other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from sd_erase import resources
from sd_erase.concepts import all_cards, concept_named
from sd_erase.pocket import build, world
from sd_erase.prompts import Prompt, read_prompts

TARGETS = ("apple", "bicycle", "chair", "elephant")
COUNT = 50
FOLDER = Path(__file__).parents[1] / "prompts"


@pytest.fixture(scope="module")
def lists() -> dict[str, list[str]]:
    return {target: [prompt.text for prompt in read_prompts(FOLDER / f"{target}.txt")] for target in TARGETS}


@pytest.fixture(scope="module")
def known_words() -> set[str]:
    """The words of the pocket world's grammar, without its misspellings and plurals, which no list should hold."""
    odd = {form.split()[-1] for noun in world.NOUNS for form in noun.plurals}
    odd |= {form.split()[0] for noun in world.NOUNS for form in noun.misspellings}
    return {word.strip(".,") for word in world.vocabulary().split()} - odd


def named(prompt: str) -> dict[str, list[int]]:
    """Every card whose words `prompt` uses, with where; "person" is left to the cards "woman" and "man"."""
    found = {card.name: [match.start for match in card.find(prompt)] for card in all_cards().values()}
    return {name: places for name, places in found.items() if places and name != "person"}


def others(prompt: str, target: str) -> list[str]:
    """The classes besides the target; the brand's devices count as devices."""
    return sorted(set(named(prompt)) - {target})


def words(prompt: str) -> list[str]:
    return re.findall(r"[a-z\-]+", prompt.lower())


def test_the_four_lists_ship_and_are_found_by_name() -> None:
    assert set(TARGETS) <= set(resources.names("prompts"))
    for target in TARGETS:
        assert read_prompts(target) == read_prompts(f"prompts/{target}.txt") == read_prompts(FOLDER / f"{target}.txt")


@pytest.mark.parametrize("target", TARGETS)
def test_a_list_tells_what_it_is_for_and_under_which_licence(target: str) -> None:
    lines = (FOLDER / f"{target}.txt").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert lines[: len(head)] == head and 2 <= len(head) <= 3
    assert target in head[0] and "Apache-2.0" in head[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_list_has_fifty_different_prompts_without_seeds_of_their_own(target: str) -> None:
    prompts = read_prompts(FOLDER / f"{target}.txt")
    assert len(prompts) == COUNT
    assert all(prompt == Prompt(prompt.text) for prompt in prompts)
    assert len({" ".join(words(prompt.text)) for prompt in prompts}) == COUNT


def test_no_sentence_stands_in_two_lists(lists: dict[str, list[str]]) -> None:
    sentences = Counter(" ".join(words(prompt)) for prompts in lists.values() for prompt in prompts)
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_prompt_names_its_target_exactly_once(target: str, lists: dict[str, list[str]]) -> None:
    concept = concept_named(target)
    assert [prompt for prompt in lists[target] if len(concept.find(prompt)) != 1] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_prompt_names_one_or_two_other_classes_of_the_pocket_world_and_nothing_else(
    target: str, lists: dict[str, list[str]]
) -> None:
    counts = Counter(len(others(prompt, target)) for prompt in lists[target])
    assert set(counts) == {1, 2}
    assert 35 <= counts[1] <= 41  # three objects are harder to draw, so most prompts have two
    strangers = {name for prompt in lists[target] for name in others(prompt, target)} - set(world.CLASSES)
    assert strangers == set()


@pytest.mark.parametrize("target", TARGETS)
def test_every_object_is_named_once_and_has_a_detector_label_of_its_own(target: str, lists: dict[str, list[str]]) -> None:
    for prompt in lists[target]:
        found = named(prompt)
        assert all(len(places) == 1 for places in found.values()), prompt
        labels = [world.BY_NAME[name].label for name in found]
        assert len(set(labels)) == len(labels), prompt  # a woman beside a man would be one "person" to the detector


@pytest.mark.parametrize("target", TARGETS)
def test_a_list_uses_most_of_the_other_classes(target: str, lists: dict[str, list[str]]) -> None:
    used = {name for prompt in lists[target] for name in others(prompt, target)}
    assert len(used) >= 14


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_comes_first_in_about_half_of_the_prompts(target: str, lists: dict[str, list[str]]) -> None:
    first = sum(min(named(prompt).items(), key=lambda item: item[1])[0] == target for prompt in lists[target])
    assert 20 <= first <= 30  # the pocket base draws in the order of naming: both sides are measured


@pytest.mark.parametrize("target", TARGETS)
def test_a_fifth_of_the_prompts_name_the_target_by_another_word_of_its_card(target: str, lists: dict[str, list[str]]) -> None:
    matches = [match for prompt in lists[target] for match in concept_named(target).find(prompt)]
    assert 7 <= sum(match.reason.startswith("synonym") for match in matches) <= 13


@pytest.mark.parametrize("target", TARGETS)
def test_every_prompt_is_a_sentence_of_moderate_length(target: str, lists: dict[str, list[str]]) -> None:
    assert [prompt for prompt in lists[target] if not 6 <= len(words(prompt)) <= 18] == []
    assert [prompt for prompt in lists[target] if not re.fullmatch(r"[A-Z][a-z]*[a-z ,\-]*[a-z]\.?", prompt)] == []
    assert [prompt for prompt in lists[target] if re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt, re.IGNORECASE)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_word_is_one_of_the_pocket_worlds(target: str, lists: dict[str, list[str]], known_words: set[str]) -> None:
    assert {word for prompt in lists[target] for word in words(prompt)} - known_words == set()


@pytest.mark.parametrize("target", TARGETS)
def test_no_prompt_contradicts_the_order_in_which_the_pocket_base_draws(target: str, lists: dict[str, list[str]]) -> None:
    assert [prompt for prompt in lists[target] if "to the right" in prompt.lower()] == []


def test_every_token_is_known_to_the_pocket_base_and_no_prompt_is_cut_off(lists: dict[str, list[str]]) -> None:
    tokenizer, known = build.tokenizer(), set(build.known_ids())
    for prompts in lists.values():
        for prompt, ids in zip(prompts, tokenizer(prompts, truncation=False)["input_ids"], strict=True):
            assert set(ids) <= known, (prompt, tokenizer.convert_ids_to_tokens(sorted(set(ids) - known)))
            assert len(ids) <= 77


def test_four_prompts_name_the_fruit_beside_a_device_of_the_brand(lists: dict[str, list[str]]) -> None:
    apple = concept_named("apple")
    spared = [prompt for prompt in lists["apple"] if apple.scan(prompt)[1]]
    assert len(spared) == 4
    for prompt in spared:
        assert set(others(prompt, "apple")) <= {"laptop", "cell phone"}, prompt
        assert len(apple.find(prompt)) == 1
