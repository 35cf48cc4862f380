"""What the page shows beside text: image pairs as data URIs and training curves as coordinates of an inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase.concepts import Concept
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir, read_jsonl

NAMING, OTHER = 12, 6  # pairs shown of prompts that name the concept, and of ones that do not
SMALL = 128  # pixels; smaller images are embedded as they are and enlarged sharply
EMBEDDED_SIZE = 320  # pixels of the longer side of a larger one
JPEG_QUALITY = 82
CHART_WIDTH, CHART_HEIGHT = 300, 120
MOST_POINTS = 240


def image_pairs(run: RunDir, concepts: Sequence[Concept], labels: set[str], progress: Any = None) -> list[dict[str, Any]]:
    """Groups of image pairs: prompts that name a concept, and ones that do not.

    The pairs are each prompt's first image, of prompts spread evenly over the list: nobody chose them by their looks.

    Args:
        run: a run with images; detections are shown where there are any.
        concepts: what was erased; its words are marked in the prompts.
        labels: the detector's labels of these concepts.
        progress: told of each pair.

    Returns:
        Groups with "title", "of" (prompts to choose from) and "pairs"; a pair has "prompt" (pieces of (text, is concept)),
        "seed" and "sides".
    """
    first: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(run.images / "index.jsonl"):
        if row.get("original") and row.get("erased"):
            first.setdefault(row["prompt_index"], row)
    naming = [row for row in first.values() if any(concept.find(row["prompt"]) for concept in concepts)]
    other = [row for row in first.values() if row not in naming]
    found = {side: _detections(run.detections / f"{side}.jsonl") for side in ("original", "erased")}
    title = ", ".join(concept.name for concept in concepts)
    groups = [(f"Prompts that name {title}", naming, NAMING), (f"Prompts that do not name {title}", other, OTHER)]
    chosen = [(title, rows, _spread(rows, most)) for title, rows, most in groups if rows]
    with (progress or NoProgress())("report", sum(len(rows) for _, _, rows in chosen)) as task:
        result = []
        for title, rows, shown in chosen:
            pairs = []
            for row in shown:
                sides = [_side(run.images / row[side], side, found[side].get(row[side]), labels) for side in found]
                pairs.append(
                    {"prompt": _pieces(row["prompt"], concepts), "text": row["prompt"], "seed": row["seed"], "sides": sides}
                )
                task.advance(1)
            result.append({"title": title, "of": len(rows), "pairs": pairs})
    return result


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of `rows`, evenly spread."""
    if len(rows) <= most:
        return rows
    return [rows[number * len(rows) // most] for number in range(most)]


def _detections(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {row["image"]: row["detections"] for row in read_jsonl(path)} if path.is_file() else {}


def _pieces(prompt: str, concepts: Sequence[Concept]) -> list[tuple[str, bool]]:
    """The prompt cut into pieces, each with whether it is a use of a concept."""
    pieces, position = [], 0
    for match in sorted((match for concept in concepts for match in concept.find(prompt)), key=lambda match: match.start):
        if match.start >= position:
            pieces += [(prompt[position : match.start], False), (prompt[match.start : match.end], True)]
            position = match.end
    return [piece for piece in (*pieces, (prompt[position:], False)) if piece[0]]


def _side(path: Path, side: str, detections: list[dict[str, Any]] | None, labels: set[str]) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
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
        image.thumbnail((EMBEDDED_SIZE, EMBEDDED_SIZE))
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
        for row in read_jsonl(path):
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
