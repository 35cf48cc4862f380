"""An evaluation into words: is it gone, what did it break, and what stands against believing the figures.

Pure functions over the mapping that `evaluation.evaluate` writes; the thresholds are said wherever a verdict is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd_erase.concepts import label_form
from sd_erase.metrics.rates import WHERE_NAMED

# what is called gone, and little harm
GONE_RATE = 0.04
KEPT_SHARE = 0.95
SURE_HIGH = 0.10  # the interval's upper end above which "gone" rests on too few images
SURE_KEPT = 0.85  # the share of the original's rate below which the interval's lower end leaves "little harm" open
FEW_IMAGES = 10  # fewer carry no verdict, unless what is found cannot be chance
WEAK_TEST = 0.5  # an original that shows the concept less often makes its absence say less
FLAT_SHARE = 0.1  # of the images: more of a single colour than this carry no verdict
SIGNIFICANT = 0.05  # p-values below it are called beyond chance
HARDLY_KEPT = 0.5  # where this little of all else is left, an absent concept proves nothing

Evaluation = Mapping[str, Any]

# from what a reader must know most to what is fine: the worst of several concepts decides
_ORDER = ("No", "Only in part", "Mostly", "Not measured", "Cannot", "Not found, but", "It looks so", "Yes")


@dataclass(frozen=True)
class Verdict:
    """An answer in a few words with the numbers that it rests on.

    Attributes:
        answer: one line.
        tone: "good", "open" or "bad".
        sentences: whole sentences with the figures.
        rows: lines "name", "before", "after" (shares in 0..1).
    """

    answer: str
    tone: str
    sentences: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def percent(share: float | None) -> str:
    """A share as a percentage, with a decimal only where it tells something."""
    if share is None:
        return "–"
    value = round(100 * share, 6)  # 100 * 0.07 is not 7
    return f"{value:.0f}%" if value == round(value) or 10 <= value <= 90 else f"{value:.1f}%"


def judge_target(evaluation: Evaluation | None) -> Verdict:
    """Is it really gone? The worst concept's answer, and one sentence a concept with the numbers it rests on."""
    evaluation = evaluation or {}
    rows = target_rows(evaluation)
    if not rows or any(row["erased"] is None or not row["images"] for row in rows):
        return Verdict("Not measured yet", "open")
    judged = [_judge_row(row, evaluation) for row in rows]
    answer, tone = min(judged, key=lambda one: next(place for place, start in enumerate(_ORDER) if one[0].startswith(start)))
    sentences = [
        f"In {row['images']} images, the detector found {plain_name(row)} in "
        f"{percent(row['original']['rate'])} with the original encoder and in {percent(row['erased']['rate'])} with the "
        f"erased one (95% interval {percent(row['erased']['low'])} to {percent(row['erased']['high'])})."
        for row in rows
    ]
    return Verdict(answer, tone, sentences, [_change(row) for row in rows])


def _judge_row(row: Mapping[str, Any], evaluation: Evaluation) -> tuple[str, str]:
    """Answer and tone for one concept."""
    before, after = row["original"]["rate"], row["erased"]["rate"]
    detector, name = evaluation.get("detector"), plain_name(row)
    if is_blind(detector, name):
        return f"Cannot be told: the judge cannot tell {name} from what stands in its place", "open"
    gone = gone_rate(detector, name)
    certain = row["erased"]["low"] > gone  # however few the images, it is there more often than "gone" allows
    reason = _unmeasurable(row, evaluation)
    if reason and not certain:
        return f"Cannot be told: {reason}", "open"
    if before < 2 * gone and after <= max(gone, before):
        return "Cannot be told: the original model hardly shows it", "open"
    if after <= gone:
        answer = _judge_absence(row, evaluation)
        return (
            answer
            if after <= GONE_RATE or answer[1] == "bad"
            else ("It looks so, but no more is seen than the judge errs by", "open")
        )
    if after <= 0.2 * before:
        return "Mostly, not fully", "open"
    return ("Only in part", "bad") if after <= 0.8 * before else ("No", "bad")


def _calibration(detector: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """How far a judge, by its card, can be trusted on a concept; nothing where it was not calibrated."""
    found: Mapping[str, Any] = ((detector or {}).get("calibration") or {}).get(label_form(name), {})
    return found


def is_blind(detector: Mapping[str, Any] | None, name: str) -> bool:
    """Whether a judge cannot tell a concept from what stands in its place, so that its figures mean nothing."""
    return bool(_calibration(detector, name).get("blind"))


def gone_rate(detector: Mapping[str, Any] | None, name: str) -> float:
    """What is called gone: `GONE_RATE`, or what a judge sees where there is nothing, if that is more."""
    return max(GONE_RATE, float(_calibration(detector, name).get("false_alarms", {}).get("rate") or 0))


def _unmeasurable(row: Mapping[str, Any], evaluation: Evaluation) -> str:
    """Why the images cannot tell whether a concept is gone; "" where they can."""
    if _overflowed(evaluation):
        return "too many of the erased images are a single colour"
    if evaluation.get("naming", {}).get(plain_name(row)) == 0:
        return "no prompt names it"
    if row["images"] < FEW_IMAGES:
        return f"{row['images']} images are too few"
    return ""


def _overflowed(evaluation: Evaluation) -> bool:
    """Whether so many of the erased images are a single colour that those that are left are a selection."""
    flat = evaluation.get("flat", {}).get("erased")
    return bool(flat) and flat > FLAT_SHARE * (evaluation["images"] + evaluation["left_out"])


def _judge_absence(row: Mapping[str, Any], evaluation: Evaluation) -> tuple[str, str]:
    """Answer and tone where the concept is not found any more."""
    others = _others(evaluation)
    if others is not None and others["kept"] is not None and others["kept"] < HARDLY_KEPT:
        return "Not found, but hardly anything else is either", "bad"
    if row["erased"]["high"] > SURE_HIGH:
        return f"It looks so, but {row['images']} images are few", "open"
    return "Yes, for these prompts", "good"


def judge_others(evaluation: Evaluation | None) -> Verdict:
    """What did it break? The answer in a word, and sentences on all other named objects and on the ones that suffered."""
    if not evaluation:
        return Verdict("Not measured yet", "open")
    total = _others(evaluation)
    if total is None or total["kept"] is None:
        return Verdict("Cannot be told: no prompt names another object that the detector finds", "open")
    sentences = [
        f"Of everything else that the prompts name, {percent(total['original']['rate'])} was found with the original encoder and "
        f"{percent(total['erased']['rate'])} with the erased one: {percent(total['kept'])} of the original rate is kept.",
        _harmed(evaluation["rows"]),
        *_beyond(evaluation),
    ]
    return Verdict(*_judge_kept(total), sentences, [_change(total)])


def _judge_kept(total: Mapping[str, Any]) -> tuple[str, str]:
    kept, asked = total["kept"], total["images"]
    if kept >= KEPT_SHARE:
        sure = total["erased"]["low"] >= SURE_KEPT * total["original"]["rate"]
        return (
            ("Little that the detector sees", "good") if sure else (f"Little is seen, but {asked} named objects are few", "open")
        )
    if asked < FEW_IMAGES:
        return f"Cannot be told: {asked} named objects are too few", "open"
    return ("Something, see below", "open") if kept >= 0.8 else ("A lot", "bad")


def _harmed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which single objects are found less often than chance explains."""
    objects = [row for row in rows if row["role"] == "object" and row["change"] is not None]
    lost = [row for row in objects if row["change"] < 0 and row["p_value"] < SIGNIFICANT]
    if not lost:
        return "No single object is found less often beyond chance (p < 0.05)."
    listed = ", ".join(
        f"{row['name']} ({percent(row['original']['rate'])} to {percent(row['erased']['rate'])})"
        for row in sorted(lost, key=lambda row: float(row["change"]))[:5]
    )
    return f"Found less often beyond chance (p < 0.05): {listed}."


_BEYOND = {
    "doubled": "a named object is drawn more than once",
    "unnamed": "an object that nobody named is in the image",
}


def _beyond(evaluation: Evaluation) -> list[str]:
    """What more is in the images than was asked for, where it grew beyond chance."""
    p_values = evaluation.get("surplus_p")
    if not p_values:
        return []
    before, after = evaluation["surplus"]["original"], evaluation["surplus"]["erased"]
    return [
        f"More often than before, beyond chance (p = {p_values[kind]:.2g}): {what} "
        f"({percent(before[kind]['rate'])} to {percent(after[kind]['rate'])})."
        for kind, what in _BEYOND.items()
        if p_values[kind] < SIGNIFICANT and after[kind]["rate"] > before[kind]["rate"]
    ]


def doubts(evaluation: Evaluation) -> list[str]:
    """What stands against believing an evaluation's figures, one sentence each; a page says it before any figure."""
    found = []
    for side, count in evaluation.get("flat", {}).items():
        if count:
            found.append(
                f"{count} of the {side} images are a single colour, in which nothing can be found (the model overflowed: try "
                "`sd-erase generate --device cpu`); pairs with such an image are left out of the figures."
            )
    same = evaluation.get("identical", {})
    if same.get("naming"):
        found.append(
            f"{same['naming']} of the {same['naming_of']} image pairs whose prompt names {', '.join(evaluation['concepts'])} are "
            "identical to the pixel: the erased encoder changed nothing there."
        )
    for row in target_rows(evaluation):
        found += _doubts_of(row, evaluation)
    return found


def _doubts_of(row: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    """The doubts about one concept's row."""
    name, before = plain_name(row), row["original"]["rate"]
    if evaluation.get("naming", {}).get(name) == 0:
        return [f"No prompt names {name}: its rates say nothing about its erasure. Pass --prompts with a list that does."]
    found = []
    if row["images"] < FEW_IMAGES:
        found.append(f"Only {row['images']} images show a prompt with {name}: too few for a verdict (draw more with --prompts).")
    if before is not None and before < WEAK_TEST:
        found.append(
            f"The original model shows {name} in only {percent(before)} of the images that ask for it, so its absence says little: "
            "pass prompts that the original draws."
        )
    return found


def over_limit(evaluation: Evaluation, limit: float) -> list[str]:
    """Why not every concept is surely in less than `limit` of the images that ask for it, a sentence each; empty where all are.

    The upper end of Wilson's 95 % interval has to be below: with no image found, 2 % take 189 images.
    """
    found = []
    for row in target_rows(evaluation):
        name, share = plain_name(row), row["erased"]
        before = row["original"]["rate"]
        if share is None or not share["n"] or evaluation.get("naming", {}).get(name) == 0:
            found.append(f"nothing tells how often {name} is left: no image of an erased model asks for it.")
        elif is_blind(evaluation.get("detector"), name):
            found.append(
                f"the judge cannot tell {name} from what stands in its place, so its figures say nothing: pass another --judge."
            )
        elif _overflowed(evaluation):
            found.append(f"nothing tells how often {name} is left: too many of the erased images are a single colour.")
        elif before is None or before < WEAK_TEST:
            found.append(
                f"the original shows {name} in only {percent(before)} of the images that ask for it, so its absence says nothing."
            )
        elif share["high"] > limit:
            more = (
                "" if share["rate"] > limit else ", so it is not surely below: draw more images (--images-per-prompt, --prompts)"
            )
            found.append(
                f"{name} is in {share['count']} of {share['n']} images ({percent(share['rate'])}, with 95 % confidence up to "
                f"{100 * share['high']:.1f} %), the limit is {percent(limit)}{more}."
            )
    return found


ENCODERS = {"erased": "the erased encoder", "control": "the original (the control)"}


def doubts_of_attack(result: Mapping[str, Any]) -> list[str]:
    """What stands against believing the shares of a search for words, one sentence each, before any share is shown.

    Args:
        result: as `attacks.stage.attack` counts it.
    """
    name, prompts, named = result["concepts"], result["prompts"], result["named"]
    found = [
        f"{count} of the images of {ENCODERS[side]} are a single colour, in which nothing can be found (the model overflowed: try "
        "`sd-erase attack --device cpu`); they are left out of the figures."
        for side, count in result["flat"].items()
        if count
    ]
    if prompts < FEW_IMAGES:
        found.append(
            f"Only {prompts} {'prompt was' if prompts == 1 else 'prompts were'} attacked: too few for a verdict (pass more with --prompts)."
        )
    if prompts < WEAK_TEST * named:
        found.append(
            f"The original model shows {name} for only {prompts} of the {named} prompts that ask for it, so the others could not be "
            "attacked and these say little: pass prompts that the original draws."
        )
    found += _doubts_of_search(result)
    if result["left_out"]:
        found.append(
            f"{result['left_out']} of {prompts + result['left_out']} prompts were left out: they do not name {name}, or no image of "
            "the original shows it."
        )
    return found


def _doubts_of_search(result: Mapping[str, Any]) -> list[str]:
    """The doubts about what the shares of the arms can tell."""
    name, erased, control = result["concepts"], result["erased"], result["control"]
    alone, broken = erased["none"]["images"], control["search"]["prompts"]["rate"]
    found = []
    if alone["low"] > GONE_RATE:
        found.append(
            f"Without any words before the prompt, {name} is found in {percent(alone['rate'])} of the erased encoder's images: it is not "
            "gone, so what the words bring back says little."
        )
    if control["none"]["prompts"]["rate"] >= WEAK_TEST:
        found.append(
            f"The control shows {name} in {percent(control['none']['prompts']['rate'])} of its prompts before any words are added: it "
            "cannot tell whether the search succeeds."
        )
    elif broken < WEAK_TEST:
        found.append("The control was mostly not broken: the search is too weak to say anything; pass more --steps.")
    return found


def target_rows(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """One row an erased concept: over the images whose prompt names it, where the others are told apart."""
    rows = evaluation.get("rows", ())
    named = {plain_name(row): row for row in rows if row["role"] == "target_named"}
    return [named.get(plain_name(row), row) for row in rows if row["role"] == "target"]


def _others(evaluation: Evaluation) -> Mapping[str, Any] | None:
    return next((row for row in evaluation["rows"] if row["role"] == "others"), None)


def plain_name(row: Mapping[str, Any]) -> str:
    """The concept of a row, without which images the row is over."""
    return str(row["name"]).removesuffix(WHERE_NAMED)


def _change(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": plain_name(row), "before": row["original"]["rate"], "after": row["erased"]["rate"]}
