"""The table of a comparison: one row a method over its cells, and all of it as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sd_erase import markdown
from sd_erase.metrics.rates import wilson

REDRAWN = "anchor, other seeds"  # the floor of the Fréchet distance: the original on the same captions, from other noise


def method_row(method: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """One method over all its concepts and seeds: pooled counts, and the spread of each rate over the seeds."""
    return {
        "method": method,
        "cells": len(cells),
        **{
            name: _pooled(cells, *where)
            for name, where in {
                "named": ("named", "target"),
                "unlisted": ("unlisted", "target"),
                "companions": ("named", "companions"),
                "doubled": ("named", "doubled"),
                "unnamed": ("named", "unnamed"),
                "untouched": ("untouched", "companions"),
                "senses": ("senses", "companions"),
                "senses_target": ("senses", "target"),
            }.items()
        },
        **{
            name: _mean([cell["groups"][group].get(name) for cell in cells if group in cell["groups"]])
            for group, name in (("untouched", "psnr"), ("untouched", "psnr_tenth"), ("named", "clip_score"), ("named", "frechet"))
        },
        **{f"attack_{arm}": _pooled_attack(cells, arm) for arm in ("random", "search")},
        "companions_of_anchor": _ratio(cells, "named", "companions", "anchor"),
        "untouched_of_original": _ratio(cells, "untouched", "companions", "untouched"),
        "clip_similarity": _mean([(cell["clip_similarity"] or {}).get("after") for cell in cells]),
        "seconds": _mean([cell["seconds"] for cell in cells]),
        "peak_memory_mb": _mean([cell["peak_memory_mb"] for cell in cells]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _pooled(cells: Sequence[dict[str, Any]], group: str, name: str) -> dict[str, Any] | None:
    """Count, number, rate and Wilson's interval over all cells, and the lowest and highest rate of one seed."""
    counts = [(cell["seed"], cell["groups"][group][name]) for cell in cells if group in cell["groups"]]
    n = sum(each["n"] for _, each in counts)
    if not n:
        return None
    by_seed: dict[int, list[int]] = {}
    for seed, each in counts:
        so_far = by_seed.setdefault(seed, [0, 0])
        so_far[0], so_far[1] = so_far[0] + each["count"], so_far[1] + each["n"]
    rates = [count / number for count, number in by_seed.values() if number]
    count = sum(each["count"] for _, each in counts)
    low, high = wilson(count, n)
    return {"count": count, "n": n, "rate": count / n, "low": low, "high": high, "seeds": [min(rates), max(rates)]}


def _pooled_attack(cells: Sequence[dict[str, Any]], arm: str) -> dict[str, Any] | None:
    """As `_pooled`, of the images that an attack drew."""
    under = [{"seed": cell["seed"], "groups": {"attack": cell["attack"][arm]}} for cell in cells if "attack" in cell]
    return _pooled(under, "attack", "images") if under else None


def _ratio(cells: Sequence[dict[str, Any]], group: str, name: str, against: str) -> float | None:
    """Of what the original draws in group `against`, how much the erased model draws in `group`."""
    pairs = [(cell["groups"][group][name], cell["original"][against][name]) for cell in cells if group in cell["groups"]]
    shown = [(erased, original) for erased, original in pairs if erased["n"]]  # images of a single colour show nothing
    before, after = sum(original["count"] for _, original in shown), sum(erased["count"] for erased, _ in shown)
    # as many on both sides, less the images that were left out
    size = sum(original["n"] for _, original in shown) / max(1, sum(erased["n"] for erased, _ in shown))
    return after * size / before if before else None


COLUMNS = (
    ("concept, listed words", "named"),
    ("concept, unlisted words", "unlisted"),
    ("companions, of the original's on the anchor", "companions_of_anchor"),
    ("drawn twice", "doubled"),
    ("unnamed objects", "unnamed"),
    ("untouched prompts, of the original's", "untouched_of_original"),
    ("PSNR, dB: median", "psnr"),
    ("tenth percentile", "psnr_tenth"),
    ("spared senses", "senses"),
    ("random words before it", "attack_random"),
    ("found words before it", "attack_search"),
    ("CLIPScore", "clip_score"),
    ("Fréchet", "frechet"),
    ("CLIP similarity", "clip_similarity"),
    ("s", "seconds"),
    ("memory, MB", "peak_memory_mb"),
)


def render(result: dict[str, Any]) -> str:
    """The table as Markdown: the original, then one line a method."""
    recipe = result["recipe"]
    original = list(result["original"].values())

    def whole(group: str) -> str:
        """Of the original itself, where it shows anything that the others' shares could be of."""
        return "100 %" if any(one[group]["companions"]["count"] for one in original if group in one) else "–"

    def total(group: str, *names: str) -> str:
        counts = [one[group] for one in original if group in one]
        for name in names:
            counts = [each[name] for each in counts]
        n = sum(each["n"] for each in counts)
        return _percent(sum(each["count"] for each in counts) / n) if n else "–"

    first = {
        "named": total("named", "target"), "unlisted": total("unlisted", "target"), "companions_of_anchor": whole("anchor"),
        "doubled": f"{total('named', 'doubled')}; anchor {total('anchor', 'doubled')}",
        "unnamed": f"{total('named', 'unnamed')}; anchor {total('anchor', 'unnamed')}",
        "attack_random": "–",
        "attack_search": f"anchor {total('attack', 'search', 'images')}",
        "untouched_of_original": whole("untouched"), "psnr": "–", "psnr_tenth": "–", "senses": total("senses", "companions"),
        "clip_score": _number(_mean([one["anchor"].get("clip_score") for one in original if "anchor" in one])),
        "frechet": _number(_mean([one[REDRAWN].get("frechet") for one in original if REDRAWN in one])),
        "clip_similarity": _number(_mean([(cell["clip_similarity"] or {}).get("before") for cell in result["cells"]]), 2),
        "seconds": "", "peak_memory_mb": "",
    }  # fmt: skip
    lines = [
        f"# {markdown.text(result['title'])}",
        "",
        f"Concepts: {markdown.text(', '.join(recipe['concepts']))}. Training seeds: {', '.join(map(str, recipe['seeds']))}. Images a prompt: "
        + ", ".join(f"{name} {number}" for name, number in recipe["images"].items())
        + ". Wilson 95 % intervals over all images; in brackets the lowest and highest seed.",
        "",
        *markdown.table(
            ["method", *(title for title, _ in COLUMNS)],
            [
                ["original", *(first[key] for _, key in COLUMNS)],
                *([row["method"], *(_cell(row[key], key) for _, key in COLUMNS)] for row in result["rows"]),
            ],
        ),
        *_judges(result),
        *_left_out(result),
    ]
    return "\n".join(lines) + "\n"


def _judges(result: dict[str, Any]) -> list[str]:
    """Lines on what looked at the images, and how far a CLIP among them can be trusted."""
    cards = [cell.get("judge") or {"name": "unknown", "weights": "unknown"} for cell in result["cells"]]
    shown = dict.fromkeys(f"{card['name']} ({card['weights']})" for card in cards)
    told = dict.fromkeys(text for cell in result["cells"] for text in cell.get("calibrations", ()))
    return ["", f"Judge: {markdown.text(', '.join(shown))}.", *(f"\n> {markdown.sentence(text)}" for text in told)]


def _left_out(result: dict[str, Any]) -> list[str]:
    """Lines on the images that no share counts, of the original's and each method's."""
    counts = {"original": sum(group.get("flat", 0) for one in result["original"].values() for group in one.values())}
    for cell in result["cells"]:
        flat = sum(group.get("flat", 0) for group in cell["groups"].values())
        counts[cell["method"]] = counts.get(cell["method"], 0) + flat
    said = [
        f"{markdown.text(name)}: {count} images of a single colour, as where numbers overflow, show nothing: the shares leave them out, PSNR, CLIPScore and Fréchet do not."
        for name, count in counts.items()
        if count
    ]
    return ["", *said] if said else []


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(value: Any, key: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        low, high = value["seeds"]
        spread = f" ({100 * low:.1f}–{100 * high:.1f})" if high > low else ""
        return f"{_percent(value['rate'])} [{100 * value['low']:.0f}–{100 * value['high']:.0f}]{spread}"
    if key.endswith(("_of_anchor", "_of_original")):
        return _percent(value)
    return _number(value, 2 if key == "clip_similarity" else 0 if key in ("seconds", "peak_memory_mb") else 1)
