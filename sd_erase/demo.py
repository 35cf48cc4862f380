"""The main job from end to end: harvest, train, generate, evaluate, export, report."""

from __future__ import annotations

import dataclasses
from typing import Any

from sd_erase.config import GenerateConfig, RunConfig, TrainConfig
from sd_erase.rundir import RunDir
from sd_erase.stages import output_of, run_stage

STAGES = ("harvest", "train", "generate", "evaluate", "export", "report")
DEFAULT_CONCEPT = "bicycle"
# 50 prompts: 100 images of each encoder, some tens of seconds on two cores; fewer steps than a training of one's own would take
DEFAULTS = RunConfig(generate=GenerateConfig(images_per_prompt=2), train=TrainConfig(steps=200))


def fill(config: RunConfig) -> RunConfig:
    """`config` with the demo's concept where none is given."""
    return config if config.concepts or config.concept_file else dataclasses.replace(config, concepts=(DEFAULT_CONCEPT,))


def demo(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
    """Run all stages of `config` in `run`; finished ones whose inputs are the same are not done again.

    Returns:
        The result of each stage by its name, all warnings, and the page's path as "output".
    """
    result: dict[str, Any] = {"run": str(run), "warnings": []}
    for stage in STAGES:
        found = run_stage(stage, config, run, progress)
        result["warnings"] += found.get("warnings", ())
        result[stage] = {**found, "output": str(output_of(stage, run, found))}
    return {**result, "output": result["report"]["output"]}
