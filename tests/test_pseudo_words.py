"""Embeddings that the frozen encoder reads as a concept, on the pocket model, and the adversary that starts from them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sd_erase import bases
from sd_erase.clip import Towers, choose_anchor, choose_neighbours, encode, load_towers
from sd_erase.concepts import Concept, concept_named
from sd_erase.erasure import pseudo_words
from sd_erase.erasure.method import Batch
from sd_erase.erasure.robust import ATTACKED, PREFIX_TOKENS, RANDOM, SPARED, RobustErasure, _Attacked, _with_prefix
from sd_erase.erasure.sd import redirect
from sd_erase.pairs import Pair


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers(bases.resolve("pocket"), "cpu", need_images=False)


def pooled(towers: Towers, captions: list[str]) -> torch.Tensor:
    return torch.nn.functional.normalize(encode(towers.frozen_text, towers.tokens(captions), (-1,))[1], dim=-1)


def batch(split: str = "train") -> Batch:
    def pair(caption: str, word: str | None) -> Pair:
        spans = ((caption.index(word), caption.index(word) + len(word)),) if word else ()
        return Pair("k", None, caption, "forget" if word else "retain", split, "bicycle" if word else None, spans, "test")

    forget = [pair(f"a photo of a bicycle {place}", "bicycle") for place in ("on the grass", "in a room", "by the sea")]
    retain = [pair(f"a photo of a {name}", None) for name in ("dog", "cat", "chair")]
    return Batch(forget, retain, None, None, None, None, random.Random(0), split)


def test_a_pseudo_word_reads_as_the_concept_and_is_none_of_its_words(towers: Towers) -> None:
    captions = ["a photo of a bicycle", "a bicycle in a field", "the bicycle and a dog"]
    spans = [[5], [2], [2]]
    found = pseudo_words.find(towers, captions, spans, seed=1)
    assert found.shape[1:] == (pseudo_words.TOKENS, towers.text.config.hidden_size)
    assert pseudo_words.COUNT // 4 <= len(found) <= pseudo_words.COUNT
    # in a caption that the search did not see
    ids = towers.tokens(["a photo of a object on the beach"] * len(found))
    with torch.no_grad(), pseudo_words.replaced(towers.frozen_text, list(range(len(found))), [5] * len(found), found[:, 0]):
        states = torch.nn.functional.normalize(encode(towers.frozen_text, ids, (-1,))[1], dim=-1)
    concept, other = pooled(towers, ["a photo of a bicycle on the beach", "a photo of a object on the beach"])
    assert ((states @ concept) > (states @ other)).float().mean() > 0.9
    words = pseudo_words.embedding(towers.frozen_text).weight[
        towers.tokenizer("bicycle bike", add_special_tokens=False).input_ids
    ]
    assert torch.cdist(found[:, 0], words).min() > 0.1 * words.norm(dim=-1).mean()
    assert torch.equal(found, pseudo_words._search(towers, captions, spans, seed=1))


def test_embeddings_are_replaced_only_within_the_context(towers: Towers) -> None:
    ids = towers.tokens(["a photo of a bicycle"])
    before = encode(towers.frozen_text, ids, (-1,))[0][0]
    with pseudo_words.replaced(towers.frozen_text, [0], [5], torch.zeros(1, before.shape[-1])):
        within = encode(towers.frozen_text, ids, (-1,))[0][0]
    assert torch.equal(within[:, :5], before[:, :5])  # the mask is causal
    assert not torch.allclose(within[:, 5:], before[:, 5:], atol=1e-2)
    assert torch.equal(encode(towers.frozen_text, ids, (-1,))[0][0], before)


def test_words_of_one_vector_are_taken_once(towers: Towers) -> None:
    table = pseudo_words.embedding(towers.frozen_text).weight
    ids = pseudo_words.vocabulary(towers.tokenizer, table)
    vectors = table[ids]
    assert len(torch.unique(vectors, dim=0)) == len(ids) > 100


def test_the_adversary_grows_stronger_and_its_pools_survive_a_resume(towers: Towers) -> None:
    method = RobustErasure()
    method.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, False)
    prefixes = method.prefixes.clone()
    method.losses(towers, batch("validation"))
    assert torch.equal(method.prefixes, prefixes)  # what a validation finds is not kept
    terms = method.losses(towers, batch())
    assert set(terms) == set(method.default_weights) - {"forgetting", "retention", "consistency"}
    # nothing is erased yet: every attack brings the concept back
    assert terms["adversarial"] > 0.2
    terms["adversarial"].backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in towers.text.parameters())
    moved = method.moves["bicycle"]
    assert 0 < (moved.abs().sum((1, 2)) > 0).sum() <= ATTACKED
    limit = 0.7501 * method.scale
    assert moved.square().mean(-1).sqrt().max() <= limit
    assert not torch.equal(method.prefixes, prefixes)
    other = RobustErasure()
    other.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, False)
    other.load_state(dict(method.state()))
    assert torch.equal(other.prefixes, method.prefixes)
    assert torch.equal(other.moves["bicycle"], moved)
    towers.text.zero_grad(set_to_none=True)


def attacked(towers: Towers) -> _Attacked:
    caption = "a photo of a bicycle on the grass"
    pair = redirect(caption, [(13, 20)], "object")
    neutral = " ".join(["object"] * PREFIX_TOKENS)
    return _Attacked(towers, [pair] * ATTACKED + [_with_prefix(pair, neutral)] * ATTACKED)


def test_an_attack_counts_by_how_far_it_moves_a_caption_towards_the_concept(towers: Towers) -> None:
    captions = attacked(towers)
    assert captions.progress(captions.wanted, captions.wanted).tolist() == [0] * 2 * ATTACKED
    assert captions.progress(captions.reached, captions.wanted).tolist() == pytest.approx([1] * 2 * ATTACKED)
    # a large change across the way is far from both, and no attack
    aside = []
    for goal, want in zip(captions.reached, captions.wanted, strict=True):
        way, noise = goal - want, torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
        share = (noise * way).sum((1, 2), keepdim=True) / way.square().sum((1, 2), keepdim=True)
        aside.append(want + 5 * (noise - share * way))
    assert captions.progress(aside, captions.wanted).abs().max() < 1e-4
    assert captions.distances(aside, captions.wanted).min() > 1


def test_words_before_a_caption_keep_what_they_say_but_the_concept(towers: Towers) -> None:
    captions = attacked(towers)

    def prefix(words: str) -> torch.Tensor:
        ids = towers.tokenizer(words, add_special_tokens=False).input_ids
        assert len(ids) == PREFIX_TOKENS
        return pseudo_words.embedding(towers.text).weight[ids].detach()

    spared, concept = prefix("red big white"), prefix("bicycle bike bicycle")
    first = ATTACKED + RANDOM  # whose prefix was searched
    values = torch.stack([spared] * (first + 1) + [concept] * (ATTACKED - RANDOM - 1))
    wanted = captions.wanted_behind(values)
    ids = towers.tokens(["red big white a photo of an object on the grass"])
    own = encode(towers.frozen_text, ids[:, : wanted[0].shape[1]], towers.layers)[0]
    for layer, plain in enumerate(captions.wanted):
        assert torch.equal(wanted[layer][:ATTACKED], plain[:ATTACKED])  # pseudo-words stand in the concept's place
        assert torch.equal(wanted[layer][ATTACKED:first], plain[ATTACKED:first])  # random words shall say nothing
        assert torch.allclose(wanted[layer][first, -1], own[layer][0, -1], atol=1e-3)
        assert not torch.allclose(wanted[layer][first, -1], plain[first, -1], atol=0.1)
    with torch.no_grad():
        said = captions.progress(captions._behind(values), captions.wanted)
        left = captions.progress(wanted, captions.wanted)
    assert said[-1] > 2 * SPARED
    assert left[-1].item() == pytest.approx(SPARED, abs=1e-4)
    assert captions.distances(captions._behind(values), wanted)[-1] > 0.1


def test_half_of_the_prefixes_are_random_and_begin_a_search_anew(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    method = RobustErasure()
    method.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, False)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(method, "_attacked", lambda _, __, ___, moves, tokens, ____: (moves, tokens))
    wanted_behind = _Attacked.wanted_behind
    monkeypatch.setattr(_Attacked, "wanted_behind", lambda self, values: seen.append(values) or wanted_behind(self, values))
    before = method.prefixes.clone()
    method._adversarial(towers, batch())
    changed = (method.prefixes != before).any(1).nonzero().flatten()
    assert len(changed) == RANDOM
    used = [
        bool((seen[0][ATTACKED + place] == method.table[method.prefixes]).all((1, 2)).nonzero().numel())
        for place in range(ATTACKED)
    ]
    assert all(used)
    assert method.prefixes.unique(dim=0).shape[0] == len(method.prefixes)


def test_a_prefix_never_says_less_of_the_concept_after_an_attack(towers: Towers) -> None:
    captions, method, rng = attacked(towers), RobustErasure(), random.Random(0)
    method.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, False)
    start = torch.stack([method._pseudo_word(towers, "bicycle", rng) for _ in range(ATTACKED)])
    before = method.prefixes[:ATTACKED]
    _, after = method._attacked(towers, captions, start, torch.zeros_like(start), before, rng)

    def progress(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            values = torch.cat([start, method.table[tokens]])
            return captions.progress(captions.states(towers.text, values), captions.wanted)[ATTACKED:]

    changed = (after != before).any(1)
    assert changed.any()
    assert (progress(after)[changed] > progress(before)[changed]).all()


def test_neighbours_are_near_things_that_the_base_tells_apart(towers: Towers) -> None:
    found = choose_neighbours(towers, Concept("puppy", words=("puppy", "dog")), "object")
    assert {"cat", "horse"} & set(found)
    assert "dog" not in found
    assert "object" not in found
    assert choose_anchor(towers, concept_named("bicycle")) in towers.base.anchors


def test_pseudo_words_of_other_weights_or_captions_are_searched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    towers = load_towers(bases.resolve("pocket"), "cpu", need_images=False)
    searched: list[int] = []

    def search(towers: Any, captions: Any, spans: Any, seed: int) -> torch.Tensor:
        searched.append(seed)
        return torch.zeros(1, 3, 64)

    monkeypatch.setattr(pseudo_words, "_FOUND", {})
    monkeypatch.setattr(pseudo_words, "_search", search)
    for _ in range(2):
        pseudo_words.find(towers, ["a dog"], [[2]], 0).add_(1)  # what is found before stays as it was
    assert searched == [0] and not pseudo_words.find(towers, ["a dog"], [[2]], 0).any()
    pseudo_words.find(towers, ["a cat"], [[2]], 0)
    pseudo_words.find(towers, ["a dog"], [[2]], 1)
    other = load_towers(bases.resolve("pocket"), "cpu", need_images=False)
    with torch.no_grad():
        getattr(other.frozen_text, "text_model", other.frozen_text).encoder.layers[0].mlp.fc1.bias[0] += 1
    pseudo_words.find(other, ["a dog"], [[2]], 0)
    assert searched == [0, 0, 1, 0]
