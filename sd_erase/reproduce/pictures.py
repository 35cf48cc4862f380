"""The figures that are pictures: image grids (1, 4, 7), heat maps (5) and t-SNE (6)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import quiet, resources
from sd_erase.clip import caption_of
from sd_erase.config import load
from sd_erase.errors import UserError
from sd_erase.metrics import tasks
from sd_erase.metrics.relevance import relevance
from sd_erase.reproduce import Experiment, Recipe
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.tables import _rows as encoders
from sd_erase.reproduce.tables import save_figure, spread
from sd_erase.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sd_erase.clip import Towers
    from sd_erase.pairs import Pair

WIDTH = 7.2  # inches, a page's text
SHOWN = 256  # pixels at most of an image inside a figure
TEXT, SMALL = 8, 6.5  # points
LABELS, GAP = 0.85, 0.15  # inches: beside the rows, and between blocks side by side
# Paul Tol's "muted" colours, which colour-blind readers can tell apart; black is kept for the class that is forgotten
MUTED = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
FORGOTTEN = "#000000"


def open_image(path: str | Path) -> Image.Image:
    """The RGB image at `path`, made smaller where it has more pixels than a figure shows."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((SHOWN, SHOWN))
    return image


def square(image: Image.Image) -> Image.Image:
    """The middle of an image, as CLIP's own preparation cuts it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _bare(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


# image grids


def grids(recipe: Recipe, bench: Bench) -> Experiment:
    """Figures 1, 4 and 7: what the original and the erased encoders draw, the same noise in every column.

    ``sizes.prompts`` maps each erasure to its prompts, ``sizes.across`` is how many erasures stand side by side. One image a prompt,
    of the first seed: nobody chose them.
    """
    from sd_erase.reproduce.generator import Generator

    generator = Generator(bench)
    side = next(iter(recipe.concepts))
    stem = bench.experiment_folder / bench.experiment_folder.name
    blocks: list[tuple[str, Sequence[str], dict[str, Sequence[Path]]]] = []
    for concepts, prompts in recipe.sizes["prompts"].items():
        rows: dict[str, Sequence[Path]] = {}
        for name, own in encoders(recipe):
            run = None if own is None else bench.run(own, concepts, recipe.seeds[0], side)
            rows[name] = generator.draw(run, prompts, 1, stem.name)
        blocks.append((f"erased: {concepts}", prompts, rows))
    figure = plot_grid(blocks, int(recipe.sizes.get("across", 1)), stem)
    return Experiment([], [], [figure], ["One image a prompt, of the first seed; a column shares its noise."])


def plot_grid(blocks: Sequence[tuple[str, Sequence[str], dict[str, Sequence[Path]]]], across: int, stem: Path) -> Path:
    """Blocks of images, `across` of them side by side, as SVG and PNG; returns the SVG.

    Args:
        blocks: of each a title, the prompts of its columns, and the images of its rows by name; all of one shape.
    """
    quiet.figures()
    from matplotlib.figure import Figure

    columns, rows = len(blocks[0][1]), list(blocks[0][2])
    down = -(-len(blocks) // across)
    cell = (WIDTH - LABELS - GAP * (across - 1)) / (columns * across)
    letters = max(10, int(cell * 72 / (SMALL * 0.57)))  # that fit over a column
    wrapped = [[textwrap.fill(prompt, letters) for prompt in prompts] for _, prompts, _ in blocks]
    head = 0.34 + max(text.count("\n") + 1 for texts in wrapped for text in texts) * SMALL * 1.25 / 72
    height = down * (head + len(rows) * cell)
    figure = Figure(figsize=(WIDTH, height))
    for number, (title, prompts, images) in enumerate(blocks):
        left = LABELS + (number % across) * (columns * cell + GAP)
        top = height - (number // across) * (head + len(rows) * cell)
        middle = (left + columns * cell / 2) / WIDTH
        figure.text(middle, (top - 0.12) / height, title, fontsize=TEXT, fontweight="bold", ha="center", va="top")
        for row, name in enumerate(rows):
            bottom = top - head - (row + 1) * cell + 0.04
            if number % across == 0:
                label = textwrap.fill(name.replace("+", "+ "), 11, break_long_words=False)
                figure.text((LABELS - 0.07) / WIDTH, (bottom + cell / 2) / height, label, fontsize=TEXT, ha="right", va="center")
            for column in range(len(prompts)):
                x, size = left + column * cell, cell - 0.04
                axis = figure.add_axes((x / WIDTH, bottom / height, size / WIDTH, size / height))
                axis.imshow(open_image(images[name][column]), interpolation="none")
                _bare(axis)
                if not row:
                    axis.set_title(wrapped[number][column], fontsize=SMALL, pad=3)
    return save_figure(figure, stem)


# heat maps


def heat_maps(recipe: Recipe, bench: Bench) -> Experiment:
    """Figure 5: where an image speaks for the concept's name before and after, and where for another object's in the same image.

    The table gives the share of the relevance that lies in the object's box, as a multiple of the box's share of the image: 1 is
    chance. Boxes are the base's detector's.
    """
    from sd_erase.detection import load_detector

    (side, (concepts, *_)), (method, own) = next(iter(recipe.concepts.items())), next(iter(recipe.methods.items()))
    run = bench.run({**recipe.settings, **own}, concepts, recipe.seeds[0], side)
    towers = bench.towers(run)
    labels = {label for concept in bench.concepts(concepts) for label in concept.labels}
    pairs = bench.pairs(run, concepts, side)
    bench.check_pairs(pairs, "test", concepts, side)
    paths = sorted({str(pair.image) for pair in pairs["forget", "test"]})
    paths = spread(paths, int(recipe.sizes.get("images", 100)))
    detector = load_detector(bench.base.detector, device=resources.device(bench.device))
    scenes = []
    for path in paths:
        picture = square(open_image(path))
        (seen,) = detector.detect([picture])
        best = {each.label: each for each in sorted(seen, key=lambda each: each.score)}
        named = [box for label, box in best.items() if label in labels]
        others = [box for label, box in best.items() if label not in labels | {"person"}]  # the pocket CLIP knows no "person"
        if named and others:
            scenes.append((picture, named[-1], others[-1]))
    pictures = [picture for picture, *_ in scenes]
    pixels = towers.image_processor(images=pictures, return_tensors="pt").pixel_values.to(towers.text.device)
    words = {"concept": [concepts] * len(scenes), "another object": [other.label for _, _, other in scenes]}
    boxes = {"concept": [box for _, box, _ in scenes], "another object": [box for *_, box in scenes]}
    original = bench.original()
    maps, rows = {}, []
    for asked, names in words.items():
        for when, each in (("before", original), ("after", towers)):
            values = _maps(each, pixels, [caption_of(name) for name in names])
            cells = [values.shape[-1] / picture.width for picture in pictures]
            lifts = [
                lift(value, *(edge * cell for edge in found.box))
                for value, found, cell in zip(values, boxes[asked], cells, strict=True)
            ]
            maps[asked, when] = values
            rows.append(
                {
                    "text names": asked, "CLIP": when, "relevance in its box / chance": sum(lifts) / len(lifts),
                    "images above chance %": 100 * sum(value > 1 for value in lifts) / len(lifts), "images": len(lifts),
                }
            )  # fmt: skip
    figure = plot_heat_maps(pictures, words, maps, int(recipe.sizes.get("shown", 6)), bench.experiment_folder / "figure5")
    notes = [f"Method {method}, {_towers_of(run)}, {concepts}; relevance of Chefer et al. 2021; texts are 'a photo of a NAME'."]
    return Experiment(list(rows[0]), rows, [figure], notes)


def _towers_of(run: RunDir) -> str:
    """Which towers a run trained, by its own settings."""
    return "both towers" if load(run.config).train.towers == "both" else "text tower"


def _maps(towers: Towers, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Relevance [images, rows, columns], each image's adding up to 1."""
    import torch

    texts = tasks.embed_texts(towers, captions)
    values = torch.cat(
        [relevance(towers.clip, some, text) for some, text in zip(pixels.split(16), texts.split(16), strict=True)]
    ).cpu()
    return values / values.sum((1, 2), keepdim=True).clamp(min=1e-12)


def lift(values: torch.Tensor, left: float, top: float, right: float, bottom: float) -> float:
    """The share of a map inside a box over the box's share of the map: 1 where the map does not know the box.

    Args:
        values: [rows, columns], 0 or more.
        left, top, right, bottom: the box in cells; a cell that it cuts counts in part.
    """
    import torch

    rows, columns = (torch.arange(length, dtype=torch.float32) for length in values.shape)
    inside = ((rows + 1).clamp(max=bottom) - rows.clamp(min=top)).clamp(min=0)[:, None] * (
        (columns + 1).clamp(max=right) - columns.clamp(min=left)
    ).clamp(min=0)[None]
    return float((values * inside).sum() / values.sum() / (inside.sum() / values.numel()))


def plot_heat_maps(
    pictures: Sequence[Any], words: dict[str, list[str]], maps: dict[tuple[str, str], Any], shown: int, stem: Path
) -> Path:
    """Images above their maps, one colour scale for a text's maps before and after, as SVG and PNG; returns the SVG.

    Args:
        pictures: square images.
        words: row group -> what the text names, for each image.
        maps: (row group, "before" or "after") -> relevance [images, rows, columns].
        shown: images, spread over all.
    """
    quiet.figures()
    from matplotlib.figure import Figure

    chosen = spread(range(len(pictures)), shown)
    rows = [(group, when) for group in words for when in ("before", "after")]
    label, cell, head = 0.95, (WIDTH - 1.5) / len(chosen), 0.2
    height = (len(rows) + 1) * cell + len(words) * head + 0.05
    figure = Figure(figsize=(WIDTH, height))

    def place(column: int, top: float) -> Any:
        bounds = (
            (label + column * cell) / WIDTH,
            (height - top - cell + 0.04) / height,
            (cell - 0.04) / WIDTH,
            (cell - 0.04) / height,
        )
        axis = figure.add_axes(bounds)
        _bare(axis)
        return axis

    def name(text: str, top: float) -> None:
        figure.text((label - 0.08) / WIDTH, (height - top - cell / 2) / height, text, fontsize=TEXT, ha="right", va="center")

    name("image", 0)
    for column, number in enumerate(chosen):
        place(column, 0).imshow(pictures[number], interpolation="none", extent=(0, 1, 0, 1))
    top: float = cell
    drawn: Any = None
    for group, when in rows:
        if when == "before":
            top += head
        name(when, top)
        for column, number in enumerate(chosen):
            axis = place(column, top)
            # in units of an even map, so that the scale means the same for every model and grid
            own = {key: value[number] * value[number].numel() for key, value in maps.items()}
            axis.imshow(pictures[number].convert("L"), cmap="gray", interpolation="none", extent=(0, 1, 0, 1))
            drawn = axis.imshow(
                own[group, when].numpy(), cmap="inferno", alpha=0.72, vmin=0, vmax=8, interpolation="bicubic", extent=(0, 1, 0, 1)
            )
            if when == "before":
                axis.set_title(f"“{words[group][number]}”", fontsize=TEXT, pad=3)
        top += cell
    bar = figure.add_axes(((label + len(chosen) * cell + 0.1) / WIDTH, 0.2, 0.1 / WIDTH, 0.4))
    figure.colorbar(drawn, cax=bar, extend="max").set_label("relevance, 1 = even", fontsize=SMALL)
    bar.tick_params(labelsize=SMALL)
    return save_figure(figure, stem)


# t-SNE


def _label(pair: Pair) -> str:
    """The class of a pair of a set of classes."""
    from sd_erase.captions import cifar100

    label = cifar100.label_of(pair.caption)
    if label is None:
        raise UserError(f"Caption {pair.caption!r} names no class: pass --dataset cifar100:PATH.")
    return label


def tsne(recipe: Recipe, bench: Bench) -> Experiment:
    """Figure 6: t-SNE (van der Maaten and Hinton 2008) of images and class prompts together, before and after.

    The table gives the mean cosine of a class's images and its own prompts, which t-SNE's distances only hint at.
    """
    (side, (concepts, *_)), (method, own) = next(iter(recipe.concepts.items())), next(iter(recipe.methods.items()))
    run = bench.run({**recipe.settings, **own}, concepts, recipe.seeds[0], side)
    towers = bench.towers(run)
    pairs = bench.pairs(run, concepts, side)
    bench.check_pairs(pairs, "test", concepts, side)
    by_class: dict[str, list[str]] = {}
    for name in ("forget", "retain"):
        for pair in pairs[name, "test"]:
            by_class.setdefault(_label(pair), []).append(str(pair.image))
    forgotten = {_label(pair) for pair in pairs["forget", "test"]}
    others = spread(
        [name for name in sorted(by_class) if name not in forgotten], int(recipe.sizes.get("classes", 10)) - len(forgotten)
    )
    classes = [*sorted(forgotten), *others]
    forms = tasks.templates(recipe.sizes.get("templates", "pocket" if bench.base.pocket else "cifar100"))
    paths = {name: spread(by_class[name], int(recipe.sizes.get("images", 50))) for name in classes}
    panels, rows = {}, []
    for when, each in (("before", bench.original()), ("after", towers)):
        points = {}
        for name in classes:
            images = tasks.embed_images(each, paths[name]).cpu()
            texts = tasks.embed_texts(each, [form.format(name) for form in forms]).cpu()
            points[name] = images, texts
        panels[when] = project(points, recipe.seeds[0])
        cosine = {name: float((images @ texts.T).mean()) for name, (images, texts) in points.items()}
        kept = [cosine[name] for name in others]
        rows.append(
            {
                "CLIP": when, **{f"cosine, {name}": cosine[name] for name in sorted(forgotten)},
                "cosine, retain": sum(kept) / len(kept), "lowest retain": min(kept), "highest retain": max(kept),
            }
        )  # fmt: skip
    figure = plot_tsne(panels, forgotten, bench.experiment_folder / "figure6")
    notes = [
        f"Method {method}, {_towers_of(run)}, {concepts}; {sum(map(len, paths.values()))} test images and {len(forms)} prompts a class. Each "
        "panel is a projection of its own: neighbourhoods can be compared, positions cannot."
    ]
    return Experiment(list(rows[0]), rows, [figure], notes)


def project(points: dict[str, tuple[torch.Tensor, torch.Tensor]], seed: int) -> dict[str, tuple[Any, Any]]:
    """Both modalities of all classes in one plane.

    Args:
        points: class -> embeddings of images and of texts, each [items, dimensions].

    Returns:
        Class -> the same as [items, 2].
    """
    import torch
    from sklearn.manifold import TSNE

    every = torch.cat([part for two in points.values() for part in two]).numpy()
    perplexity = min(30, (len(every) - 1) / 3)
    plane = torch.from_numpy(TSNE(metric="cosine", perplexity=perplexity, init="pca", random_state=seed).fit_transform(every))
    parts = iter(plane.split([len(part) for two in points.values() for part in two]))
    return {name: (next(parts).numpy(), next(parts).numpy()) for name in points}


def plot_tsne(panels: dict[str, dict[str, tuple[Any, Any]]], forgotten: set[str], stem: Path) -> Path:
    """One panel a model: images as dots, texts as triangles, a colour a class, as SVG and PNG; returns the SVG."""
    quiet.figures()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    for axis, (title, classes) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        colours = iter(MUTED * (1 + len(classes) // len(MUTED)))
        for name, (images, texts) in classes.items():
            gone = name in forgotten
            colour = FORGOTTEN if gone else next(colours)
            order = 3 if gone else 2
            axis.scatter(
                *images.T, s=9, color=colour, linewidths=0, alpha=0.75, zorder=order, label=f"{name} (erased)" if gone else name
            )
            axis.scatter(*texts.T, s=42, color=colour, marker="^", edgecolors="white", linewidths=0.6, zorder=order + 2)
            if gone:
                for what, points, offset, edge in (("images", images, -8, min), ("text", texts, 8, max)):
                    place = (points[:, 0].mean(), edge(points[:, 1]))
                    options = {"textcoords": "offset points", "fontsize": TEXT, "ha": "center", "va": "center", "zorder": 9}
                    axis.annotate(f"{name}: {what}", place, (0, offset), **options)
        axis.set_title(title, fontsize=TEXT + 1)
        axis.set(xticks=[], yticks=[])
        axis.margins(0.1)
    handles, names = axis.get_legend_handles_labels()
    handles += [axis.scatter([], [], s=9, color="#666666"), axis.scatter([], [], s=42, color="#666666", marker="^")]
    legend = figure.legend(handles, [*names, "image", "text"], loc="outside lower center", ncols=6, fontsize=TEXT, frameon=False)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    return save_figure(figure, stem)
