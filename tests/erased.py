"""Runs as a training leaves them, of any base, made without training: low-rank changes of the linear weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd_erase import bases, components
from sd_erase.bases import Base
from sd_erase.config import RunConfig, dump
from sd_erase.formats import PREFIX, linear_modules
from sd_erase.rundir import RunDir, write_json_atomic

RANK = 2


def erased_run(folder: Path, base: Base, source: str, *, lora: bool = True, rank: int = RANK) -> tuple[RunConfig, RunDir]:
    """A run that erased "bicycle" from `base`.

    Args:
        source: what its settings name as the base.
        lora: whether the factors are kept, as a LoRA training does.
        rank: of the change of every linear weight.
    """
    import torch
    from safetensors.torch import save_file

    settings = RunConfig(concepts=("bicycle",), device="cpu", base=source)
    run = RunDir.create(folder / "runs", "bicycle", base.name)
    run.config.write_text(dump(settings), encoding="utf-8")
    concept = {"name": "bicycle", "kind": "object", "words": ["bicycle", "bicycles"], "synonyms": ["bike"], "labels": ["bicycle"]}
    write_json_atomic(run.concepts, [concept])
    generator = torch.Generator().manual_seed(1)
    for encoder in base.encoders:
        state = {key: value.float() for key, value in components.text_encoder_state(base, encoder).items()}
        layers = 1 + max(int(key.split(".")[3]) for key in state if ".layers." in key)
        factors = {}
        for module in linear_modules(layers):
            out, inner = state[f"{module}.weight"].shape
            scale = 0.3 * float(state[f"{module}.weight"].std())
            up = torch.randn(out, rank, generator=generator) * scale / rank**0.5
            down = torch.randn(rank, inner, generator=generator)
            state[f"{module}.weight"] = state[f"{module}.weight"] + up @ down
            name = module.removeprefix(PREFIX)
            factors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        place = run.encoder / encoder.name
        place.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in state.items()}, place / "model.safetensors", {"format": "pt"})
        own = bases.CONFIGURATIONS / base.configuration if base.configuration else Path(base.source)
        shutil.copyfile(own / encoder.name / "config.json", place / "config.json")
        if lora and len(base.encoders) == 1:
            save_file(factors, run.encoder / "lora.safetensors", {"format": "pt"})
    run.complete("harvest", "h", {})
    run.complete(
        "train",
        "t",
        {"objective": "sd", "steps": 40, "anchor": {"bicycle": "object"}, "lora_rank": rank if lora else 0, "seconds": 1.0},
    )
    return settings, run
