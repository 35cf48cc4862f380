"""A grid or random search over settings, judged on the validation split: forgetting against retention.

Writes ``sweep.md``, ``sweep.json`` and ``sweep.svg`` (with its PNG); trained runs lie in the bench and are found again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import markdown, quiet, schema, yamlfile
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.pairs import read_pairs
from sd_erase.reproduce import Recipe, kept, markdown_table
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.tables import COLOURS, ZERO_SHOT, save_figure, zero_shot_of
from sd_erase.rundir import RunDir, fingerprint, write_text_atomic

SET = "validation set"  # the column of tables whose lines were judged on several


@dataclass(frozen=True)
class Axis:
    """What one setting may be: `values`, or any number from `low` to `high`, log-uniform (a whole one where the setting is)."""

    setting: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0


def read_axis(text: str) -> Axis:
    """``SETTING=V1,V2,...`` or ``SETTING=LOW..HIGH``.

    Raises:
        UserError: neither.
    """
    setting, _, listed = text.partition("=")
    low, dots, high = listed.partition("..")
    try:
        if dots:
            axis = Axis(setting, low=float(low), high=float(high))
            if not (setting and 0 < axis.low < axis.high < math.inf):
                raise ValueError
            return axis
        values = tuple(_value(value) for value in listed.split(","))
        if not setting or None in values:
            raise ValueError
        return Axis(setting, values)
    except ValueError:
        raise UserError(
            f"--over {text!r} is not of the form SETTING=V1,V2 or SETTING=LOW..HIGH: try --over train.learning_rate=1e-4,3e-4."
        ) from None


def _value(text: str) -> Any:
    """A number, a truth value or a word."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)  # YAML reads "1e-4" as text
    return yamlfile.parse(text, "The value")


def points(axes: Sequence[Axis], number: int, seed: int = 0) -> list[dict[str, Any]]:
    """The settings to try: the whole grid, or `number` random points of it.

    Raises:
        UserError: a range without a number of points, or without a whole number where the setting is one.
    """
    rng = random.Random(f"sweep-{seed}")
    if ranged := [axis.setting for axis in axes if not axis.values]:
        if not number:
            raise UserError(f"--over {ranged[0]}=LOW..HIGH has no end of values: pass --random N, or a list.")
        return [
            {axis.setting: rng.choice(axis.values) if axis.values else _drawn(axis, rng) for axis in axes} for _ in range(number)
        ]
    grid = [
        dict(zip([axis.setting for axis in axes], values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    return rng.sample(grid, number) if 0 < number < len(grid) else grid


def _drawn(axis: Axis, rng: random.Random) -> float:
    """A number of a range, of three digits at most."""
    number = float(f"{math.exp(rng.uniform(math.log(axis.low), math.log(axis.high))):.3g}")
    if next((hint for name, hint, _ in schema.walk(RunConfig) if name == axis.setting), float) is not int:
        return number
    least, most = math.ceil(axis.low), math.floor(axis.high)
    if least > most:
        raise UserError(f"--over {axis.setting}={axis.low}..{axis.high} holds no whole number: widen it.")
    return min(max(round(number), least), most)


def pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether no other row is better in one of "forgetting" and "retention" and as good in the other."""

    def better(one: dict[str, Any], other: dict[str, Any]) -> bool:
        pairs = [(one[key], other[key]) for key in ("forgetting", "retention")]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [not any(better(other, row) for other in rows) for row in rows]


def sweep(
    bench: Bench, concepts: str, side: str, settings: dict[str, Any], axes: Sequence[Axis], number: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Train every point and judge it on the validation split.

    Args:
        concepts: a concept, or several joined by " + ".
        side: "classes" or "captions".
        settings: what all points share, by dotted name.
        axes: what differs.
        number: of random points; 0 takes the whole grid.

    Returns:
        What ``sweep.json`` holds: "rows", best first, each with its settings, "forgetting" (100 minus the forget set's accuracy, mean of
        prediction and retrieval), "retention" (the retain set's accuracy) and "pareto"; and "notes".

    Raises:
        UserError: an unknown setting, or data that do not fit.
    """
    recipe = Recipe(f"Sweep: {concepts}", settings=settings)
    chosen = points(axes, number, seed)
    for point in chosen:  # all are checked before the first is trained
        try:
            bench.config(concepts, side, seed, {**settings, **point})
        except (KeyError, TypeError) as error:
            raise UserError(f"--over or --set names an unknown setting {error}.") from error
    path = bench.folder / "sweep.json"

    def key() -> str:
        asked = [concepts, side, settings, [dataclasses.asdict(axis) for axis in axes], chosen, seed]
        return kept.key_of(bench, asked, [side], draws=False, detects=False)

    if path.is_file() and (known := kept.known(path, key(), bench)) is not None:
        bench.finished.append("sweep")
        return known
    bench.used.clear()
    rows, sets = [], _Sets()
    with bench.progress("sweep", len(chosen)) as task:
        for point in chosen:
            found = zero_shot_of(bench, {**settings, **point}, concepts, seed, side, recipe, "validation")
            forget, retain = ((found[ZERO_SHOT[i]] + found[ZERO_SHOT[i + 2]]) / 2 for i in (0, 1))
            judged = sets.name(bench.run({**settings, **point}, concepts, seed, side))
            rows.append({**point, "forgetting": 100 - forget, "retention": retain, SET: judged})
            task.advance()
    for name in sets.sizes:  # what is measured on other images is neither better nor worse
        own = [row for row in rows if row[SET] == name]
        for row, on_front in zip(own, pareto(own), strict=True):
            row["pareto"] = on_front
    rows.sort(key=lambda row: -(row["forgetting"] + row["retention"]))
    original = zero_shot_of(bench, None, concepts, seed, side, recipe, "validation")
    start = {
        "forgetting": 100 - (original[ZERO_SHOT[0]] + original[ZERO_SHOT[2]]) / 2,
        "retention": (original[ZERO_SHOT[1]] + original[ZERO_SHOT[3]]) / 2,
        SET: sets.name(bench.harvested(concepts, side, seed, settings)),
    }
    notes = sets.note([axis.setting for axis in axes])
    if not notes:
        for row in (*rows, start):
            del row[SET]
    result = {
        "concepts": concepts, "data": side, "settings": settings, "axes": [dataclasses.asdict(axis) for axis in axes],
        "original": start, "rows": rows, "notes": notes,
    }  # fmt: skip
    figure, page = plot(rows, start, bench.folder / "sweep"), bench.folder / "sweep.md"
    write_text_atomic(page, render(result))
    return kept.write(path, key(), result, [page, figure, figure.with_suffix(".png")], bench)


class _Sets:
    """The validation sets on which points were judged, by a number each."""

    def __init__(self) -> None:
        self.sizes: dict[str, str] = {}  # number -> how many pairs
        self._numbers: dict[str, str] = {}  # by content

    def name(self, run: RunDir) -> str:
        """The number of a run's validation set."""
        pairs = [pair for pair in read_pairs(run) if pair.split == "validation"]
        content = fingerprint(sorted((pair.set, pair.key, pair.caption) for pair in pairs))
        number = self._numbers.setdefault(content, f"{len(self._numbers) + 1}")
        forget = sum(pair.set == "forget" for pair in pairs)
        self.sizes.setdefault(number, f"{forget} forget and {len(pairs) - forget} retain pairs")
        return number

    def note(self, swept: Sequence[str]) -> list[str]:
        """What is to be known where the sets differ; nothing where all points, and the original, were judged on one."""
        if len(self.sizes) < 2:
            return []
        listed = "; ".join(f"{number}: {size}" for number, size in self.sizes.items())
        choosing = ", ".join(name for name in swept if name.startswith("harvest.")) or "the settings"
        return [
            f"Not all lines were judged on the same validation pairs, because {choosing} decides which there are: {len(self.sizes)} sets "
            f"({listed}). Figures of different sets differ by their images too; the Pareto front is that of each set alone."
        ]


def render(result: dict[str, Any]) -> str:
    """The rows as Markdown, best sum of forgetting and retention first."""
    rows = [{**row, "pareto": "yes" if row["pareto"] else ""} for row in result["rows"]]
    for row in rows:  # settings as they were given: "0.0003", not two digits
        row.update(
            {axis["setting"]: f"{row[axis['setting']]:g}" for axis in result["axes"] if isinstance(row[axis["setting"]], float)}
        )
    rows.append({"pareto": "original", **result["original"]})
    lines = [f"# Sweep: {markdown.text(result['concepts'])}", "", "On the validation split, in percent; best sum first.", ""]
    for note in result["notes"]:
        lines += [markdown.sentence(note), ""]
    return "\n".join([*lines, *markdown_table(list(rows[0]), rows), "", "![Pareto plot](sweep.svg)"]) + "\n"


def plot(rows: Sequence[dict[str, Any]], original: dict[str, Any], stem: Path) -> Path:
    """Every point, the Pareto front joined."""
    quiet.figures()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axis = figure.subplots()
    front = sorted((row for row in rows if row["pareto"]), key=lambda row: row["forgetting"])
    others = [row for row in rows if not row["pareto"]]
    styles: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (others, {"marker": "o", "linestyle": "", "color": COLOURS[1], "label": "tried"}),
        (front, {"marker": "s", "linestyle": "" if SET in original else "-", "color": COLOURS[2], "label": "Pareto front"}),
        ([original], {"marker": "^", "linestyle": "", "color": COLOURS[0], "label": "original"}),
    ]
    for group, style in styles:
        axis.plot([row["forgetting"] for row in group], [row["retention"] for row in group], markersize=5, **style)
    axis.set(xlabel="forgetting, %", ylabel="retention, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return save_figure(figure, stem)
