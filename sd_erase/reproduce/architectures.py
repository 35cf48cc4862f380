"""Tables 5 and 8: the same experiment on BLIP, and on CLIPs of other patch sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sd_erase.bases import POCKET_FOLDER
from sd_erase.errors import UserError
from sd_erase.reproduce import Experiment, Recipe
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.tables import ZERO_SHOT, _mean, _rows, zero_shot_of

PATCHES = {"B/32": 16, "B/16": 8, "L/14": 4}  # the paper's CLIPs -> pixels of a patch of the pocket's 64, where 224 are theirs


def patches(recipe: Recipe, bench: Bench) -> Experiment:
    """Table 8: zero-shot prediction and retrieval before and after, for CLIPs that differ in the size of their patches.

    On the pocket base its patch variants are trained where they are missing (`pocket.variants`). On others ``sizes.models`` maps
    names to folders of CLIPModels.
    """
    models = dict(recipe.sizes.get("models", {}))
    notes = ["Top-1 of all class names on the test images."]
    if not models and bench.base.source == str(POCKET_FOLDER):
        from sd_erase.pocket import variants

        steps = int(recipe.sizes.get("training_steps", variants.PATCH_STEPS))
        models = {name: variants.patch_clip(patch, _models(bench), steps) for name, patch in PATCHES.items()}
        notes.append("The pocket's variants share its text tower.")
    if not models:
        raise UserError("Table 8 needs a CLIP for each patch size: pass --set 'sizes.models={B/32: FOLDER, L/14: FOLDER}'.")
    rows = []
    for name, source in models.items():
        rows += [{"CLIP": name, **row} for row in _zero_shot(recipe, bench, str(source))]
    return Experiment(["CLIP", "class", "method", *ZERO_SHOT], rows, notes=notes)


def blip(recipe: Recipe, bench: Bench) -> Experiment:
    """Table 5: the methods on BLIP's image-text model, by its contrastive embeddings.

    On the pocket base a small BLIP is trained where it is missing (`pocket.variants`); else ``sizes.model`` names a folder of a
    BlipForImageTextRetrieval.
    """
    source = recipe.sizes.get("model")
    if source is None and bench.base.source == str(POCKET_FOLDER):
        from sd_erase.pocket import variants

        source = variants.blip(_models(bench), int(recipe.sizes.get("training_steps", variants.BLIP_STEPS)))
    if source is None:
        raise UserError("Table 5 needs a BLIP: pass --set sizes.model=FOLDER of a BlipForImageTextRetrieval.")
    rows = _zero_shot(recipe, bench, str(source))
    for row in rows:
        row["method"] = "BLIP" if row["method"] == "CLIP" else f"BLIP + {row['method']}"
    notes = ["Images and texts are compared by BLIP's contrastive embeddings (ITC), without its matching head."]
    return Experiment(["class", "method", *ZERO_SHOT], rows, notes=notes)


def _models(bench: Bench) -> Path:
    return bench.folder / "bench" / "models"


def _zero_shot(recipe: Recipe, bench: Bench, source: str) -> list[dict[str, object]]:
    """A row for each class and method of `zero_shot_of` on the model at `source`, with this bench's data; seeds are averaged."""
    side = next(iter(recipe.concepts))
    own = Bench(
        bench.folder / "bench" / "models" / "runs" / Path(source).name, source, (), bench.device, bench.progress, bench.exact
    )
    own.used = bench.used
    own.specs[side] = bench.dataset(side)
    recipe = dataclasses.replace(recipe, sizes={"templates": "pocket" if bench.base.pocket else "cifar100", **recipe.sizes})
    rows = []
    for concepts in recipe.concepts[side]:
        for method, settings in _rows(recipe):
            rows.append(
                {
                    "class": concepts,
                    "method": method,
                    **_mean([zero_shot_of(own, settings, concepts, seed, side, recipe) for seed in recipe.seeds]),
                }
            )
    return rows
