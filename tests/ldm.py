"""A Stable Diffusion pipeline (1.x, 2.x, XL) in the one-file layout that A1111's users have (latent-diffusion names).

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
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def _unet_name(key: str, first_up_attends: bool) -> str:
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
        prefix = f"output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' and not first_up_attends else 2}."
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


_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"
}  # fmt: skip


def open_clip(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A text encoder of transformers under OpenCLIP's names; layers beyond its own are random, as SD 2.x keeps one more."""
    import torch

    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    width = bare["final_layer_norm.weight"].shape[0]
    projection = bare["text_projection.weight"].T if "text_projection.weight" in bare else torch.eye(width)
    found = {
        "token_embedding.weight": bare["embeddings.token_embedding.weight"],
        "positional_embedding": bare["embeddings.position_embedding.weight"],
        "ln_final.weight": bare["final_layer_norm.weight"],
        "ln_final.bias": bare["final_layer_norm.bias"],
        "text_projection": projection,
        "logit_scale": torch.tensor(4.6),
    }
    own = 1 + max(int(key.split(".")[2]) for key in bare if key.startswith("encoder.layers."))
    for layer in range(layers):
        source = f"encoder.layers.{min(layer, own - 1)}."
        for kind in ("weight", "bias"):
            parts = [bare[f"{source}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in _OPEN_CLIP.items():
                found[f"transformer.resblocks.{layer}.{theirs}.{kind}"] = bare[f"{source}{ours}.{kind}"]
    return found


def checkpoint(pipeline: Any) -> dict[str, torch.Tensor]:
    """The tensors of `pipeline` under their names in a one-file checkpoint."""
    attends = pipeline.unet.config.up_block_types[0] == "CrossAttnUpBlock2D"
    state = {f"model.diffusion_model.{_unet_name(key, attends)}": value for key, value in pipeline.unet.state_dict().items()}
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = _vae_name(key, blocks)
        # attention is a convolution there
        state[f"first_stage_model.{name}"] = value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
    state |= encoders(pipeline)
    return {key: value.clone().contiguous() for key, value in state.items()}


def encoders(pipeline: Any) -> dict[str, torch.Tensor]:
    """The part of `checkpoint` that the text encoders are."""
    import torch

    text = pipeline.text_encoder.state_dict()
    if getattr(pipeline, "text_encoder_2", None) is not None:
        state = {f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}": text[key] for key in text}
        second = open_clip(pipeline.text_encoder_2.state_dict(), pipeline.text_encoder_2.config.num_hidden_layers)
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
        first = "conditioner.embedders.0.transformer"
    elif pipeline.text_encoder.config.hidden_act == "gelu":  # SD 2.x
        return {
            f"cond_stage_model.model.{key}": value
            for key, value in open_clip(text, pipeline.text_encoder.config.num_hidden_layers + 1).items()
        }
    else:
        first = "cond_stage_model.transformer"
        state = {f"{first}.text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    return {**state, f"{first}.text_model.embeddings.position_ids": torch.arange(77)[None]}
