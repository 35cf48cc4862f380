"""A finished pack, loaded as anybody's model and judged by its own detector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sd_erase.pocket.judges import _write_detector_data, detector_config
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS, World

GUIDANCE, STEPS, SCORED_SEED = 4.0, 15, 9_000_000


def load_pack(target: Path, world: World = WORLDS["pocket"]) -> Any:
    """The pack as a diffusers pipeline in float32, without progress bars."""
    from sd_erase.bases import ROWS
    from sd_erase.components import load_pipeline

    return load_pipeline(replace(ROWS[world.base], source=str(target)))


def towers_of(target: Path, world: World = WORLDS["pocket"]) -> Any:
    """Both towers of the pack's CLIP."""
    import torch

    from sd_erase.bases import ROWS
    from sd_erase.clip import load_towers

    base = replace(ROWS[world.base], source=str(target), clip_partner=str(target))
    return load_towers(base, torch.device("cpu"), need_images=True)


def detector_of(target: Path, world: World = WORLDS["pocket"]) -> Any:
    """The detector of the pack at `target`, with the settings of its base's card."""
    from sd_erase.detection import load_detector

    folder = target.resolve() / "detector"
    return load_detector(world.base, weights=str(folder / "model.safetensors"), architecture=str(folder / "architecture.yaml"))


def detector_map50(recipe: Recipe, folder: Path, target: Path) -> float:
    """Mean average precision at IoU 0.5 of the packed detector, by ultralytics' own validation."""
    from ultralytics import YOLO

    world = WORLDS[recipe.world]
    model = YOLO(str(target / "detector" / "architecture.yaml"), task="detect")
    model.model.load_state_dict(detector_of(target, world)._model.state_dict())
    data_file = _write_detector_data(recipe, folder, detector_config(world)["names"])
    result = model.val(data=str(data_file), imgsz=128, batch=32, device="cpu", workers=0, plots=False, verbose=False,
                       project=str((folder / "detector-runs").resolve()), name="val", exist_ok=True)  # fmt: skip
    return round(float(result.box.map50), 4)
