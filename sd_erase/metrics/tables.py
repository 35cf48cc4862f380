"""An evaluation as a table: of the terminal, and as Markdown."""

from __future__ import annotations

from typing import Any

from sd_erase import markdown
from sd_erase.metrics.unlearncanvas import NAMES

SIDES = ("original", "erased")
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
    judges = result["detector"].get("judges") or [result["detector"]]
    shown = [
        f"detector {one['name']} ({one['weights']}, sha256 {one['weights_sha256'][:12]}), {one['image_size']} px, confidence "
        f"{one['confidence']:g}"
        for one in judges
    ]
    return f"{result['prompts']} prompts, {result['images']} images a model; {'; '.join(shown)}"


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
    for opinion in result.get("opinions", ()):
        table.add_section()
        for row in opinion["rows"]:
            cells = _cells({**row, "name": f"{row['name']} by {opinion['judge']}"})
            table.add_row(*(cells[number] for number in shown))
    return table


def apart_sentences(opinion: dict[str, Any], first: str) -> list[str]:
    """How often a further judge differs from the first, a sentence for each concept and side.

    Args:
        opinion: see `evaluation.opinions`.
        first: the first judge's name.
    """
    second = opinion["judge"]
    return [
        f"{first} and {second} differ on {name} in {counts['first'] + counts['second']} of {counts['of']} {side} images: only {first} sees it in "
        f"{counts['first']}, only {second} in {counts['second']}."
        for name, sides in opinion["apart"].items()
        for side, counts in sides.items()
    ]


def _measures(result: dict[str, Any]) -> list[str]:
    """UnlearnCanvas' measures as Markdown; nothing where no prompt asks for a concept."""
    found = result.get("unlearncanvas") or {}
    rows = [
        [name, f"{measure}, {NAMES[measure]}", *(percent(sides.get(side)) for side in SIDES)]
        for name, all_measures in found.items()
        for measure, sides in all_measures.items()
        if sides["original"]["n"]
    ]
    if not rows:
        return []
    return [
        "",
        "## UnlearnCanvas' measures",
        "",
        *markdown.table(["Erased", "Measure (arXiv:2402.11846)", "Original [95 %]", "Erased [95 %]"], rows),
        "",
        "IRA and CRA are means over the concepts that prompts ask for, their intervals of all images together.",
    ]


def _opinions(result: dict[str, Any]) -> list[str]:
    """What further judges say, as Markdown."""
    found = result.get("opinions") or []
    if not found:
        return []
    first = result["detector"].get("judges", [result["detector"]])[0]["name"]
    rows = [[opinion["judge"], *_cells(row)] for opinion in found for row in opinion["rows"]]
    said = [f"- {markdown.sentence(text)}" for opinion in found for text in apart_sentences(opinion, first)]
    return ["", "## A second judge", "", *markdown.table(["Judge", *HEADERS], rows), "", *said]


def _strangers(surplus: dict[str, Any]) -> str:
    """The objects that nobody named with their images; "–" of a judge that could see none."""
    found = ", ".join(f"{label} {count}" for label, count in surplus["unnamed_labels"].items())
    return found or ("none" if surplus["unnamed"]["n"] else "–")


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
            [_strangers(result["surplus"][side]) for side in sides],
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
        *_opinions(result),
        *_measures(result),
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
