"""Which patches of an image speak for a text: the relevance of Chefer et al. 2021 (arXiv:2103.15679) for CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def relevance(clip: Any, pixels: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The relevance of every image patch for the similarity of image and text.

    "Generic Attention-model Explainability", eqs. 5 and 6 without cross-attention, as the authors' own CLIP example has it: from the
    identity, each layer's attention, weighted with the gradient of the scaled similarity and rectified, is averaged over the heads
    and carries the relevance on; the row of the class token is the result.

    Args:
        clip: a CLIPModel of transformers.
        pixels: [images, 3, height, width].
        texts: the normalised embedding of each image's text [images, dimensions].

    Returns:
        [images, rows, columns] of the patch grid, 0 or more, in no unit: compare within an image.
    """
    import torch

    from sd_erase.clip import image_embeddings

    vision = clip.vision_model
    attentions: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        attentions.append(output[1])  # [images, heads, tokens, tokens]

    own = vision.config._attn_implementation
    handles = [layer.self_attn.register_forward_hook(keep) for layer in vision.encoder.layers]
    vision.set_attn_implementation("eager")  # the fused kernels keep no attention
    try:
        with torch.enable_grad():
            images = image_embeddings(clip, pixels.detach().requires_grad_())
            similarity = clip.logit_scale.exp().detach() * (images * texts.detach()).sum()
            gradients = torch.autograd.grad(similarity, attentions)
    finally:
        vision.set_attn_implementation(own)
        for handle in handles:
            handle.remove()
    tokens = attentions[0].shape[-1]
    result = torch.eye(tokens, device=pixels.device)
    for attention, gradient in zip(attentions, gradients, strict=True):
        result = result + (gradient * attention.detach()).clamp(min=0).mean(1) @ result
    patch = vision.config.patch_size
    return result[:, 0, 1:].reshape(len(pixels), pixels.shape[-2] // patch, pixels.shape[-1] // patch)
