"""The paper's tables and figures as commands: a recipe and an experiment into one table beside the printed one.

Reads ``recipes/reproduce/ID.yaml`` (see `Recipe`). Writes ``FOLDER/ID/ID.md`` (ours and the paper's rows), ``ID.json`` and the
figures (SVG and PNG). Runs and data are shared by all experiments and lie in ``FOLDER/bench`` (see `bench.Bench`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import catalog, markdown, resources, yamlfile
from sd_erase.config import check_methods, check_seeds
from sd_erase.errors import UserError, unknown_choice
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.differences import differences
from sd_erase.rundir import write_text_atomic

PAPER = "CLIPErase: Efficient Unlearning of Visual-Textual Associations in CLIP"


OTHER_FLAGS = {
    "base": "--base", "concepts": "--concept", "concept_file": "--concept", "harvest.dataset": "--dataset",
    "train.objective": "--method, which adds a row of its own name", "seed": "a recipe of your own with seeds",
    "train.clip": "--base", "device": "--device", "kind": "a concept card of your own with --concept",
    "exact": "--exact", "anchor": "a concept card of your own with --concept",
}  # fmt: skip
SIZES = ("across", "classes", "images", "model", "models", "prompts", "shown", "steps", "templates", "test", "training_steps")


@dataclass(frozen=True)
class Recipe:
    """One table or figure.

    Attributes:
        title: what it shows.
        concepts: the kind of data -> its erasures, each a concept or several joined by " + ". The kinds are "classes" (single objects
            and class names, as CIFAR-100) and "captions" (scenes with five captions, as Flickr30K).
        methods: name of a row -> settings that differ from the defaults, by dotted name.
        seeds: of training.
        settings: what all rows share, by dotted name.
        sizes: numbers that the experiment reads, such as how many items a test set has at most.
        paper: the rows that the paper prints, under our columns' names.
        notes: how the settings were chosen, on the pocket's base and data.
    """

    title: str
    concepts: dict[str, list[str]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    paper: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Experiment:
    """What an experiment found.

    Attributes:
        columns: keys of the rows, in the order in which they are shown.
        rows: one mapping a line; numbers are shown with two digits, a missing key as a dash.
        figures: files inside the experiment's folder, each as SVG and PNG (the SVG is named).
        notes: how it was measured.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    figures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_recipe(
    name: str, changes: dict[str, Any] | None = None, objectives: Sequence[str] = (), concepts: Sequence[str] = ()
) -> Recipe:
    """The recipe of a table or figure.

    Args:
        name: a row of `catalog.EXPERIMENTS`, or the path of a YAML file.
        changes: settings by dotted name (``train.steps``) that every method gets, and sizes (``sizes.test``).
        objectives: further methods by their objective, with the settings that all share.
        concepts: erasures in place of the recipe's, for data that do not name those.

    Raises:
        UserError: no such file, not YAML, or an unknown key or setting.
    """
    path = resources.find("recipes", f"reproduce/{name}" if name in catalog.EXPERIMENTS else name)
    values = yamlfile.read(path, "Recipe")
    known = {item.name: item for item in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or "title" not in values or values.keys() - known.keys():
        raise UserError(
            f"Recipe {path} must be a mapping with a title, and at most {', '.join(sorted(known))}: write `title: ...` as the bundled recipes do."
        )
    for key, kind in {
        "seeds": list,
        "paper": list,
        "notes": list,
        "concepts": dict,
        "methods": dict,
        "settings": dict,
    }.items():
        if not isinstance(values.get(key, kind()), kind):
            what = "list" if kind is list else "mapping"
            raise UserError(f"Recipe {path}: {key} must be a {what}, not {values[key]!r}: write one as the bundled recipes do.")
        if kind is list and key in values:
            values[key] = tuple(values[key])
    values["methods"] = {name: settings or {} for name, settings in (values.get("methods") or {}).items()}
    values["methods"] |= {objective: {"train.objective": objective} for objective in objectives}
    if concepts:
        values["concepts"] = {kind: list(concepts) for kind in values.get("concepts", {})}
    for dotted, value in (changes or {}).items():
        check_read(dotted)
        target, key = ("sizes", dotted[6:]) if dotted.startswith("sizes.") else ("settings", dotted)
        values.setdefault(target, {})[key] = value
        if target == "settings":  # what the user asks for goes before what a method's row says
            for settings in values["methods"].values():
                settings.pop(key, None)
                if key.startswith("train.weights.") and "train.weights" in settings:
                    settings["train.weights"].pop(key.removeprefix("train.weights."), None)
    if changes or objectives or concepts:  # a recipe's notes tell how its own settings were chosen
        values["notes"] = ()
    recipe = Recipe(**values)
    check_seeds(path, recipe.seeds)
    check_methods(path, recipe.settings, recipe.methods)
    return recipe


def check_read(dotted: str, given: str = "--set") -> None:
    """Refuse a setting that no experiment reads, or that another flag decides: it would be ignored.

    Raises:
        UserError: which it is, and what to pass instead.
    """
    if (flag := OTHER_FLAGS.get(dotted)) is not None:
        raise UserError(f"{given} {dotted} is not how that is set here: pass {flag}.")
    section, _, name = dotted.partition(".")
    if section in ("generate", "evaluate", "attack", "export"):
        raise UserError(
            f"{given} {dotted} has no effect: no experiment reads the settings of {section}; pass train.*, harvest.* or sizes.*."
        )
    if section == "sizes" and name.partition(".")[0] not in SIZES:
        raise unknown_choice("Size of an experiment", name, SIZES)


def names(asked: Sequence[str]) -> list[str]:
    """The experiments that `asked` names; "all" stands for every one."""
    return list(catalog.EXPERIMENTS) if "all" in asked else list(dict.fromkeys(asked))


def reproduce(
    name: str,
    bench: Bench,
    changes: dict[str, Any] | None = None,
    objectives: Sequence[str] = (),
    concepts: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one experiment and write its table.

    Args:
        name: a row of `catalog.EXPERIMENTS`.
        bench: where it runs; what earlier experiments trained and measured is used again.
        changes, objectives, concepts: see `read_recipe`.

    Returns:
        What ``ID.json`` holds.

    Raises:
        UserError: no such experiment, a wrong recipe, or data that do not fit.
    """
    from sd_erase.reproduce import kept
    from sd_erase.reproduce.asked import DETECTS, DRAWS

    experiment = catalog.resolve(catalog.EXPERIMENTS, name, "Experiment")
    recipe = read_recipe(name, changes, objectives, concepts)
    started = time.perf_counter()
    bench.experiment_folder = bench.folder / name
    path = bench.experiment_folder / f"{name}.json"

    def key() -> str:
        return kept.key_of(bench, dataclasses.asdict(recipe), recipe.concepts, draws=name in DRAWS, detects=name in DETECTS)

    if path.is_file() and (known := kept.known(path, key(), bench)) is not None:
        bench.finished.append(name)
        return known
    bench.used.clear()
    found: Experiment = experiment(recipe, bench)
    result = {
        "id": name,
        "title": recipe.title,
        "base": bench.base.name,
        "data": bench.specs,
        "columns": found.columns,
        "rows": found.rows,
        "paper": list(recipe.paper),
        "figures": [str(figure.relative_to(bench.experiment_folder)) for figure in found.figures],
        "notes": [*found.notes, *_settings(recipe), *(recipe.notes if bench.is_pocket() else ())],
        "differs": differences(found.rows, recipe.paper),
        "seconds": round(time.perf_counter() - started, 1),
        "recipe": dataclasses.asdict(recipe),
    }
    page = bench.experiment_folder / f"{name}.md"
    write_text_atomic(page, render(result))
    pictures = [file for figure in found.figures for file in (figure, figure.with_suffix(".png"))]
    return kept.write(path, key(), result, [page, *pictures], bench)


def _settings(recipe: Recipe) -> list[str]:
    """What the methods were run with, in one line."""

    def listed(settings: dict[str, Any]) -> str:
        return ", ".join(f"{name.removeprefix('train.')} {value}" for name, value in settings.items())

    own = [f"{name}: {listed(settings)}" for name, settings in recipe.methods.items() if settings]
    return [f"Settings of all methods: {listed(recipe.settings) or 'the defaults'}. {'; '.join(own)}."] if recipe.methods else []


def render(result: dict[str, Any]) -> str:
    """An experiment as Markdown: ours, then the paper's rows, the figures and the notes."""
    lines = [
        f"# {markdown.text(result['title'])}",
        "",
        f"Measured on base {markdown.text(result['base'])} (`sd-erase reproduce {result['id']}`).",
    ]
    if result["rows"]:
        lines += ["", *markdown_table(result["columns"], result["rows"])]
    if result["paper"]:
        lines += ["", "As the paper prints it:", "", *markdown_table(result["columns"], result["paper"])]
    for figure in result["figures"]:
        lines += ["", f"![{markdown.text(result['title'])}]({figure})"]
    for title, entries in (("How it was measured", result["notes"]), ("Where it differs from the paper", result["differs"])):
        if entries:
            lines += ["", f"{title}:", "", *(f"- {markdown.sentence(entry)}" for entry in entries)]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; columns that no row fills are left out."""
    shown = [column for column in columns if any(row.get(column) is not None for row in rows)]
    return markdown.table(shown, ([_cell(row.get(column)) for column in shown] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
