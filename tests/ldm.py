"""A Stable Diffusion 1.x pipeline in the one-file layout that A1111's users have (CompVis' latent-diffusion names).

The reverse of what diffusers does when it reads such a file; written from the layout, so that loading is checked both ways.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def _unet_name(key: str) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", key):
        block, kind, layer = int(match[1]), match[2], int(match[3])
        prefix = f"input_blocks.{3 * block + layer + 1}.{int(kind == 'attentions')}."
    elif match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.", key):
        prefix = f"input_blocks.{3 * (int(match[1]) + 1)}.0.op."
    elif match := re.match(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", key):
        block, kind, layer = int(match[1]), match[2], int(match[3])
        prefix = f"output_blocks.{3 * block + layer}.{int(kind == 'attentions')}."
    elif match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.", key):
        prefix = f"output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' else 2}."
    elif match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.", key):
        prefix = f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}."
    else:
        raise KeyError(key)
    rest = key[match.end() :]
    if "resnets" in match[0]:
        part, _, tail = rest.partition(".")
        rest = f"{_RESNET[part]}.{tail}"
    return prefix + rest


def _vae_name(key: str, blocks: int) -> str:
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
    key = re.sub(r"mid_block\.resnets\.(\d)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2.", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block.{m[2]}.", key
    )
    key = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample.", key)
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if ".attn_1." in key:
        for ours, theirs in (
            ("group_norm.", "norm."),
            ("to_q.", "q."),
            ("to_k.", "k."),
            ("to_v.", "v."),
            ("to_out.0.", "proj_out."),
        ):
            key = key.replace(f".attn_1.{ours}", f".attn_1.{theirs}")
    return key


def checkpoint(pipeline: Any) -> dict[str, torch.Tensor]:
    """The tensors of `pipeline` under their names in a one-file checkpoint."""
    state = {f"model.diffusion_model.{_unet_name(key)}": value for key, value in pipeline.unet.state_dict().items()}
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = _vae_name(key, blocks)
        # attention is a convolution there
        state[f"first_stage_model.{name}"] = value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
    for key, value in pipeline.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.contiguous() for key, value in state.items()}
