"""A model in memory as a base: what the stages read of it, written into a folder in diffusers' layout.

Weights are taken from memory, never from where the model says that it was loaded from: somebody may have changed them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import bases, formats, hosts
from sd_erase.errors import UserError
from sd_erase.modelfiles import INDEX, STATEMENT
from sd_erase.pipeline import ENCODERS

BARE = "CLIPTextModel"  # the one encoder that is taken without a pipeline; SDXL's second is called ...WithProjection
CLIP_TOKENS = 49_408  # of CLIP's own vocabulary, which ships with the pocket model
CLIP_ACTIVATION = "quick_gelu"  # of the encoders that are padded with its end-of-text token
CONFIGURED = ("unet", "vae", "scheduler")  # whose settings say what the model is and how it draws


@dataclass(frozen=True)
class Encoders:
    """Text encoders without a pipeline around them: one, or SDXL's two; a tokenizer that is None is CLIP's own."""

    text_encoder: Any
    tokenizer: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None


def is_encoder(model: Any) -> bool:
    """Whether `model` is a text encoder rather than a pipeline.

    Raises:
        UserError: it is neither.
    """
    kind = type(hosts.unwrapped(model)).__name__
    if kind == BARE:
        return True
    if kind == "CLIPTextModelWithProjection":
        raise UserError("A CLIPTextModelWithProjection is one of two encoders of SDXL: pass its whole pipeline.")
    if not hasattr(model, "components") and not isinstance(model, Encoders):
        raise UserError(f"A {kind} is no diffusers pipeline and no CLIPTextModel: pass one of these.")
    return False


def encoders_of(model: Any) -> dict[str, Any]:
    """The CLIP text encoders of a pipeline, or the one encoder itself, by the pipeline's names.

    Raises:
        UserError: there is none, or one that is offloaded, quantised or has a LoRA fused into it.
    """
    found = {ENCODERS[0]: model} if is_encoder(model) else {name: getattr(model, name, None) for name in ENCODERS}
    own = {name: hosts.unwrapped(encoder) for name, encoder in found.items() if encoder is not None}
    if not own:
        raise UserError(f"A {type(model).__name__} has no CLIP text encoder: pass a Stable Diffusion pipeline.")
    for name, encoder in own.items():
        if type(encoder).__name__.startswith(BARE):  # what else there is, the base's card refuses by name
            hosts.check_host(encoder, name)
    return own


def name_of(model: Any) -> str:
    """What a model's base is called: a row of `bases.ROWS` that it was loaded from, or the last part of where that was."""
    config = getattr(model, "config", None)
    source = str(
        (config or {}).get("_name_or_path", "") if isinstance(config, dict) else getattr(config, "_name_or_path", "") or ""
    )
    if getattr(getattr(getattr(model, ENCODERS[0], model), "config", None), STATEMENT, None) == "pocket":
        return "pocket"
    row = next((row.name for row in bases.ROWS.values() if source in (row.source, str(Path(row.source) / ENCODERS[0]))), "")
    return row or re.sub(r"[^\w.-]+", "-", Path(source).name.removesuffix(".safetensors")).strip(".-") or "model"


def write_base(model: Any, folder: Path, tokenizer: Any = None, weights: bool = True) -> None:
    """Write what a training of `model` reads: text encoders, tokenizers, and the settings of its other parts.

    Args:
        model: a Stable Diffusion pipeline, or a CLIPTextModel.
        folder: where; it is made.
        tokenizer: of a CLIPTextModel; None is CLIP's own.
        weights: whether the encoders' weights are written too; without them `bases.resolve` knows the model all the same.

    Raises:
        UserError: as `encoders_of`; or an encoder whose tokenizer is not given and is not CLIP's.
    """
    encoders = encoders_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if is_encoder(model) or isinstance(model, Encoders):
        _write_surroundings(encoders, folder)
    else:
        index = {key: value for key, value in model.config.items() if not key.startswith("_")}
        _write_json(folder / INDEX, {"_class_name": type(model).__name__, **index})
        for name in CONFIGURED:
            part = getattr(model, name, None)
            if part is not None and hasattr(hosts.unwrapped(part), "save_config"):
                hosts.unwrapped(part).save_config(folder / name)
    for name, encoder in encoders.items():
        own = tokenizer or getattr(model, name.replace("text_encoder", "tokenizer"), None) or _clip_tokenizer(encoder)
        own.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        encoder.config.save_pretrained(folder / name)
        if weights and type(encoder).__name__.startswith(BARE):
            formats.save_tensors(folder / name / "model.safetensors", hosts.own_state(encoder), {"format": "pt"})


def write_rest(model: Any, folder: Path) -> None:
    """Write all other parts of a pipeline beside what `write_base` wrote: for what draws, or is exported whole.

    Raises:
        UserError: the model is a text encoder alone.
    """
    if is_encoder(model) or isinstance(model, Encoders):
        raise UserError("A text encoder alone draws no images: pass its pipeline to erase().")
    for name, part in model.components.items():
        if hasattr(part, "save_pretrained") and name not in (*ENCODERS, "tokenizer", "tokenizer_2", "scheduler"):
            part.save_pretrained(folder / name)


def _write_surroundings(encoders: dict[str, Any], folder: Path) -> None:
    """The settings of a denoiser that would read these encoders: a base is told by them."""
    parts = {name: ["transformers", type(encoder).__name__] for name, encoder in encoders.items()}
    parts |= {name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for name in encoders}
    parts |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    width = sum(encoder.config.hidden_size for encoder in encoders.values())
    kind = "StableDiffusionXLPipeline" if len(encoders) > 1 else "StableDiffusionPipeline"
    _write_json(folder / INDEX, {"_class_name": kind, **parts})
    _write_json(folder / "unet" / "config.json", {"in_channels": 4, "cross_attention_dim": width})
    _write_json(folder / "scheduler" / "scheduler_config.json", {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, default=list), encoding="utf-8")


def _clip_tokenizer(encoder: Any) -> Any:
    """CLIP's tokenizer, for an encoder that has its vocabulary and its padding."""
    from transformers import CLIPTokenizerFast

    if (encoder.config.vocab_size, encoder.config.hidden_act) != (CLIP_TOKENS, CLIP_ACTIVATION):
        raise UserError(
            f"This text encoder has {encoder.config.vocab_size:,} tokens and activation {encoder.config.hidden_act}, so CLIP's own tokenizer may "
            "not be its: pass tokenizer=."
        )
    return CLIPTokenizerFast.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
