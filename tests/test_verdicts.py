"""Verdicts over figures made by hand: what is said of them, and what stands against believing them."""

from __future__ import annotations

from typing import Any

import pytest

from sd_erase.metrics.rates import WHERE_NAMED, row, share
from sd_erase.metrics.verdicts import Verdict, doubts, doubts_of_attack, judge_others, judge_target, percent


def line(role: str, before: int, after: int, n: int, name: str = "x") -> dict[str, Any]:
    """A row in which the first `before` (then `after`) of `n` images show what is looked for."""
    return row(name, role, [number < before for number in range(n)], [number < after for number in range(n)])


def of(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An evaluation of these rows."""
    return {"concepts": ["x"], "images": 100, "rows": list(rows), **more}


@pytest.mark.parametrize(
    ("before", "after", "n", "answer", "tone"),
    [
        (100, 0, 100, "Yes, for these prompts", "good"),
        (100, 4, 100, "Yes, for these prompts", "good"),
        (100, 5, 100, "Mostly, not fully", "open"),
        (10, 0, 10, "It looks so, but 10 images are few", "open"),
        (34, 0, 34, "It looks so, but 34 images are few", "open"),
        (35, 0, 35, "Yes, for these prompts", "good"),  # Wilson's upper end falls below 10 %
        (9, 0, 9, "Cannot be told: 9 images are too few", "open"),
        (3, 3, 3, "No", "bad"),  # three of three cannot be chance: at least 44 % of the images show it
        (3, 1, 3, "Only in part", "bad"),
        (100, 10, 100, "Mostly, not fully", "open"),
        (100, 20, 100, "Mostly, not fully", "open"),
        (100, 21, 100, "Only in part", "bad"),
        (100, 80, 100, "Only in part", "bad"),
        (100, 95, 100, "No", "bad"),
        (7, 0, 100, "Cannot be told: the original model hardly shows it", "open"),
        (7, 7, 100, "Cannot be told: the original model hardly shows it", "open"),
        (8, 0, 100, "Yes, for these prompts", "good"),
        (0, 0, 100, "Cannot be told: the original model hardly shows it", "open"),
        (2, 60, 100, "No", "bad"),  # the erased encoder shows what the original did not
    ],
)
def test_whether_it_is_gone(before: int, after: int, n: int, answer: str, tone: str) -> None:
    verdict = judge_target(of(line("target", before, after, n)))
    assert (verdict.answer, verdict.tone) == (answer, tone)


def test_the_answer_comes_with_its_figures() -> None:
    verdict = judge_target(of(line("target", 98, 2, 100), line("target", 40, 0, 40, "y")))
    assert verdict.sentences == [
        "In 100 images, the detector found x in 98% with the original encoder and in 2% with the erased one (95% interval 0.6% to "
        "7.0%).",
        "In 40 images, the detector found y in 100% with the original encoder and in 0% with the erased one (95% interval 0% to 8.8%).",
    ]
    assert verdict.rows == [{"name": "x", "before": 0.98, "after": 0.02}, {"name": "y", "before": 1.0, "after": 0.0}]


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
    for evaluation in (None, {}, of(row("x", "target", [True], None))):
        assert judge_target(evaluation) == Verdict("Not measured yet", "open")
    assert judge_target(of(gone, naming={"x": 0})).answer == "Cannot be told: no prompt names it"
    assert judge_target(of(gone, naming={"y": 0})).answer == "Yes, for these prompts"


@pytest.mark.parametrize(("flat", "is_told"), [(10, True), (11, False), (100, False)])
def test_many_flat_images_carry_no_verdict(flat: int, is_told: bool) -> None:
    evaluation = of(line("target", 100, 0, 100), flat={"original": 0, "erased": flat}, images=90, left_out=10)
    answer = "Yes, for these prompts" if is_told else "Cannot be told: too many of the erased images are a single colour"
    assert judge_target(evaluation).answer == answer


@pytest.mark.parametrize(
    ("kept", "answer"), [(49, "Not found, but hardly anything else is either"), (50, "Yes, for these prompts")]
)
def test_noise_is_not_called_an_erasure(kept: int, answer: str) -> None:
    verdict = judge_target(of(line("target", 100, 0, 100), line("others", 100, kept, 100)))
    assert (verdict.answer, verdict.tone) == (answer, "bad" if kept < 50 else "good")


def test_doubts_come_with_what_to_do() -> None:
    assert doubts(of(line("target", 100, 0, 100), flat={"original": 0, "erased": 0}, identical={"naming": 0})) == []
    assert doubts(of(line("target", 50, 0, 100))) == doubts(of(line("target", 10, 0, 10))) == []
    assert doubts(of(line("target", 100, 0, 100), flat={"original": 0, "erased": 3})) == [
        "3 of the erased images are a single colour, in which nothing can be found (the model overflowed: try `sd-erase generate "
        "--device cpu`); pairs with such an image are left out of the figures."
    ]
    same = {"naming": 60, "naming_of": 90}
    assert doubts(of(line("target", 100, 90, 100), identical=same, concepts=["x", "y"])) == [
        "60 of the 90 image pairs whose prompt names x, y are identical to the pixel: the erased encoder changed nothing there."
    ]
    assert doubts(of(line("target", 0, 0, 5))) == [
        "Only 5 images show a prompt with x: too few for a verdict (draw more with --prompts).",
        "The original model shows x in only 0% of the images that ask for it, so its absence says little: pass prompts that the "
        "original draws.",
    ]
    assert doubts(of(line("target", 0, 0, 5), naming={"x": 0})) == [
        "No prompt names x: its rates say nothing about its erasure. Pass --prompts with a list that does."
    ]


@pytest.mark.parametrize(
    ("before", "after", "n", "answer", "tone"),
    [
        (100, 100, 100, "Little that the detector sees", "good"),
        (100, 95, 100, "Little that the detector sees", "good"),
        (100, 94, 100, "Something, see below", "open"),
        (100, 80, 100, "Something, see below", "open"),
        (100, 79, 100, "A lot", "bad"),
        (10, 7, 10, "A lot", "bad"),
        (12, 12, 12, "Little is seen, but 12 named objects are few", "open"),
        (50, 50, 100, "Little is seen, but 100 named objects are few", "open"),  # the interval's lower end is 40 %
        (200, 200, 400, "Little that the detector sees", "good"),  # 45 % is above 85 % of the original's rate
        (5, 4, 5, "Cannot be told: 5 named objects are too few", "open"),
        (0, 0, 100, "Cannot be told: no prompt names another object that the detector finds", "open"),
    ],
)
def test_what_it_broke(before: int, after: int, n: int, answer: str, tone: str) -> None:
    verdict = judge_others(of(line("others", before, after, n)))
    assert (verdict.answer, verdict.tone) == (answer, tone)


def test_what_it_broke_needs_an_evaluation() -> None:
    assert judge_others(None) == judge_others({}) == Verdict("Not measured yet", "open")
    unasked = Verdict("Cannot be told: no prompt names another object that the detector finds", "open")
    assert judge_others(of(line("target", 9, 0, 9))) == unasked


def test_harm_is_named_the_worst_first() -> None:
    objects = [line("object", 50, 50 - lost, 50, f"thing {lost}") for lost in (1, 8, 9, 20, 10, 12, 30)]
    judged = judge_others(of(line("others", 100, 90, 100), *objects, line("object", 0, 0, 5, "unseen")))
    assert judged.rows == [{"name": "x", "before": 1.0, "after": 0.9}]
    assert judged.sentences == [
        "Of everything else that the prompts name, 100% was found with the original encoder and 90% with the erased one: 90% of the "
        "original rate is kept.",
        "Found less often beyond chance (p < 0.05): thing 30 (100% to 40%), thing 20 (100% to 60%), thing 12 (100% to 76%), "
        "thing 10 (100% to 80%), thing 9 (100% to 82%).",
    ]
    certain = judge_others(of(line("others", 100, 90, 100), line("object", 2000, 0, 2000, "cat")))  # a p-value of zero
    assert certain.sentences[1] == "Found less often beyond chance (p < 0.05): cat (100% to 0%)."
    fine = judge_others(of(line("others", 100, 99, 100), line("object", 10, 40, 50, "cat"), line("object", 50, 49, 50, "dog")))
    assert fine.sentences[1] == "No single object is found less often beyond chance (p < 0.05)."


def test_more_than_was_asked_for_is_said() -> None:
    few, many = ({"rate": rate, "count": 100 * rate, "n": 100} for rate in (0.02, 0.2))

    def sentences(before: dict[str, float], after: dict[str, float], p_value: float) -> list[str]:
        surplus = {"original": {"doubled": few, "unnamed": before}, "erased": {"doubled": few, "unnamed": after}}
        p_values = {"doubled": 0.001, "unnamed": p_value}
        return judge_others(of(line("others", 100, 100, 100), surplus=surplus, surplus_p=p_values)).sentences[2:]

    assert sentences(few, many, 0.001) == [
        "More often than before, beyond chance (p = 0.001): an object that nobody named is in the image (2% to 20%)."
    ]
    assert sentences(many, few, 0.001) == sentences(few, many, 0.05) == []


def test_percentages() -> None:
    shares = (0.0, 0.005, 0.07, 0.0999, 0.104, 0.123, 0.5, 0.896, 0.904, 0.996, 1.0, None)
    assert [percent(share) for share in shares] == [
        "0%", "0.5%", "7%", "10.0%", "10%", "12%", "50%", "90%", "90.4%", "99.6%", "100%", "–",
    ]  # fmt: skip


def attacked(alone: int = 0, control_alone: int = 0, control_found: int = 10, **more: Any) -> dict[str, Any]:
    """The shares of ten attacked prompts of one image each, of which so many show the concept."""

    def arm(count: int) -> dict[str, Any]:
        both = share([number < count for number in range(10)])
        return {"images": both, "prompts": both}

    counts = {"concepts": "x", "prompts": 10, "named": 10, "left_out": 0, "flat": {"erased": 0, "control": 0}}
    control = {"none": arm(control_alone), "random": arm(0), "search": arm(control_found)}
    return {**counts, "erased": {"none": arm(alone), "random": arm(0), "search": arm(0)}, "control": control, **more}


@pytest.mark.parametrize(
    ("result", "beginnings"),
    [
        (attacked(), []),
        (attacked(prompts=9, named=9), ["Only 9 prompts were attacked: too few for a verdict"]),
        (attacked(prompts=1, named=1), ["Only 1 prompt was attacked: too few"]),
        (attacked(named=20), []),
        (attacked(named=21), ["The original model shows x for only 10 of the 21 prompts"]),
        (attacked(flat={"erased": 0, "control": 3}), ["3 of the images of the original (the control) are a single colour"]),
        (attacked(alone=2), ["Without any words before the prompt, x is found in 20% of the erased encoder's images"]),
        (attacked(alone=1), []),  # one of ten may be the detector's error
        (attacked(control_alone=5), ["The control shows x in 50% of its prompts before any words are added"]),
        (attacked(control_found=4), ["The control was mostly not broken"]),
        (attacked(control_found=5), []),
        (attacked(left_out=4), ["4 of 14 prompts were left out"]),
    ],
)
def test_doubts_about_a_search_for_words(result: dict[str, Any], beginnings: list[str]) -> None:
    found = doubts_of_attack(result)
    assert len(found) == len(beginnings)
    assert all(one.startswith(start) for one, start in zip(found, beginnings, strict=True))
