"""Images into rates: how often the erased concept, and every other object that the prompts name, is still found.

Reads ``images/index.jsonl``, its images and ``concepts.json``. Writes ``detections/{original,erased}.jsonl`` (one line an
image: its index row's keys and ``detections``), ``report/evaluation.json`` and ``report/evaluation.md``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, chain, digests, forms, jsonfile, markdown, parallel, provenance, resources
from sd_erase.concepts import Concept, all_cards, read_concepts
from sd_erase.config import RunConfig
from sd_erase.detection import BATCH_SIZE, Detection, Detector, load_detector
from sd_erase.drawing import unreadable
from sd_erase.errors import UserError
from sd_erase.metrics.rates import ImagePair, detection_rates, is_found, surplus, surplus_p_values
from sd_erase.metrics.verdicts import doubts
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic, write_jsonl_atomic, write_text_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

SIDES = ("original", "erased")
FLAT_SPREAD = 3  # of 255: an image whose every channel spans no more is a single colour


def evaluate(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Detect objects in the run's images and compare the original with the erased model.

    Args:
        config: the run's configuration; section ``evaluate``.
        run: where the images lie and the results go.
        progress: told of each image.

    Returns:
        The manifest "evaluate": ``rows`` (see `metrics.rates.row`; roles "target", "target_named", "others", "object"),
        ``surplus`` of each side, ``per_prompt``, ``detector``, ``flat`` (side -> images of a single colour; pairs with one are
        left out), ``identical`` (pairs that name a concept and are the same to the pixel) and ``warnings``.

    Raises:
        UserError: no images, no concept that the detector can find, or a bad detector.
    """
    progress = progress or NoProgress()
    run.require("generate", "generate")
    links = chain.Chain(run, config, progress)
    links.require("generate")
    concepts = read_concepts(run)
    index = list(run.drawn())
    detector = detector_of(config, run)
    read = links.reads("evaluate")
    inputs = fingerprint(read["images"], [concept.to_dict() for concept in concepts], decides(detector))
    if run.is_complete("evaluate", inputs) and links.holds("evaluate"):
        return {**(run.read_manifest("evaluate") or {}), **stored(run)}
    if parallel.is_main():
        run.reopen("evaluate")
    found: dict[str, list[list[Detection]]] = {}
    pictures: dict[str, list[Picture]] = {}
    for side in SIDES:
        if not all(row.get(side) for row in index):
            if parallel.is_main():
                (run.detections / f"{side}.jsonl").unlink(missing_ok=True)  # of images that were drawn before
            continue
        paths = [run.images / row[side] for row in index]
        found[side], pictures[side] = detect_files(detector, paths, f"{side} detections", progress)
        if not parallel.is_main():
            continue
        rows = (
            {
                "image": row[side],
                "prompt_index": row["prompt_index"],
                "seed": row["seed"],
                "detections": [{"label": each.label, "score": round(each.score, 4), "box": _rounded(each.box)} for each in one],
            }
            for row, one in zip(index, found[side], strict=True)
        )
        write_jsonl_atomic(run.detections / f"{side}.jsonl", rows)
    if not parallel.is_main():
        return {}
    told = [number for number in range(len(index)) if not any(each[number].flat for each in pictures.values())]
    if not told:
        raise UserError(
            "Every image pair has an image of a single colour, so nothing can be measured: the model overflowed; run "
            "`sd-erase generate --device cpu`."
        )
    kept = {side: [each[number] for number in told] for side, each in found.items()}
    cards = all_cards().values()
    result = compare([index[number] for number in told], kept["original"], kept.get("erased"), concepts, cards, detector.labels)
    result["left_out"] = len(index) - len(told)
    result["flat"] = {side: sum(picture.flat for picture in each) for side, each in pictures.items()}
    result["identical"] = _identical(index, pictures, concepts)
    result["warnings"] = doubts(result) + result["warnings"]
    result["detector"] = detector.card
    result["base"] = config.base
    write_json_atomic(run.report / "evaluation.json", result)
    write_text_atomic(run.report / "evaluation.md", render_markdown(result))
    return run.complete("evaluate", inputs, {**result, "from": read, "made": links.makes("evaluate")})


def stored(run: RunDir) -> dict[str, Any]:
    """What ``report/evaluation.json`` holds.

    Raises:
        UserError: it is damaged.
    """
    found: dict[str, Any] = jsonfile.read_as(run.report / "evaluation.json", forms.EVALUATION)
    return found


def decides(detector: Detector) -> str:
    """A fingerprint of all that decides what is found in an image and what is counted: detector, cards of concepts, code."""
    versions = [provenance.version_of(name) for name in ("ultralytics", "onnxruntime")]
    code = digests.of_sources("detection", "evaluation", "metrics", "concepts")
    return fingerprint(detector.card, sorted(detector.labels), [card.to_dict() for card in all_cards().values()], versions, code)


def detector_of(config: RunConfig, run: RunDir | None = None) -> Detector:
    """The detector that the settings name, or else that of the base (of `run`, which knows a base that is no longer at hand).

    Raises as `load_detector` does.
    """
    name = config.evaluate.detector
    if name == "auto":
        name = (bases.resolve(config.base) if run is None else chain.base_of(run, config)).detector
    wanted = config.evaluate
    overrides: dict[str, Any] = {} if wanted.confidence < 0 else {"confidence": wanted.confidence}
    if wanted.image_size:
        overrides["image_size"] = wanted.image_size
    return load_detector(name, device=resources.device(config.device), trust_pickle=wanted.trust_pickle, **overrides)


def compare(
    index: Sequence[dict[str, Any]],
    original: Sequence[Sequence[Detection]],
    erased: Sequence[Sequence[Detection]] | None,
    concepts: Sequence[Concept],
    cards: Iterable[Concept],
    known_labels: frozenset[str],
) -> dict[str, Any]:
    """The comparison from detections alone.

    Args:
        index: the images' index rows.
        original: detections of each row's original image.
        erased: of each row's erased image, or None.
        concepts: what was erased.
        cards: the concepts whose words are looked for in the prompts.
        known_labels: what the detector can find.

    Returns:
        ``concepts``, ``prompts``, ``images``, ``rows``, ``naming`` (concept -> images whose prompt names it), ``surplus``,
        ``surplus_p``, ``per_prompt``, ``warnings``.

    Raises:
        UserError: the detector knows no label of an erased concept.
    """
    targets = {}
    for concept in concepts:
        targets[concept.name] = frozenset(concept.labels) & known_labels
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
    unknown = sorted({card.name for _, others in named.values() for card in others if not known_labels & frozenset(card.labels)})
    if unknown:
        warnings.append(f"The detector has no label for {', '.join(unknown)}: named by prompts but not counted.")
    pairs = []
    for number, row in enumerate(index):
        naming, others = named[row["prompt"]]
        objects = {}
        for card in others:
            labels = frozenset(card.labels) & known_labels
            if labels and not labels & target_labels:
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
        "surplus": {side: surplus(pairs, side, targets) for side in sides},
        "surplus_p": {} if erased is None else surplus_p_values(pairs, targets),
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
        channels: Any = colours.getextrema()  # of one channel a pair, of several a tuple of pairs
        flat = all(high - low <= FLAT_SPREAD for low, high in channels)
        return cls(flat, hashlib.sha256(repr(colours.size).encode() + colours.tobytes()).hexdigest())


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
    import PIL.Image

    found: list[list[Detection]] = []
    pictures: list[Picture] = []
    own = parallel.share(paths, BATCH_SIZE)
    with progress(description, len(paths)) as task:
        for start in range(0, len(own), BATCH_SIZE):
            images = []
            for path in own[start : start + BATCH_SIZE]:
                try:
                    image = PIL.Image.open(path)
                    image.load()
                except unreadable() as error:
                    raise UserError(f"Image {path} is missing or damaged: run `sd-erase generate` again.") from error
                images.append(image)
                pictures.append(Picture.of(image))
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


_ROLE_NAMES = {"target": "erased", "target_named": "erased", "others": "kept", "object": "kept"}


def percent(share: dict[str, Any] | None) -> str:
    """A rate with its 95 % interval; "–" where there is none."""
    if share is None or share["rate"] is None:
        return "–"
    return f"{share['rate']:.1%} [{100 * share['low']:.0f}–{100 * share['high']:.0f}]"


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text: name, role, number, original, erased, change in points, p-value."""
    change = "–" if row["change"] is None else f"{100 * row['change']:+.1f}"
    p_value = row["p_value"]
    p_text = "–" if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    rates = [percent(row["original"]), percent(row["erased"])]
    return [row["name"], _ROLE_NAMES[row["role"]], str(row["images"]), *rates, change, p_text]


HEADERS = ("Object", "Should be", "n", "Original [95 %]", "Erased [95 %]", "Change", "p")
ROLE_COLUMN = 1


def _caption(result: dict[str, Any]) -> str:
    detector = result["detector"]
    return (
        f"{result['prompts']} prompts, {result['images']} images a model; detector {detector['name']} ({detector['weights']}, "
        f"sha256 {detector['weights_sha256'][:12]}), {detector['image_size']} px, confidence {detector['confidence']:g}"
    )


def render_table(result: dict[str, Any]) -> Any:
    """The rates as a `rich.table.Table` that fits into 80 columns."""
    from rich import box
    from rich.table import Table

    title = f"Detection rate before and after erasing {', '.join(result['concepts'])}"
    table = Table(title=title, caption=_caption(result), title_style="bold", box=box.SIMPLE_HEAD)
    shown = [number for number in range(len(HEADERS)) if number != ROLE_COLUMN]  # bold says it in the terminal
    for number in shown:
        table.add_column(HEADERS[number], justify="right" if number else "left", no_wrap=number > 0)
    previous = None
    for row in result["rows"]:
        if previous and row["role"] != previous and row["role"] in {"others", "object"}:
            table.add_section()
        previous = row["role"]
        cells = _cells(row)
        table.add_row(*(cells[number] for number in shown), style="bold" if row["role"] in {"target", "others"} else "")
    return table


def render_markdown(result: dict[str, Any]) -> str:
    """The rates, what is in the images beyond the named objects, and the counts of each prompt, as Markdown."""
    sides = list(result["surplus"])
    beyond = [
        (
            f"Boxes of named other objects, an image (asked for: {result['surplus']['original']['named_others_asked']:.2f})",
            [f"{result['surplus'][side]['named_others_mean_count']:.2f}" for side in sides],
        ),
        ("Named other objects found more than once", [percent(result["surplus"][side]["doubled"]) for side in sides]),
        ("Images with an object that nobody named", [percent(result["surplus"][side]["unnamed"]) for side in sides]),
        (
            "Those objects (images)",
            [", ".join(f"{k} {v}" for k, v in result["surplus"][side]["unnamed_labels"].items()) or "none" for side in sides],
        ),
    ]

    def found(counts: dict[str, dict[str, int]]) -> str:
        return ", ".join(f"{name} {' → '.join(str(value) for value in each.values())}" for name, each in counts.items()) or "–"

    lines = [
        f"# Detection rate before and after erasing {markdown.text(', '.join(result['concepts']))}",
        "",
        *(f"> {markdown.sentence(warning)}\n" for warning in result["warnings"]),
        *markdown.table(HEADERS, (_cells(row) for row in result["rows"])),
        "",
        markdown.text(_caption(result)) + ".",
        "Intervals: Wilson, 95 %. p: McNemar's exact test over pairs from the same prompt, seed and noise; the line of all "
        "others counts each named object of an image, which are not independent of one another.",
        "",
        "## Beyond the named objects",
        "",
        *markdown.table(["", *(side.capitalize() for side in sides)], ([name, *values] for name, values in beyond)),
        "",
        "## Each prompt",
        "",
        f"Images in which an object was found ({' → '.join(sides)}).",
        "",
        *markdown.table(
            ["Prompt", "Images", "Erased concept", "Other named objects"],
            ([row["prompt"], str(row["images"]), found(row["targets"]), found(row["others"])] for row in result["per_prompt"]),
        ),
    ]
    return "\n".join(lines) + "\n"
