"""The loss terms as pure functions, one an equation. Embeddings are normalised, [batch, dimensions]."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def forgetting(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Mean similarity of the forget pairs, to be minimised (CLIPErase, eq. 2).

    Args:
        images, texts: normalised embeddings [pairs, dimensions] of matching pairs.
    """
    return (images * texts).sum(-1).mean()


def retention(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric contrastive loss on the retain pairs (CLIPErase, eq. 3, which is eq. 1).

    Args:
        images, texts: normalised embeddings [pairs, dimensions].
        scale: the inverse temperature, a scalar.
    """
    import torch
    from torch.nn.functional import cross_entropy

    logits = scale * images @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def consistency(original: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL divergence from the original's to the student's embedding distribution, one modality (half of CLIPErase, eq. 4).

    The softmax runs over the embedding's dimensions, as the paper's text has it.

    Args:
        original, student: embeddings [batch, dimensions] of the same inputs.
    """
    from torch.nn.functional import kl_div, log_softmax

    return kl_div(log_softmax(student, -1), log_softmax(original, -1), log_target=True, reduction="batchmean")


def prediction_divergence(original: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL divergence from the original's to the student's predictions, image to text and text to image (as Maini et al. 2024).

    Args:
        original, student: similarities times the inverse temperature [images, texts].
    """
    from torch.nn.functional import kl_div, log_softmax

    def one_way(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return kl_div(log_softmax(after, -1), log_softmax(before, -1), log_target=True, reduction="batchmean")

    return (one_way(original, student) + one_way(original.T, student.T)) / 2


def spread(states: torch.Tensor) -> torch.Tensor:
    """The variance of hidden states [batch, positions, width] about their mean over batch and positions, a scalar."""
    return (states - states.mean((0, 1), keepdim=True)).square().mean().clamp(min=1e-8)


def relative_error(student: torch.Tensor, target: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of hidden states over the target's own variance, so that one weight serves every layer and model.

    Args:
        student, target: [batch, positions, width].
        over: the variance; None is the target's `spread`.
    """
    return (student - target).square().mean() / (spread(target) if over is None else over)
