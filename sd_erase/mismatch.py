"""What is said of a file whose tensors are not those of the module that it should fill, and what a file may hold beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sd_erase.errors import UserError

# what files hold beside a component's own tensors (without the prefix "text_model."), and why it is left out without a word
EXTRAS = (
    (r"(.*\.)?position_ids", "0 to 76; transformers before 4.31 stored them, later ones make them"),
    (r"text_projection(\.weight)?", "of CLIP-L and SD 2.x's encoder: no denoiser reads it; ComfyUI's CLIPSave writes it"),
    (r"logit_scale|logit_bias|attn_mask", "of a whole CLIP: its loss's temperature and bias, and a mask that programs make"),
    (r"visual_projection\.weight|vision_model\..*|visual\..*", "a whole CLIP stored as the text encoder: its other tower"),
    (r"loss\..*", "of latent-diffusion's autoencoder: what judged its images in training"),
)
# names that tell how a file came about: what it then is, and what to do
ORIGINS = (
    (r"(^|\.)(base_layer|lora_A|lora_B|lora_up|lora_down|lora_magnitude_vector|lora_embedding_A)\.",
     "it was saved with a LoRA attached (peft), whose change is not in its weights: load it where it was made, merge the LoRA "
     "(merge_and_unload() of peft, fuse_lora() and unload_lora_weights() of diffusers), save it again and pass that"),
    (r"(^|\.)(SCB|absmax|quant_map|nested_absmax|quant_state\..*|qweight|qzeros|weight_scale|scale_weight|scaled_fp8|weight_format)$",
     "its weights are quantised, which rounds them and cannot be trained: pass the model in float16, bfloat16 or float32"),
    (r"\.weight_(orig|mask)$", "it was saved with torch's pruning attached: call torch.nn.utils.prune.remove and save it again"),
    (r"\.parametrizations\.|\.weight_[gv]$", "it was saved with a parametrisation attached: remove that and save it again"),
    (r"^(module|_orig_mod)\.",
     "some of its names have the prefix of DataParallel or torch.compile: save the model inside (model.module, model._orig_mod) and pass that"),
)  # fmt: skip

_EXTRAS = tuple(re.compile(pattern) for pattern, _ in EXTRAS)


class Reshaped(NamedTuple):
    """A tensor of another shape than the module's."""

    name: str
    shape: Sequence[int]
    expected: Sequence[int]


def is_extra(name: str) -> bool:
    """Whether a tensor that a module does not have may be left out (see `EXTRAS`)."""
    bare = name.removeprefix("text_model.")
    return any(pattern.fullmatch(bare) for pattern in _EXTRAS)


def mismatch(
    what: str, file: object, missing: Iterable[str] = (), unknown: Iterable[str] = (), shapes: Iterable[Reshaped] = ()
) -> UserError:
    """One sentence about the tensors of `file` that do not fit the component `what`, with the remedy where their names tell it."""
    missing, unknown, shapes = sorted(missing), sorted(unknown), list(shapes)
    faults = []
    if missing:
        faults.append(f"{len(missing)} of its tensors are missing, first {', '.join(missing[:2])}")
    if unknown:
        faults.append(f"{len(unknown)} do not belong to it, first {', '.join(unknown[:2])}")
    if shapes:
        first = shapes[0]
        faults.append(
            f"{len(shapes)} have another shape, first {first.name} with {_size(first.shape)} in place of {_size(first.expected)}"
        )
    remedy = next(
        (advice for pattern, advice in ORIGINS if any(re.search(pattern, name) for name in unknown)),
        "pass a complete model (nothing is made up for what does not fit)",
    )
    return UserError(f"The {what} of {file} cannot be loaded, {'; '.join(faults)}: {remedy}.")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(number) for number in shape) or "a single number"
