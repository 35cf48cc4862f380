"""What the page shows beside text: image pairs as data URIs and training curves as coordinates of an inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase import forms, jsonfile
from sd_erase.concepts import Concept
from sd_erase.drawing import unreadable
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir, read_jsonl

NAMING, OTHER = 12, 6  # pairs shown of prompts that name the concept, and of ones that do not
SMALL = 128  # pixels; smaller images are embedded as they are and enlarged sharply
EMBEDDED_SIZE = 320  # pixels of the longer side of a larger one
MANY_PAIRS, SMALLER_SIZE = 150, 200  # where more pairs are shown, the page would grow beyond what a browser likes
JPEG_QUALITY = 82
CHART_WIDTH, CHART_HEIGHT = 300, 120
MOST_POINTS = 240


def image_pairs(run: RunDir, concepts: Sequence[Concept], progress: Any = None) -> list[dict[str, Any]]:
    """Groups of image pairs: all in which a concept was still found, then prompts that name a concept, and ones that do not.

    The pairs of the last two are each prompt's first image, of prompts spread evenly over the list: nobody chose them by their
    looks, and a page that shows only them would hide what leaks elsewhere.

    Args:
        run: a run with images; detections are shown where there are any.
        concepts: what was erased; its words are marked in the prompts.
        progress: told of each pair.

    Returns:
        Groups with "title", "of" (what to choose from), "unit" (of what), "leaks" and "pairs"; a pair has "prompt" (pieces of
        (text, is concept)), "seed" and "sides".
    """
    rows = [row for row in run.drawn() if row.get("original") and row.get("erased")]
    found = {side: _detections(run.detections / f"{side}.jsonl") for side in ("original", "erased")}
    labels = {label for concept in concepts for label in concept.labels}
    groups = [group for group in (*_leaks(rows, concepts, found["erased"]), *_samples(rows, concepts)) if group["rows"]]
    size = EMBEDDED_SIZE if sum(len(group["rows"]) for group in groups) <= MANY_PAIRS else SMALLER_SIZE
    with (progress or NoProgress())("report", sum(len(group["rows"]) for group in groups)) as task:
        for group in groups:
            group["pairs"] = []
            for row in group.pop("rows"):
                sides = [_side(run.images / row[side], side, found[side].get(row[side]), labels, size) for side in found]
                pair = {"prompt": _pieces(row["prompt"], concepts), "text": row["prompt"], "seed": row["seed"], "sides": sides}
                group["pairs"].append(pair)
                task.advance(1)
    return groups


def _leaks(
    rows: Sequence[dict[str, Any]], concepts: Sequence[Concept], erased: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """All pairs whose erased image shows a concept: where the prompt names it, and where it does not; the surest first."""
    asked: list[tuple[float, dict[str, Any]]] = []
    unasked: list[tuple[float, dict[str, Any]]] = []
    naming = 0
    for row in rows:
        named = {label for concept in concepts if concept.find(row["prompt"]) for label in concept.labels}
        other = {label for concept in concepts for label in concept.labels} - named
        naming += bool(named)
        for labels, where in ((named, asked), (other, unasked)):
            scores = [found["score"] for found in erased.get(row["erased"], ()) if found["label"] in labels]
            if scores:
                where.append((max(scores), row))
    title = ", ".join(concept.name for concept in concepts)
    return [
        {"title": heading, "of": number, "unit": "images", "leaks": True,
         "rows": [row for _, row in sorted(pairs, key=lambda pair: -pair[0])]}
        for heading, number, pairs in (
            (f"Still found: {title}, in images whose prompt names it", naming, asked),
            (f"Found though no word asks for it: {title}", len(rows), unasked),
        )
    ]  # fmt: skip


def _samples(rows: Sequence[dict[str, Any]], concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """The first pair of prompts that name a concept, and of ones that do not, spread evenly over the list."""
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["prompt_index"], row)
    naming = [row for row in first.values() if any(concept.find(row["prompt"]) for concept in concepts)]
    other = [row for row in first.values() if row not in naming]
    title = ", ".join(concept.name for concept in concepts)
    return [
        {"title": heading, "of": len(chosen), "unit": "prompts", "leaks": False, "rows": _spread(chosen, most)}
        for heading, chosen, most in (
            (f"Prompts that name {title}", naming, NAMING),
            (f"Prompts that do not name {title}", other, OTHER),
        )
    ]


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of `rows`, evenly spread."""
    if len(rows) <= most:
        return rows
    return [rows[number * len(rows) // most] for number in range(most)]


def _detections(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(path) if path.is_file() else (), 1):
        jsonfile.check(row, forms.DETECTED, path, f"line {number}")
        found[row["image"]] = row["detections"]
    return found


def _pieces(prompt: str, concepts: Sequence[Concept]) -> list[tuple[str, bool]]:
    """The prompt cut into pieces, each with whether it is a use of a concept."""
    pieces, position = [], 0
    for match in sorted((match for concept in concepts for match in concept.find(prompt)), key=lambda match: match.start):
        if match.start >= position:
            pieces += [(prompt[position : match.start], False), (prompt[match.start : match.end], True)]
            position = match.end
    return [piece for piece in (*pieces, (prompt[position:], False)) if piece[0]]


def _side(path: Path, side: str, detections: list[dict[str, Any]] | None, labels: set[str], size: int) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except unreadable() as error:
        raise UserError(f"Image {path} is missing or damaged: run `sd-erase generate` again.") from error
    width, height = image.size
    boxes = [
        {
            "label": found["label"],
            "score": f"{found['score']:.2f}",
            "is_target": found["label"] in labels,
            **dict(zip(("left", "top", "right", "bottom"), found["box"], strict=True)),
        }
        for found in sorted(detections or (), key=lambda found: -found["score"])
    ]
    buffer = io.BytesIO()
    if max(width, height) <= SMALL:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((size, size))
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    seen = None if detections is None else ", ".join(dict.fromkeys(box["label"] for box in boxes)) or "nothing"
    return {
        "side": side, "uri": uri, "width": width, "height": height, "small": kind == "png", "boxes": boxes, "seen": seen,
    }  # fmt: skip


def curves(path: Path, best_step: int | None) -> list[dict[str, Any]]:
    """Charts of the loss and of each of its terms over the training steps; none where there are no metrics.

    Returns:
        Charts with "title", "lines" (class and points of a polyline in a box of CHART_WIDTH by CHART_HEIGHT), "low" and
        "high" (the axis' ends), "first" and "last" step, and "best" (x of the chosen step, or None).
    """
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    if path.is_file():
        for number, row in enumerate(read_jsonl(path, finite=False), 1):
            jsonfile.check(row, forms.METRIC, path, f"line {number}")
            for name, value in {"loss": row.get("loss"), **row.get("terms", {})}.items():
                if value is not None and math.isfinite(value):
                    series.setdefault(name, {}).setdefault(row["split"], []).append((row["step"], value))
    charts = []
    for name, lines in series.items():
        values = [value for points in lines.values() for _, value in points]
        steps = [step for points in lines.values() for step, _ in points]
        low, high, first, last = min(values), max(values), min(steps), max(steps)

        def x(step: float, first: int = first, last: int = last) -> float:
            return round(CHART_WIDTH * (step - first) / max(1, last - first), 1)

        def y(value: float, low: float = low, high: float = high) -> float:
            return round(CHART_HEIGHT * (1 - (value - low) / ((high - low) or 1.0)), 1)

        charts.append(
            {
                "title": "loss, all terms" if name == "loss" else name.replace("_", " "),
                "lines": [
                    {"split": split, "points": " ".join(f"{x(step)},{y(value)}" for step, value in _thin(points))}
                    for split, points in sorted(lines.items())
                ],
                "low": f"{low:.3g}",
                "high": f"{high:.3g}",
                "first": first,
                "last": last,
                "best": None if best_step is None or not first <= best_step <= last else x(best_step),
                "width": CHART_WIDTH,
                "height": CHART_HEIGHT,
            }
        )
    return charts


def _thin(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, where there are more than a line can show."""
    size = math.ceil(len(points) / MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in bins]
