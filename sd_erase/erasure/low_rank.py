"""A LoRA in place of full weights: low-rank additions beside every linear layer (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sd_erase import formats, parallel
from sd_erase.clip import Towers
from sd_erase.rundir import replacing

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def add(towers: Towers, rank: int, seed: int) -> list[Any]:
    """Put low-rank additions into the text encoder and return them as what alone trains."""
    from peft import LoraConfig, inject_adapter_in_model  # seconds, which a training of full weights need not wait

    for module in (towers.clip, towers.text):
        if module is not None:
            module.requires_grad_(False)
    torch.manual_seed(seed)
    # alpha = rank: every program that loads the file then scales it by one
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LINEAR_LAYERS)), towers.text)
    return [parameter for parameter in towers.text.parameters() if parameter.requires_grad]


def save_and_merge(towers: Towers, path: Path, rank: int) -> None:
    """Keep the factors in `path` and add them to the linear weights, so that a plain encoder remains."""
    from peft.tuners.lora import LoraLayer

    factors = {}
    layers = [(name, module) for name, module in towers.text.named_modules() if isinstance(module, LoraLayer)]
    for name, module in layers:
        factors[f"{name}.down.weight"] = module.lora_A["default"].weight.detach().cpu().contiguous()  # [rank, in]
        factors[f"{name}.up.weight"] = module.lora_B["default"].weight.detach().cpu().contiguous()  # [out, rank]
        module.merge()
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        setattr(towers.text.get_submodule(parent), child, module.get_base_layer())
    if not parallel.is_main():
        return
    with replacing(path) as temporary:
        formats.save_tensors(temporary, factors, {"format": "pt", "rank": str(rank), "alpha": str(rank)})
