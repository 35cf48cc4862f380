"""Gradient checkpointing where what a step keeps would take too much of the memory."""

from __future__ import annotations

from typing import Any

from sd_erase import resources
from sd_erase.clip import Towers
from sd_erase.config import TrainConfig

OTHER_CAPTIONS = 25  # of a step beside the pairs' own: what is protected, the empty prompt, and those under attack
KEPT = 16  # numbers that a layer keeps for the backward pass, for each of a position's hidden state


def is_tight(towers: Towers, settings: TrainConfig, device: Any) -> bool:
    """Whether a step keeps more than half of the free memory: the rest is for gradients, moments, and what no layer keeps."""
    return bool(settings.steps) and activations(towers, settings) > resources.free_memory(device) / 2


def activations(towers: Towers, settings: TrainConfig) -> int:
    """About how many bytes the layers of a training step keep for its backward pass.

    A forget and a retain caption make a pair, and others come beside the pairs, some of them attacked; where both towers train, their
    images too. With 32 pairs this says 4.0 GB of CLIP-L, 10.3 of OpenCLIP-H, 18.0 of OpenCLIP-bigG; on an H200 the default's peak
    was 3.6, 7.6 and 13.3 GB lower without what is kept.
    """
    text = towers.text.config
    numbers = (
        (2 * settings.batch_size + OTHER_CAPTIONS) * text.max_position_embeddings * text.hidden_size * text.num_hidden_layers
    )
    if settings.towers == "both":
        vision = towers.clip.config.vision_config
        positions = (vision.image_size // vision.patch_size) ** 2 + 1
        numbers += 2 * settings.batch_size * positions * vision.hidden_size * vision.num_hidden_layers
    return 4 * KEPT * numbers


def checkpoint_gradients(model: Any) -> bool:
    """Compute the layers twice in place of keeping what they computed (Chen et al. 2016, arXiv:1604.06174): the same weights result.

    The layers are put into training mode, in which alone transformers does so; what is inside them is not, because a
    fine-tune's configuration may drop out attention.

    Returns:
        Whether the model can.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    return bool(layers)
