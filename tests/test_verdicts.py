"""Verdicts over figures made by hand: what is said of them, and what stands against believing them."""

from __future__ import annotations

from typing import Any

import pytest

from sd_erase.metrics.rates import WHERE_NAMED, row
from sd_erase.metrics.verdicts import doubts, judge_others, judge_target, percent


def line(role: str, before: int, after: int, n: int, name: str = "x") -> dict[str, Any]:
    """A row in which the first `before` (then `after`) of `n` images show what is looked for."""
    return row(name, role, [number < before for number in range(n)], [number < after for number in range(n)])


def of(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An evaluation of these rows."""
    return {"concepts": ["x"], "images": 100, "rows": list(rows), **more}


@pytest.mark.parametrize(
    ("before", "after", "n", "answer"),
    [
        (100, 0, 100, "Yes, for these prompts"),
        (100, 4, 100, "Yes, for these prompts"),
        (100, 5, 100, "Mostly, not fully"),
        (10, 0, 10, "It looks so, but 10 images are few"),
        (9, 0, 9, "Cannot be told: 9 images are too few"),
        (3, 3, 3, "No"),  # three of three cannot be chance: at least 44 % of the images show it
        (3, 1, 3, "Only in part"),
        (100, 10, 100, "Mostly, not fully"),
        (100, 20, 100, "Mostly, not fully"),
        (100, 21, 100, "Only in part"),
        (100, 80, 100, "Only in part"),
        (100, 95, 100, "No"),
        (7, 0, 100, "Cannot be told: the original model hardly shows it"),
        (8, 0, 100, "Yes, for these prompts"),
        (0, 0, 100, "Cannot be told: the original model hardly shows it"),
        (2, 60, 100, "No"),  # the erased encoder shows what the original did not
    ],
)
def test_whether_it_is_gone(before: int, after: int, n: int, answer: str) -> None:
    assert judge_target(of(line("target", before, after, n))).answer == answer


def test_the_worst_of_several_concepts_decides() -> None:
    sure, few, unseen, left = (line("target", *counts) for counts in ((100, 0, 100), (3, 0, 3), (0, 0, 100), (100, 90, 100)))
    assert judge_target(of(sure, few)).answer == "Cannot be told: 3 images are too few"
    assert judge_target(of(sure, unseen)).answer == "Cannot be told: the original model hardly shows it"
    assert judge_target(of(sure, few, unseen, left)).answer == "No"
    assert len(judge_target(of(sure, few)).rows) == 2


def test_a_concept_is_judged_where_prompts_name_it() -> None:
    rows = [line("target", 10, 9, 100), line("target_named", 10, 9, 10, f"x{WHERE_NAMED}")]
    assert judge_target(of(*rows)).rows == [{"name": "x", "before": 1.0, "after": 0.9}]
    assert judge_target(of(line("target", 50, 0, 100, "crane (bird)"))).rows[0]["name"] == "crane (bird)"


def test_what_cannot_be_measured_is_not_called_gone() -> None:
    gone = line("target", 100, 0, 100)
    assert judge_target(None).answer == judge_target(of(row("x", "target", [True], None))).answer == "Not measured yet"
    assert judge_target(of(gone, naming={"x": 0})).answer == "Cannot be told: no prompt names it"
    assert judge_target(of(gone, flat={"erased": 20}, left_out=20)).answer.startswith("Cannot be told: too many")
    assert judge_target(of(gone, flat={"erased": 5}, left_out=5)).answer == "Yes, for these prompts"
    noise = judge_target(of(gone, line("others", 90, 20, 100)))
    assert (noise.answer, noise.tone) == ("Not found, but hardly anything else is either", "bad")


def test_doubts_come_with_what_to_do() -> None:
    assert doubts(of(line("target", 100, 0, 100), flat={"original": 0, "erased": 0}, identical={"naming": 0})) == []
    (flat,) = doubts(of(line("target", 100, 0, 100), flat={"original": 0, "erased": 3}))
    assert flat.startswith("3 of the erased images are a single colour") and "--device cpu" in flat
    (same,) = doubts(of(line("target", 100, 90, 100), identical={"naming": 60, "naming_of": 90}))
    assert "60 of the 90 image pairs whose prompt names x are identical" in same
    (weak,) = doubts(of(line("target", 30, 0, 100)))
    assert "The original model shows x in only 30% of the images" in weak
    few, unseen = doubts(of(line("target", 0, 0, 5)))
    assert "Only 5 images" in few and "only 0%" in unseen
    (unnamed,) = doubts(of(line("target", 0, 0, 5), naming={"x": 0}))
    assert unnamed.startswith("No prompt names x")


@pytest.mark.parametrize(
    ("before", "after", "n", "answer"),
    [
        (100, 100, 100, "Little that the detector sees"),
        (100, 96, 100, "Little that the detector sees"),
        (100, 94, 100, "Something, see below"),
        (100, 79, 100, "A lot"),
        (12, 12, 12, "Little is seen, but 12 named objects are few"),
        (5, 4, 5, "Cannot be told: 5 named objects are too few"),
        (0, 0, 100, "Cannot be told: no prompt names another object that the detector finds"),
    ],
)
def test_what_it_broke(before: int, after: int, n: int, answer: str) -> None:
    assert judge_others(of(line("others", before, after, n))).answer == answer


def test_harm_is_named() -> None:
    judged = judge_others(of(line("others", 100, 90, 100), line("object", 50, 40, 50, "cat"), line("object", 50, 49, 50, "dog")))
    assert "cat (100% to 80%)" in judged.sentences[1] and "dog" not in judged.sentences[1]
    share = {"rate": 0.02, "count": 2, "n": 100}
    more = {"surplus": {"original": {"unnamed": share, "doubled": share}, "erased": {"unnamed": share | {"rate": 0.2}, "doubled": share}}}
    judged = judge_others(of(line("others", 100, 100, 100), **more, surplus_p={"unnamed": 0.001, "doubled": 0.001}))
    assert judged.sentences[2:] == [
        "More often than before, beyond chance (p = 0.001): an object that nobody named is in the image (2% to 20%)."
    ]


def test_percentages() -> None:
    shares = (0.0, 0.005, 0.5, 0.123, 0.996, 1.0, None)
    assert [percent(share) for share in shares] == ["0%", "0.5%", "50%", "12%", "99.6%", "100%", "–"]
