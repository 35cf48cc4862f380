"""The default objective: which caption stands in for a forget caption, and which state shall equal which."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch

from sd_erase import bases
from sd_erase.clip import encode, load_towers
from sd_erase.concepts import concept_named
from sd_erase.concepts.typos import misspell
from sd_erase.erasure import sd
from sd_erase.erasure.method import Batch
from sd_erase.erasure.sd import StableDiffusionErasure, alignment, redirect
from sd_erase.pairs import Pair


def spans_of(caption: str, word: str) -> list[tuple[int, int]]:
    return [(match.start, match.end) for match in concept_named(word).find(caption)]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer")


@pytest.mark.parametrize(
    ("caption", "anchor", "target"),
    [
        ("A man rides a bicycle.", "object", "A man rides an object."),
        ("The bicycle and a dog", "object", "The object and a dog"),
        ("a bicycle next to a bike", "thing", "a thing next to a thing"),
        ("an old bicycle", "object", "an old object"),
        ("a bicycle by the sea", "", " by the sea"),
        ("a dog near a bicycle", "an orange", "a dog near an orange"),
        ("red_bicycle, dog", "object", "red_object, dog"),
        ("riding_a_bicycle, park", "object", "riding_an_object, park"),  # tags
        ("on_the_bicycle", "object", "on_the_object"),
    ],
)
def test_the_anchor_takes_the_concepts_place_with_a_fitting_article(caption: str, anchor: str, target: str) -> None:
    found = redirect(caption, spans_of(caption, "bicycle"), anchor)
    assert " ".join(found.target.split()) == " ".join(target.split())
    assert all(found.target[start:stop].endswith(anchor) for start, stop in found.target_spans)


def aligned(tokenizer: object, caption: str, anchor: str, word: str = "bicycle") -> list[tuple[str, str]]:
    """Pairs of caption token and target token, up to the end-of-text token."""
    pair = redirect(caption, spans_of(caption, word), anchor)
    own = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
    other = tokenizer.convert_ids_to_tokens(tokenizer(pair.target).input_ids)
    return [(token, other[place]) for token, place in zip(own, alignment(tokenizer, pair, 77), strict=False)]


def test_words_map_to_themselves_and_the_concept_to_the_anchor(tokenizer: object) -> None:
    found = aligned(tokenizer, "a man rides a bicycle in a park", "object")
    assert ("bicycle</w>", "object</w>") in found
    assert ("a</w>", "an</w>") in found  # the article before it
    rest = [(own, other) for own, other in found if own != "bicycle</w>" and (own, other) != ("a</w>", "an</w>")]
    assert all(own == other for own, other in rest)
    assert found[-1] == ("<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("caption", ["red_bicycle, dog, park", "riding_mountain_bike, 1girl", r"old_bike_\(toy\), night"])
def test_in_tags_the_words_alone_map_to_the_anchor(tokenizer: object, caption: str) -> None:
    found = aligned(tokenizer, caption, "object")
    words = {"bicycle</w>", "mountain</w>", "_</w>", "bike</w>"}
    moved = [own for own, other in found if other == "object</w>"]
    assert moved and set(moved) <= words
    rest = [(own, other) for own, other in found if other != "object</w>"]
    assert all(own == other for own, other in rest) and len(rest) > 5


def test_a_longer_concept_shifts_what_follows(tokenizer: object) -> None:
    caption = "a man with a mountain bike in a park"
    pair = redirect(caption, spans_of(caption, "bicycle"), "object")
    places = alignment(tokenizer, pair, 77)
    found = aligned(tokenizer, caption, "object")
    assert ("park</w>", "park</w>") in found and found[-1] == ("<|endoftext|>", "<|endoftext|>")
    assert len(places) == 77 and places == sorted(places) and places[-1] <= 76


def test_removal_aligns_what_remains(tokenizer: object) -> None:
    found = aligned(tokenizer, "a dog beside a bicycle in a park", "")
    assert ("bicycle</w>", "beside</w>") in found  # nothing is left for it but the word before
    assert [pair for pair in found if pair[0] in ("in</w>", "park</w>")] == [("in</w>", "in</w>"), ("park</w>", "park</w>")]


def test_the_same_caption_has_no_redirect_error_against_itself(tokenizer: object) -> None:
    caption = "a bicycle beside a bicycle"
    assert alignment(tokenizer, redirect(caption, spans_of(caption, "bicycle"), "bicycle"), 77) == list(range(77))


def test_misspelling_changes_one_place_and_doubles_in_words_of_three_letters() -> None:
    rng = random.Random(0)
    assert misspell("tv", rng) == "tv"
    assert {misspell("bus", rng) for _ in range(50)} == {"buus", "buss"}
    words = {misspell("bicycle", rng) for _ in range(50)}
    assert len(words) > 5 and all(abs(len(word) - 7) <= 1 for word in words)


def test_only_linear_weights_of_the_text_tower_train_and_every_term_is_there() -> None:
    towers = load_towers(bases.ROWS["pocket"], torch.device("cpu"), need_images=True)
    concept = concept_named("bicycle")
    method = StableDiffusionErasure()
    trained = method.prepare(towers, [concept], {"bicycle": "object"}, both_towers=False)
    layers = towers.text.config.num_hidden_layers
    assert len(trained) == 6 * layers and all(weight.ndim == 2 for weight in trained)
    assert not any(value.requires_grad for value in (*towers.frozen_text.parameters(), *towers.clip.vision_model.parameters()))
    assert not towers.clip.text_projection.weight.requires_grad and not towers.clip.logit_scale.requires_grad

    forget = [Pair("1#0", None, "a man rides a bicycle", "forget", "train", "bicycle", ((14, 21),), "word: bicycle")]
    retain = [Pair("2#0", None, "a dog on the grass", "retain", "train", None, (), "no concept")]
    embedding = torch.nn.functional.normalize(torch.ones(1, 128), dim=-1)
    batch = Batch(forget, retain, embedding, embedding, None, None, random.Random(0))
    terms = method.losses(towers, batch)
    assert set(terms) == set(method.default_weights)
    for name in ("preserve", "protect", "empty"):
        assert terms[name].item() == pytest.approx(0.0, abs=1e-6)  # nothing has moved yet
    assert terms["redirect"].item() > 0.01
    sum(terms.values()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


def test_layer_minus_one_is_behind_the_norm_and_minus_two_before_it() -> None:
    towers = load_towers(bases.ROWS["pocket"], torch.device("cpu"), need_images=False)
    ids = towers.tokens(["a dog", ""])
    with torch.no_grad():
        (last, before), pooled = encode(towers.text, ids, (-1, -2))
        output = towers.text(input_ids=ids, output_hidden_states=True)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(before, output.hidden_states[-2])
    assert ids.shape == (2, 77) and pooled.shape == (2, 128)


def test_a_misspelling_is_forgotten_only_where_the_base_reads_it_as_the_word() -> None:
    towers = load_towers(bases.ROWS["pocket"], torch.device("cpu"), need_images=True)
    method = StableDiffusionErasure()
    method.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, both_towers=False)
    words = method.words["bicycle"]
    assert "bus" not in words.odd and words.odd and words.held_out and not set(words.odd) & set(words.held_out)
    assert not {*words.odd, *words.held_out} & set(concept_named("bicycle").phrases)
    assert any("car" in caption for caption in method.protected)  # a neighbour


def test_augmented_captions_still_name_the_concept_where_the_spans_say() -> None:
    towers = load_towers(bases.ROWS["pocket"], torch.device("cpu"), need_images=True)
    method, concept = StableDiffusionErasure(), concept_named("bicycle")
    method.prepare(towers, [concept], {"bicycle": "object"}, both_towers=False)
    words = method.words["bicycle"]
    names = {*concept.phrases, *words.known, *words.odd}
    rng, caption = random.Random(0), "A man {with} a bicycle near a bike."
    seen = set()
    for _ in range(200):
        found = method.augmented(caption, tuple(spans_of(caption, "bicycle")), concept, rng)
        for start, stop in found.spans:
            word = found.caption[start:stop].lower()
            assert word.removeprefix("a ").removeprefix("the ") in names
        assert "object" in found.target and not any(f" {name} " in f" {found.target.lower()} " for name in ("bicycle", "bike"))
        seen.add(found.caption)
    assert len(seen) > 40 and any(text.isupper() for text in seen)


def test_texts_are_tokenised_once_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_towers(bases.resolve("pocket"), "cpu", need_images=False).tokenizer
    pairs = [redirect(caption, spans_of(caption, "bicycle"), "thing") for caption in ("a bicycle", "two dogs, a bicycle here")]
    alone = [alignment(tokenizer, pair, 77) for pair in pairs]
    monkeypatch.setattr(sd, "_OFFSETS", weakref.WeakKeyDictionary())
    calls = []

    class Counting:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls.append(texts)
            return tokenizer(texts, **options)

    counting = Counting()
    assert sd.alignments(counting, pairs, 77) == sd.alignments(counting, pairs, 77) == alone
    assert calls == [[text for pair in pairs for text in (pair.caption, pair.target)]]
    monkeypatch.setattr(sd, "MOST_OFFSETS", 3)
    assert len(sd.offsets(counting, ["two dogs", "a bicycle"])) == 2 and calls[1:] == [
        ["two dogs", "a bicycle"]
    ]  # all were forgotten
