"""Whatever stands in a card or a caption: a concept or one sentence, and spans that hold. Generated inputs.

Few by default; ``SD_ERASE_EXAMPLES=100000 pytest tests/test_properties_of_words.py`` tries as many of each.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs sd-erase[dev]")
from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sd_erase.concepts import Concept, Matcher, concept_named, inflections, label_form  # noqa: E402
from sd_erase.concepts.cards import normal_name, own_card  # noqa: E402
from sd_erase.concepts.inflection import is_plural  # noqa: E402
from sd_erase.concepts.near import meant, slips  # noqa: E402
from sd_erase.concepts.selection import names_in  # noqa: E402
from sd_erase.concepts.spared import spoken_form  # noqa: E402
from sd_erase.concepts.text import fold, folded, literal, plain  # noqa: E402
from sd_erase.errors import UserError  # noqa: E402

WORDS = ("bike", "bikes", "hot", "dog", "apple", "phone", "orange", "shirt", "bat", "man", "a", "the", "juice", "caf\u00e9", "o'keeffe", "j.k.", "dr.",
         "747", "2", "\u81ea\u884c\u8f66", "\u0915\u093e\u0930", "\uc790\uc804\uac70", "\u0130stanbul", "stra\u00dfe", "\u03c3\u03c2", "(toy)")  # fmt: skip
GAPS = (" ", "_", "-", ", ", " + ", " unless ", "|", "{", "}", "*", "\\", ".", "'", "\u2019", "\u200b", "\u00ad", "\u0301", "\n", "\u3000", "", ";", "(", ")")  # fmt: skip
soup = st.lists(st.sampled_from(WORDS) | st.sampled_from(GAPS) | st.text(max_size=3), max_size=14).map("".join)
captions = soup | st.text(max_size=60)
CARDS = [concept_named(name) for name in ("bicycle", "hot dog", "apple", "orange", "bat", "tv", "man")] + [
    Concept(
        "own",
        words=("caf\u00e9", "\u81ea\u884c\u8f66", "\u0915\u093e\u0930", "\uc790\uc804\uac70", "o'keeffe", "j.k. dog", "stra\u00dfe", "747", "dr seuss", "toy (man)"),
        spared=("caf\u00e9 *", "\u81ea\u884c\u8f66 {man|2}", "747 + {dog|\u0915\u093e\u0930} unless {juice}", "red , o'keeffe"),
    )
]  # fmt: skip


def checked(concept: Concept, caption: str) -> tuple[list[Any], list[Any]]:
    """`scan`, of which every span holds and no two matches overlap."""
    matches, spared = concept.scan(caption)
    assert all(caption[use.start : use.end] == use.text and use.text for use in (*matches, *spared))
    assert all(one.end <= other.start for one, other in zip(matches, matches[1:], strict=False))
    assert not any(one.start >= use.start and one.end <= use.end and one.text == use.text for one in matches for use in spared)
    return matches, spared


@given(captions)
@example("caf\u00e9 stra\u00dfe\u200bbike")
def test_spans_hold_and_the_quick_tests_change_nothing(caption: str) -> None:
    slow = {concept.name: found for concept in CARDS if any(found := checked(concept, caption))}
    quick = {concept.name: (matches, spared) for concept, matches, spared in Matcher(CARDS).scan(caption)}
    assert quick == slow
    for concept in CARDS:
        matches, spared = slow.get(concept.name, ([], []))
        bare = checked(Concept(concept.name, words=concept.words, synonyms=concept.synonyms), caption)[0]
        if len(fold(caption)) == 1:
            assert len(bare) == len(matches) + len(spared)  # a use is a match or spared, none is lost
        else:  # what one of the readings spares may hold several of the other's
            assert all(any(one.start < use.end and use.start < one.end for use in (*matches, *spared)) for one in bare)


ascii_captions = st.lists(st.sampled_from([word for word in (*WORDS, *GAPS) if word.isascii()]), max_size=12).map("".join)


@given(ascii_captions, st.sampled_from(CARDS))
def test_case_underscores_and_width_do_not_count(caption: str, concept: Concept) -> None:
    def found(text: str) -> list[str]:
        return [re.sub(r"[\s_\-]+", " ", match.text.lower()) for match in checked(concept, text)[0]]

    assert found(caption) == found(caption.upper()) == found(caption.replace(" ", "_")) == found(caption.replace("_", " "))
    wide = caption.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    assert len(found(wide)) == len(found(caption))


@given(captions, st.sampled_from(CARDS))
def test_both_normal_forms_are_one_text(caption: str, concept: Concept) -> None:
    composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
    assert len(checked(concept, composed)[0]) == len(checked(concept, decomposed)[0])


@given(captions)
@example("bike\u200b\u0301")
def test_folding_keeps_to_the_text(caption: str) -> None:
    for reading in fold(caption):
        assert (
            len(reading.starts) == len(reading.ends) == len(reading.text)
            or not reading.starts
            and len(reading.text) == len(caption)
        )
        assert list(reading.starts) == sorted(reading.starts) and list(reading.ends) == sorted(reading.ends)
        assert all(0 <= start < end <= len(caption) for start, end in zip(reading.starts, reading.ends, strict=True))
    assert plain(plain(caption)) == plain(caption)
    assert label_form(label_form(caption)) == label_form(caption)
    assert normal_name(normal_name(caption)) == normal_name(caption)


@given(soup)
@example("\u10670")  # begins with a mark that no letter bears
def test_a_phrase_finds_itself_in_every_spelling(phrase: str) -> None:
    try:
        names = names_in(phrase)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for name in names:
        card = Concept("x", words=(name,))
        for text in (name, name.upper() if len(name.upper()) == len(name) else name, f"({name})", name.replace(" ", "_")):
            assert checked(card, text)[0], (name, text)
        assert re.compile(literal(name)).search(folded(name))


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | soup | st.text(max_size=12)
    | st.lists(soup | st.none() | st.integers() | st.sampled_from(WORDS), max_size=5) | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
)  # fmt: skip
spared_entries = st.lists(
    st.sampled_from(("bike", "{red|blue}", "{colour}", "{their}", "*", ",", "+", "unless", "{somebody}", "{a b|c}", "dog's", "{", "x|y", "747", "-", "\u81ea\u884c"))
    | st.text(max_size=4), min_size=1, max_size=7,
).map(" ".join)  # fmt: skip
cards = st.fixed_dictionaries(
    {"name": soup | st.sampled_from(WORDS)},
    optional={
        "kind": st.sampled_from(("object", "style", "person", "nudity")) | values, "words": values, "synonyms": values, "anchor": values,
        "neighbours": values, "labels": values, "spared": st.lists(spared_entries, max_size=4) | spared_entries | values,
        "templates": st.lists(soup.map("a {} {{}} b".format), max_size=2) | values, "other": values,
    },
)  # fmt: skip


@given(cards | values, captions)
def test_a_card_is_a_concept_or_one_sentence(card: Any, caption: str) -> None:
    from random import Random

    try:
        concept = own_card(card, "Concept file card.yaml")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    checked(concept, caption)
    assert Concept.from_dict(concept.to_dict()) == concept
    assert (
        own_card(
            {**card, **{key: list(value) for key, value in (("spared", concept.spared), ("labels", concept.labels)) if value}},
            "again",
        )
        == concept
    )
    assert all("{}" in template and template.format("x") for template in concept.templates)
    for entry in concept.spared:
        spoken = spoken_form(entry, ["dog"], Random(0))
        assert not spoken or not set("{|*") & set(spoken)
    if not any(entry.unless for entry in concept.spared_entries):
        assert any(concept.find(phrase) for phrase in concept.phrases)


@given(soup | st.text(max_size=30))
def test_inflections_hold_the_phrase_and_find_it(phrase: str) -> None:
    forms = inflections(phrase) if phrase.strip() else ()
    if forms:
        assert forms[0] == " ".join(phrase.lower().split()) and len(set(forms)) == len(forms)
        assert isinstance(is_plural(forms[0]), bool)


letters = st.text("bicyle", max_size=9)


@given(letters, letters, letters)
def test_slips_are_a_number_of_edits(one: str, other: str, third: str) -> None:
    @functools.cache
    def slow(i: int, j: int) -> int:  # the definition, from the end
        if not i or not j:
            return i + j
        best = min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (one[i - 1] != other[j - 1]))
        if i > 1 and j > 1 and one[i - 2 : i] == other[j - 2 : j][::-1]:
            best = min(best, slow(i - 2, j - 2) + 1)
        return best

    assert slips(one, other) == slow(len(one), len(other)) == slips(other, one)
    assert (slips(one, other) == 0) == (one == other)
    asked = meant(one, "object")
    assert asked is None or 0 < slips(one, asked) <= 2


@given(st.text("bike hot\u00e9_-\\'.\u200b(0", min_size=1, max_size=6), st.sampled_from(CARDS))
def test_time_grows_as_the_caption(part: str, concept: Concept) -> None:
    import time

    caption = part * (20_000 // len(part))
    started = time.process_time()
    concept.scan(caption)
    assert time.process_time() - started < 5  # what is quadratic takes minutes
