"""Resumable training state as one safetensors file: tensors, the optimizer's moments and the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import formats, parallel
from sd_erase.folders import replacing

if TYPE_CHECKING:
    import torch


def save_checkpoint(path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], optimizer: Any, step: int) -> None:
    """Write named groups of tensors, `optimizer`'s state and `step` to `path`, atomically; of several processes, the main one does.

    Args:
        groups: for example {"model": model.state_dict(), "average": averages}.
        optimizer: a torch optimizer whose state is made of tensors (Adam, AdamW, SGD).
        step: how many steps are done.
    """
    import torch
    from safetensors.torch import save_file

    if not parallel.is_main():
        return
    tensors = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{part}": value for part, value in state.items()}
    tensors["step"] = torch.tensor(step)
    with replacing(path) as temporary:
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, temporary)


def load_checkpoint(path: Path, optimizer: Any) -> tuple[int, dict[str, dict[str, torch.Tensor]]]:
    """Restore `optimizer` from `path`; returns the step and the groups of tensors that were saved.

    Raises:
        KeyError, ValueError: the file is damaged or belongs to another optimizer.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in formats.read_tensors(path).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in groups.pop("optimizer", {}).items():
        index, _, part = name.partition("/")
        moments.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(groups.pop("step")[""]), groups
