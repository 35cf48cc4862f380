"""Images into rates: how often the erased concept, and every other object that the prompts name, is still found.

Reads ``images/index.jsonl``, its images and ``concepts.json``. Writes ``detections/{original,erased}.jsonl`` (one line an
image: its index row's keys, ``detections`` and, of several judges, ``by_judge``), ``report/evaluation.json`` and
``report/evaluation.md``; of a CLIP that judges also ``cache/calibration/``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import chain, digests, forms, jsonfile, parallel, provenance
from sd_erase.concepts import Concept, all_cards, read_concepts
from sd_erase.config import RunConfig
from sd_erase.detection import BATCH_SIZE, Detection, Detector
from sd_erase.detection.panel import Panel, judges_of, known_labels
from sd_erase.drawing import is_flat, opened
from sd_erase.errors import UserError
from sd_erase.judging import calibrate, calibrations, judge_of_run, labelled, things
from sd_erase.metrics.rates import WHERE_NAMED, ImagePair, detection_rates, is_found, surplus, surplus_p_values
from sd_erase.metrics.rates import row as rate_row
from sd_erase.metrics.tables import render_markdown
from sd_erase.metrics.unlearncanvas import measures
from sd_erase.metrics.verdicts import doubts
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic, write_jsonl_atomic, write_text_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

SIDES = ("original", "erased")


def evaluate(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Detect objects in the run's images and compare the original with the erased model.

    Args:
        config: the run's configuration; section ``evaluate``.
        run: where the images lie and the results go.
        progress: told of each image.

    Returns:
        The manifest "evaluate": ``rows`` (see `metrics.rates.row`; roles "target", "target_named", "others", "object"),
        ``surplus`` of each side, ``opinions``, ``unlearncanvas``, ``per_prompt``, ``detector``, ``flat`` (side -> images of a single colour; pairs with one are
        left out), ``identical`` (pairs that name a concept and are the same to the pixel) and ``warnings``.

    Raises:
        UserError: no images, a concept that no judge knows, a bad judge, or one that is the erased encoder itself.
    """
    progress = progress or NoProgress()
    run.require("generate", "generate")
    links = chain.Chain(run, config, progress)
    links.require("generate")
    plain = read_concepts(run)
    index = list(run.drawn())
    base = chain.base_of(run, config)
    judge = judge_of_run(config, base, run, plain)
    concepts = labelled(plain, judge)
    read = links.reads("evaluate")
    inputs = fingerprint(read["images"], [concept.to_dict() for concept in concepts], decides(judge))
    if run.is_complete("evaluate", inputs) and links.holds("evaluate"):
        return {**(run.read_manifest("evaluate") or {}), **stored(run)}
    calibrate(judge, config, base, run.cache, progress)
    if parallel.is_main():
        run.reopen("evaluate")
    seen, pictures = _looked(run, index, judge, progress)
    if not parallel.is_main():
        return {}
    result = {**_counted(index, seen, pictures, plain, concepts, judge), "base": config.base}
    write_json_atomic(run.report / "evaluation.json", result)
    write_text_atomic(run.report / "evaluation.md", render_markdown(result))
    return run.complete("evaluate", inputs, {**result, "from": read, "made": links.makes("evaluate")})


Seen = dict[str, list[list[list[Detection]]]]  # side -> judge -> image -> detections


def _looked(
    run: RunDir, index: Sequence[dict[str, Any]], judge: Detector, progress: Progress
) -> tuple[Seen, dict[str, list[Picture]]]:
    """What each judge finds in the images of each side, which is written down, and what the images are."""
    seen: Seen = {}
    pictures: dict[str, list[Picture]] = {}
    for side in SIDES:
        if not all(row.get(side) for row in index):
            if parallel.is_main():
                (run.detections / f"{side}.jsonl").unlink(missing_ok=True)  # of images that were drawn before
            continue
        paths = [run.images / row[side] for row in index]
        looked = [detect_files(one, paths, f"{side} detections", progress) for one in judges_of(judge)]
        seen[side], pictures[side] = [found for found, _ in looked], looked[0][1]
        if parallel.is_main():
            write_jsonl_atomic(run.detections / f"{side}.jsonl", _lines(index, side, seen[side], judge))
    return seen, pictures


def _counted(
    index: Sequence[dict[str, Any]],
    seen: Seen,
    pictures: dict[str, list[Picture]],
    plain: Sequence[Concept],
    concepts: Sequence[Concept],
    judge: Detector,
) -> dict[str, Any]:
    """The comparison of the images that are no single colour, with what is to be said of it.

    Args:
        plain, concepts: what was erased, with its cards' labels and with the judge's.

    Raises:
        UserError: all images are.
    """
    told = [number for number in range(len(index)) if not any(each[number].flat for each in pictures.values())]
    if not told:
        raise UserError(
            "Every image pair has an image of a single colour, so nothing can be measured: the model overflowed; run "
            "`sd-erase generate --device cpu`."
        )
    rows = [index[number] for number in told]
    kept = {side: [[each[number] for number in told] for each in all_found] for side, all_found in seen.items()}
    merged = {side: merged_of(judge, each) for side, each in kept.items()}
    cards = things(concepts, judge)
    result = compare(rows, merged["original"], merged.get("erased"), concepts, cards, judge.labels)
    result["opinions"] = opinions(rows, kept, plain, judge)
    result["left_out"] = len(index) - len(told)
    result["flat"] = {side: sum(picture.flat for picture in each) for side, each in pictures.items()}
    result["identical"] = _identical(index, pictures, concepts)
    result["detector"] = judge.card
    result["labels"] = {concept.name: list(concept.labels) for concept in concepts}
    result["warnings"] = doubts(result) + calibrations(judge) + result["warnings"]
    return result


def stored(run: RunDir) -> dict[str, Any]:
    """What ``report/evaluation.json`` holds.

    Raises:
        UserError: it is damaged.
    """
    found: dict[str, Any] = jsonfile.read_as(run.report / "evaluation.json", forms.EVALUATION)
    return found


def decides(judge: Detector) -> str:
    """A fingerprint of all that decides what is found in an image and what is counted: judge, cards of concepts, code.

    A calibration is no part of it: it follows from the judge, what it is asked, on how many images (of its card) and the base.
    """
    versions = [provenance.version_of(name) for name in ("ultralytics", "onnxruntime")]
    code = digests.of_sources("detection", "evaluation", "judging", "metrics", "concepts")
    cards = [{key: value for key, value in one.card.items() if key != "calibration"} for one in judges_of(judge)]
    return fingerprint(cards, sorted(judge.labels), [card.to_dict() for card in all_cards().values()], versions, code)


def merged_of(judge: Detector, found: Sequence[list[list[Detection]]]) -> list[list[Detection]]:
    """What counts in each image of what each judge found there."""
    return judge.merged(found) if isinstance(judge, Panel) else found[0]


def _lines(
    index: Sequence[dict[str, Any]], side: str, seen: Sequence[list[list[Detection]]], judge: Detector
) -> Iterable[dict[str, Any]]:
    """The lines of one side's list of detections."""

    def written(found: Sequence[Detection]) -> list[dict[str, Any]]:
        return [{"label": each.label, "score": round(each.score, 4), "box": _rounded(each.box)} for each in found]

    names = [one.card["name"] for one in judges_of(judge)]
    for row, one, *each in zip(index, merged_of(judge, seen), *seen, strict=True):
        line = {"image": row[side], "prompt_index": row["prompt_index"], "seed": row["seed"], "detections": written(one)}
        several = {f"{place} {name}": written(own) for place, (name, own) in enumerate(zip(names, each, strict=True), 1)}
        yield {**line, "by_judge": several} if len(names) > 1 else line


def opinions(index: Sequence[dict[str, Any]], seen: Seen, concepts: Sequence[Concept], judge: Detector) -> list[dict[str, Any]]:
    """What each further judge that knows an erased concept says of it, and how often it differs from the first.

    Args:
        index: the images' index rows.
        seen: side -> judge -> image -> detections.
        concepts: what was erased, with their cards' labels.

    Returns:
        For each judge behind the first that knows a concept: ``judge``, ``rows`` (of the targets, see `metrics.rates.row`) and ``apart``:
        concept -> side -> images in which only the ``first`` judge finds it, only the ``second``, and ``of`` how many.
    """
    if not isinstance(judge, Panel):
        return []
    result = []
    for place, part in enumerate(judge.parts):
        rows: list[dict[str, Any]] = []
        apart: dict[str, dict[str, dict[str, int]]] = {}
        for concept in concepts:
            first, labels = judge.first(concept), known_labels(concept, part)
            if not labels or place <= judge.parts.index(first):
                continue
            own = _hits(seen, judge.parts.index(first), known_labels(concept, first))
            others = _hits(seen, place, labels)
            rows += _rows(concept, index, others)
            apart[concept.name] = {side: _apart(own[side], others[side]) for side in seen}
        if rows:
            result.append({"judge": part.card["name"], "rows": rows, "apart": apart})
    return result


def _hits(seen: Seen, place: int, labels: frozenset[str]) -> dict[str, list[bool]]:
    """Side -> whether the judge at `place` finds any of `labels` in each image."""
    return {side: [any(each.label in labels for each in one) for one in found[place]] for side, found in seen.items()}


def _rows(concept: Concept, index: Sequence[dict[str, Any]], hits: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """The rows of a concept, as `metrics.rates.detection_rates` makes them."""
    naming = [number for number, row in enumerate(index) if concept.find(row["prompt"])]
    rows = [rate_row(concept.name, "target", hits["original"], hits.get("erased"))]
    if 0 < len(naming) < len(index):
        named = {side: [found[number] for number in naming] for side, found in hits.items()}
        rows.append(rate_row(f"{concept.name}{WHERE_NAMED}", "target_named", named["original"], named.get("erased")))
    return rows


def _apart(first: Sequence[bool], second: Sequence[bool]) -> dict[str, int]:
    """In how many images only one of two judges finds something."""
    pairs = Counter(zip(first, second, strict=True))
    return {"first": pairs[True, False], "second": pairs[False, True], "of": len(first)}


def compare(
    index: Sequence[dict[str, Any]],
    original: Sequence[Sequence[Detection]],
    erased: Sequence[Sequence[Detection]] | None,
    concepts: Sequence[Concept],
    cards: Iterable[Concept],
    known: frozenset[str],
) -> dict[str, Any]:
    """The comparison from detections alone.

    Args:
        index: the images' index rows.
        original: detections of each row's original image.
        erased: of each row's erased image, or None.
        concepts: what was erased.
        cards: the concepts whose words are looked for in the prompts.
        known: what the detector can find.

    Returns:
        ``concepts``, ``prompts``, ``images``, ``rows``, ``naming`` (concept -> images whose prompt names it), ``surplus``,
        ``surplus_p``, ``unlearncanvas``, ``per_prompt``, ``warnings``.

    Raises:
        UserError: the detector knows no label of an erased concept.
    """
    targets = {}
    for concept in concepts:
        targets[concept.name] = frozenset(concept.labels) & known
        if not targets[concept.name]:
            raise UserError(
                f"Concept {concept.name!r} has no label that this detector can find "
                f"(labels: {', '.join(concept.labels) or 'none'}): pass --detector with one that knows it."
            )
    target_labels = frozenset().union(*targets.values())
    named = {row["prompt"]: _named(row["prompt"], concepts, cards) for row in index}
    warnings = []
    clashes = sorted({card.name for _, others in named.values() for card in others if target_labels & frozenset(card.labels)})
    if clashes:
        warnings.append(
            f"The detector cannot tell {', '.join(targets)} from {', '.join(clashes)} (one label): the latter are not counted."
        )
    unknown = sorted({card.name for _, others in named.values() for card in others if not known & frozenset(card.labels)})
    if unknown:
        warnings.append(f"The detector has no label for {', '.join(unknown)}: named by prompts but not counted.")
    pairs, kinds = [], {concept.name: concept.kind for concept in concepts}
    for number, row in enumerate(index):
        naming, others = named[row["prompt"]]
        objects = {}
        for card in others:
            labels = frozenset(card.labels) & known
            if labels and not labels & target_labels:
                kinds[" or ".join(sorted(labels))] = card.kind
                objects[" or ".join(sorted(labels))] = labels  # by label, so that "a woman and a man" ask for one "person"
        pairs.append(
            ImagePair(
                row["prompt_index"],
                naming,
                objects,
                Counter(each.label for each in original[number]),
                None if erased is None else Counter(each.label for each in erased[number]),
            )
        )
    sides = ["original"] if erased is None else list(SIDES)
    return {
        "concepts": list(targets),
        "prompts": len({row["prompt_index"] for row in index}),
        "images": len(index),
        "rows": detection_rates(pairs, targets),
        "naming": {name: sum(name in pair.targets for pair in pairs) for name in targets},
        "surplus": {side: surplus(pairs, side, targets, sees_others=bool(known - target_labels)) for side in sides},
        "surplus_p": {} if erased is None else surplus_p_values(pairs, targets),
        "unlearncanvas": measures(pairs, targets, kinds),
        "per_prompt": _per_prompt(index, pairs, targets, sides),
        "warnings": warnings,
    }


def _named(prompt: str, concepts: Sequence[Concept], cards: Iterable[Concept]) -> tuple[frozenset[str], list[Concept]]:
    """Which of the erased concepts, and which other cards, a prompt names; a word within a longer one's does not count."""
    erased = {concept.name for concept in concepts}
    candidates = [*concepts, *(card for card in cards if card.name not in erased)]
    spans = [(match.start, match.end, concept) for concept in candidates for match in concept.find(prompt)]
    matched = {
        concept.name: concept
        for start, end, concept in spans
        if not any(other[0] <= start and end <= other[1] and other[1] - other[0] > end - start for other in spans)
    }
    return frozenset(erased & matched.keys()), [concept for name, concept in matched.items() if name not in erased]


def _per_prompt(
    index: Sequence[dict[str, Any]], pairs: Sequence[ImagePair], targets: dict[str, frozenset[str]], sides: Sequence[str]
) -> list[dict[str, Any]]:
    """How often each target and each other named object was found in each prompt's images."""
    texts = {row["prompt_index"]: row["prompt"] for row in index}
    result = []
    for number, text in texts.items():
        own = [pair for pair in pairs if pair.prompt_index == number]

        def counts(labels: frozenset[str], own: Sequence[ImagePair] = own) -> dict[str, int]:
            return {side: sum(is_found(getattr(pair, side), labels) for pair in own) for side in sides}

        result.append(
            {
                "prompt_index": number,
                "prompt": text,
                "images": len(own),
                "targets": {name: counts(labels) for name, labels in targets.items()},
                "others": {name: counts(labels) for name, labels in own[0].objects.items()},
            }
        )
    return result


@dataclass(frozen=True)
class Picture:
    """What an image file shows, whatever a detector says of it."""

    flat: bool  # a single colour, as pipelines write where the numbers overflowed
    pixels: str  # a digest of size and RGB values

    @classmethod
    def of(cls, image: Image) -> Picture:
        colours = image.convert("RGB")
        return cls(is_flat(colours), hashlib.sha256(repr(colours.size).encode() + colours.tobytes()).hexdigest())


def _identical(
    index: Sequence[dict[str, Any]], pictures: dict[str, list[Picture]], concepts: Sequence[Concept]
) -> dict[str, int]:
    """How many pairs name a concept, and how many of these are the same to the pixel."""
    naming = [number for number, row in enumerate(index) if any(concept.find(row["prompt"]) for concept in concepts)]
    both = pictures.get("erased")
    same = 0 if both is None else sum(pictures["original"][number].pixels == both[number].pixels for number in naming)
    return {"naming": same, "naming_of": len(naming)}


def detect_files(
    detector: Detector, paths: Sequence[Path], description: str, progress: Progress
) -> tuple[list[list[Detection]], list[Picture]]:
    """The detections of image files, and what the files show; several processes look at a share each, and all get all.

    Raises:
        UserError: an image is missing or damaged.
    """
    found: list[list[Detection]] = []
    pictures: list[Picture] = []
    own = parallel.share(paths, BATCH_SIZE)
    with progress(description, len(paths)) as task:
        for start in range(0, len(own), BATCH_SIZE):
            images = []
            for path in own[start : start + BATCH_SIZE]:
                images.append(opened(path, "sd-erase generate"))
                pictures.append(Picture.of(images[-1]))
            found += detector.detect(images)
            task.advance(len(images))
        found, pictures = (
            parallel.in_order(parallel.gathered(found), BATCH_SIZE),
            parallel.in_order(parallel.gathered(pictures), BATCH_SIZE),
        )
        task.advance(len(paths) - len(own))
    return found, pictures


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(side, 2) for side in box]
