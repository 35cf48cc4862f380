"""The tables: each experiment trains or finds its runs and measures CLIP's own tasks on the test split."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import quiet
from sd_erase.captions import cifar100
from sd_erase.metrics import tasks
from sd_erase.reproduce import Experiment, Recipe
from sd_erase.reproduce.bench import Bench
from sd_erase.rundir import RunDir, fingerprint, read_jsonl, replacing

if TYPE_CHECKING:
    from sd_erase.clip import Towers
    from sd_erase.pairs import Pair

ORIGINAL = "CLIP"
ZERO_SHOT = ("prediction, forget %", "prediction, retain %", "retrieval, forget %", "retrieval, retain %")
SPARED = ("prediction, spared senses %", "retrieval, spared senses %")  # uses of the concept's words that are to stay
SETS = {
    "forget": (ZERO_SHOT[0], ZERO_SHOT[2]),
    "retain": (ZERO_SHOT[1], ZERO_SHOT[3]),
    "spared": SPARED,
}
RECALLS = (1, 5, 10)
POOL = 16  # the paper's batch
MOST = 1000  # images of a test set


def zero_shot_of(
    bench: Bench, settings: dict[str, Any] | None, concepts: str, seed: int, side: str, recipe: Recipe, split: str = "test"
) -> dict[str, float]:
    """Zero-shot prediction and retrieval in percent, of the run with these settings; None is the original.

    With "classes" both are over all class names (see `metrics.tasks`); with "captions" over pools of pairs of the same set.

    Raises:
        UserError: the data leave no image of the forget or the retain set to measure on.
    """  # fmt: skip
    run, source = _run_and_pairs(bench, settings, concepts, seed, side, recipe)
    most = int(recipe.sizes.get("test", MOST))
    asked = recipe.sizes.get("templates", "pocket" if bench.base.pocket else "cifar100")
    inputs = [side, concepts, split, most, asked if side == "classes" else POOL, bench.stamp(side), fingerprint(source.pairs)]

    def measure(towers: Towers) -> dict[str, float]:
        found = bench.pairs(source, concepts, side)
        bench.check_pairs(found, split, concepts, side)
        sets = {name: found[name, split] for name in ("forget", "retain")}
        if side == "captions":
            sets = {name: _one_an_image(pairs) for name, pairs in sets.items()}
            words = bench.concepts(concepts)
            sets["spared"] = [pair for pair in sets["retain"] if any(concept.scan(pair.caption)[1] for concept in words)]
        result = {}
        for name, pairs in sets.items():
            if not pairs:
                continue
            pairs = spread(pairs, most)
            hits = _class_hits(towers, pairs, bench.classes(), asked) if side == "classes" else _pool_hits(towers, pairs)
            for column, values in zip(SETS[name], hits, strict=True):
                result[column] = 100 * float(values.mean())
        return result

    return bench.measured(run, f"zero-shot-{split}", inputs, measure)


def _run_and_pairs(
    bench: Bench, settings: dict[str, Any] | None, concepts: str, seed: int, side: str, recipe: Recipe
) -> tuple[RunDir | None, RunDir]:
    """The run with these settings, and whose pairs it is measured on: its own; the original (None) on those that the methods share."""
    if settings is None:
        return None, bench.harvested(concepts, side, seed, recipe.settings)
    run = bench.run(settings, concepts, seed, side)
    return run, run


def _one_an_image(pairs: Sequence[Pair]) -> list[Pair]:
    """The first caption of each image that names what is erased, or else its first."""
    return list({pair.image: pair for pair in sorted(pairs[::-1], key=lambda pair: bool(pair.spans))}.values())


def _class_hits(towers: Towers, pairs: Sequence[Pair], classes: Sequence[str], asked: str) -> tuple[Any, Any]:
    import torch

    forms = tasks.templates(asked)
    device = towers.text.device
    texts = tasks.embed_texts(towers, [form.format(name) for name in classes for form in forms])
    images = tasks.embed_images(towers, [str(pair.image) for pair in pairs])
    labels = torch.tensor([classes.index(cifar100.label_of(pair.caption)) for pair in pairs], device=device)
    text_labels = torch.arange(len(classes), device=device).repeat_interleave(len(forms))
    return (
        tasks.zero_shot_prediction(images, tasks.class_embeddings(texts, len(forms)), labels),
        tasks.zero_shot_text_retrieval(images, texts, text_labels, labels),
    )


def _pool_hits(towers: Towers, pairs: Sequence[Pair]) -> tuple[Any, Any]:
    import torch

    images = tasks.embed_images(towers, [str(pair.image) for pair in pairs])
    texts = tasks.embed_texts(towers, [pair.caption for pair in pairs])
    same = tasks.numbered([pair.caption.lower().rstrip(".") for pair in pairs]).to(images.device)

    def hits(queries: torch.Tensor, pool: torch.Tensor) -> Any:
        return tasks.pool_retrieval(queries, pool, same, POOL, torch.Generator().manual_seed(0))

    return hits(images, texts), hits(texts, images)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, evenly spread over them."""
    return list(items) if len(items) <= most else [items[number * len(items) // most] for number in range(most)]


def _rows(recipe: Recipe) -> list[tuple[str, dict[str, Any] | None]]:
    """The original, then each method with the settings that all share."""
    return [(ORIGINAL, None), *((name, {**recipe.settings, **own}) for name, own in recipe.methods.items())]


def _mean(cells: Sequence[dict[str, float]]) -> dict[str, float]:
    common = [key for key in cells[0] if all(key in cell for cell in cells)]
    return {key: statistics.fmean(cell[key] for cell in cells) for key in common}


def zero_shot(recipe: Recipe, bench: Bench) -> Experiment:
    """Tables 2, 4, 9, 10, 11: zero-shot prediction and retrieval of every method, mean over erasures and seeds."""
    rows = []
    for side, erasures in recipe.concepts.items():
        for method, settings in _rows(recipe):
            cells = [zero_shot_of(bench, settings, each, seed, side, recipe) for each in erasures for seed in recipe.seeds]
            rows.append({"data": side, "method": method, **_mean(cells)})
    return Experiment(["data", "method", *ZERO_SHOT, *SPARED], rows, notes=_notes(recipe))


def variance(recipe: Recipe, bench: Bench) -> Experiment:
    """Table 7: one method over several classes, each the mean of its seeds; then the mean and variance over the classes."""
    (side, erasures), (method, own) = next(iter(recipe.concepts.items())), next(iter(recipe.methods.items()))
    by_class, rows = [], []
    for concepts in erasures:
        cells = [zero_shot_of(bench, {**recipe.settings, **own}, concepts, seed, side, recipe) for seed in recipe.seeds]
        by_class.append(_mean(cells))
        spreads = {
            f"{key[:-2]}, seeds": f"{min(cell[key] for cell in cells):.1f}–{max(cell[key] for cell in cells):.1f}"
            for key in ZERO_SHOT
        }
        rows.append({"class": concepts, **by_class[-1], **spreads})  # fmt: skip
    for name, function in (
        ("mean", statistics.fmean),
        ("variance", statistics.pvariance if len(by_class) < 2 else statistics.variance),
    ):
        rows.append({"class": name, **{key: function([each[key] for each in by_class]) for key in ZERO_SHOT}})  # fmt: skip
    columns = ["class", *ZERO_SHOT, *(f"{key[:-2]}, seeds" for key in ZERO_SHOT)]
    notes = [f"Method {method}; the columns 'seeds' give the lowest and highest of {len(recipe.seeds)} training seeds."]
    return Experiment(columns, rows, notes=notes + _notes(recipe))


def retrieval(recipe: Recipe, bench: Bench) -> Experiment:
    """Table 3: recall of image and text retrieval at 1, 5 and 10, Karpathy's protocol (see `metrics.tasks.recall_at`)."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    side, erasures = next(iter(recipe.concepts.items()))
    for method, settings in _rows(recipe):
        for concepts in erasures:
            for seed in recipe.seeds:
                result = recall_of(bench, settings, concepts, seed, side, recipe)
                for task, values in result.items():
                    found.setdefault((task, method), []).append(values)
    order = sorted(found, key=lambda key: key[0])
    rows = [{"task": task, "method": method, **_mean(found[task, method])} for task, method in order]
    columns = [f"R@{k}, {name} %" for k in RECALLS for name in ("forget", "retain")]
    notes = [
        _erased(recipe),
        "Karpathy's protocol: the gallery is all test images, or all five captions of each; an image belongs to the forget set where any "
        "of its captions names what is erased, and all its captions with it.",
    ]
    return Experiment(["task", "method", *columns], rows, notes=notes)


def recall_of(
    bench: Bench, settings: dict[str, Any] | None, concepts: str, seed: int, side: str, recipe: Recipe
) -> dict[str, dict[str, float]]:
    """Recall in percent by task, of the run with these settings; None is the original."""
    run, source = _run_and_pairs(bench, settings, concepts, seed, side, recipe)
    most = int(recipe.sizes.get("test", MOST))

    def measure(towers: Towers) -> dict[str, dict[str, float]]:
        found = bench.pairs(source, concepts, side)
        bench.check_pairs(found, "test", concepts, side)
        by_image: dict[str, list[Pair]] = {}
        for name in ("forget", "retain"):
            for pair in found[name, "test"]:
                by_image.setdefault(str(pair.image), []).append(pair)
        # the forget set is small: all of it, then as many others as there is room for
        chosen = sorted(by_image, key=lambda image: by_image[image][0].set != "forget")[:most]
        pairs = [pair for image in sorted(chosen) for pair in by_image[image]]
        pictures = sorted(chosen)
        images, texts = tasks.embed_images(towers, pictures), tasks.embed_texts(towers, [pair.caption for pair in pairs])
        numbers = tasks.numbered([*pictures, *(str(pair.image) for pair in pairs)]).to(images.device)
        image_keys, text_keys = numbers[: len(pictures)], numbers[len(pictures) :]
        ranks = {
            "image retrieval": (tasks.first_ranks(texts, images, text_keys, image_keys), [pair.set for pair in pairs]),
            "text retrieval": (
                tasks.first_ranks(images, texts, image_keys, text_keys), [by_image[image][0].set for image in pictures]
            ),
        }  # fmt: skip
        return {
            task: {
                f"R@{k}, {name} %": 100 * float(tasks.recall_at(places, k)[[one == name for one in sets]].mean())
                for k in RECALLS
                for name in ("forget", "retain")
            }
            for task, (places, sets) in ranks.items()
        }

    return bench.measured(run, "recall", [side, concepts, most, bench.stamp(side), fingerprint(source.pairs)], measure)


def proportion(recipe: Recipe, bench: Bench) -> Experiment:
    """Figure 3: zero-shot prediction as a growing share of the classes is forgotten at once."""
    side, erasures = next(iter(recipe.concepts.items()))
    total, rows = len(bench.classes()), []
    for method, settings in _rows(recipe):
        for count, concepts in enumerate([erasures[0], *erasures]):
            forgotten = len(concepts.split(" + ")) if count else 0
            # nothing is forgotten at 0 %: every method is the original there, on the first erasure's classes
            own = settings if count else None
            cells = [zero_shot_of(bench, own, concepts, seed, side, recipe) for seed in recipe.seeds]
            rows.append({"method": method, "classes": forgotten, "share %": 100 * forgotten / total, **_mean(cells)})
    figure = plot_lines(rows, bench.experiment_folder / "figure3")
    return Experiment(["method", "classes", "share %", *ZERO_SHOT], rows, [figure], _notes(recipe))


# Okabe and Ito's colours, which colour-blind readers can tell apart; markers tell them apart in print
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "osD^vPX*"


def plot_lines(rows: Sequence[dict[str, Any]], stem: Path) -> Path:
    """Forget (left) and retain accuracy (right) over the share of forgotten classes, as SVG and PNG; returns the SVG."""
    quiet.figures()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "label": method}
        for axis, column in ((left, ZERO_SHOT[0]), (right, ZERO_SHOT[1])):
            axis.plot([row["share %"] for row in own], [row[column] for row in own], markersize=4, linewidth=1.3, **style)
    for axis, title in ((left, "forget classes"), (right, "retain classes")):
        axis.set(xlabel="forgotten classes, % of all", title=title, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    left.set_ylabel("zero-shot accuracy, %")
    right.legend(fontsize=7)
    return save_figure(figure, stem)


def save_figure(figure: Any, stem: Path) -> Path:
    """`figure` as STEM.svg (text stays text) and STEM.png; returns the SVG."""
    quiet.figures()
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": "sd-erase"}
    with replacing(stem.with_suffix(".svg")) as temporary, matplotlib.rc_context(style):
        figure.savefig(temporary, metadata={"Date": None})
    with replacing(stem.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=200)
    return stem.with_suffix(".svg")


def cost(recipe: Recipe, bench: Bench) -> Experiment:
    """Appendix A.6: what each method's training costs; every training has a process of its own, or memory would add up."""
    rows, lengths = [], []
    for side, erasures in recipe.concepts.items():
        for method, settings in _rows(recipe)[1:]:
            own = settings or {}
            steps = int(recipe.sizes.get("steps", own.get("train.steps", 20)))
            run = bench.run_alone({**own, "train.steps": steps}, erasures[0], recipe.seeds[0], side)
            manifest, counts = run.require("train", "train"), run.require("harvest", "harvest")["counts"]
            pairs, rate = counts["forget"]["train"] + counts["retain"]["train"], manifest["samples_per_second"]
            validated = {row["step"] for row in read_jsonl(run.metrics, finite=False) if row["split"] == "validation"}
            lengths.append(f"{steps} steps with {len(validated)} validations")
            rows.append(
                {
                    "data": side,
                    "method": method,
                    "pairs an epoch": pairs,
                    "pairs a s": rate or None,
                    "s an epoch": pairs / rate if rate else None,
                    "peak memory, MB": manifest["peak_memory_mb"],
                    "trained numbers": manifest["trained_numbers"],
                    "device": manifest["device"],
                }
            )
    notes = [
        "An epoch shows every training pair once, forget and retain together, an image with its caption each. The rate is that of "
        f"{' or '.join(dict.fromkeys(lengths))}; the memory is the whole process's on a CPU."
    ]
    return Experiment(list(rows[0]), rows, notes=notes)


def _erased(recipe: Recipe) -> str:
    listed = "; ".join(f"{side}: {', '.join(erasures)}" for side, erasures in recipe.concepts.items())
    return f"Erased: {listed}. Training seeds: {', '.join(map(str, recipe.seeds))}."


def _notes(recipe: Recipe) -> list[str]:
    """How zero-shot prediction and retrieval were measured."""
    notes = [_erased(recipe)]
    if "classes" in recipe.concepts:
        notes.append(
            "Classes: prediction takes the nearest of all class embeddings, each the normalised mean over prompt templates; retrieval "
            "the nearest of all single class prompts. Both top-1, on test images that no training saw."
        )
    if "captions" in recipe.concepts:
        notes.append(
            f"Captions have no classes: prediction finds an image's caption, retrieval a caption's image, in pools of {POOL} test pairs "
            f"of the same set (chance: {100 / POOL:.2f} %)."
        )
    return notes
