"""An erased encoder (and what a comparator changed of the denoiser) into a diffusers pipeline; all else is shared with the original."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from sd_erase import denoiser, formats, hosts
from sd_erase.bases import Base
from sd_erase.components import load_pipeline
from sd_erase.errors import UserError
from sd_erase.lora import add_lora, is_lora
from sd_erase.rundir import RunDir

ENCODERS = ("text_encoder", "text_encoder_2")
SMALL = ("tokenizer", "tokenizer_2", "scheduler")  # copied into the result


def load_original(base: Base, device: Any, dtype: Any) -> Any:
    """The base's pipeline on `device`.

    Raises:
        UserError: the base cannot be loaded.
    """
    return load_pipeline(base, dtype).to(device)


def erased_pipeline(original: Any, run: RunDir) -> Any:
    """`original` with the run's erased text encoder(s); all other modules are the same objects, so that memory holds them once.

    Args:
        original: a StableDiffusionPipeline or StableDiffusionXLPipeline.
        run: a run with ``encoder/text_encoder`` and, for SDXL, ``encoder/text_encoder_2``.

    Raises:
        UserError: the run holds no encoder, or one that does not fit the base.
    """
    if not any((run.encoder / name / "model.safetensors").is_file() for name in ENCODERS):
        raise UserError(f"Run {run} holds no erased encoder: run {run.command('train')} first.")
    return load_erased(original, run.path)


def load_erased(pipeline: Any, source: str | Path) -> Any:
    """A diffusers pipeline with an erased text encoder in place of its own.

    Args:
        pipeline: any diffusers pipeline with CLIP text encoders; it stays as it is, and the result shares the denoiser, the
            autoencoder and all else with it but the tokenizers and the scheduler. LoRAs that are attached to its text encoders
            stay attached, tokens that were added stay. With FLUX.1 and SD 3 the erasure is partial, because their T5 encoder
            still knows the concept.
        source: a run's folder, or what `sd-erase export` wrote: a text encoder's file, a full checkpoint, a LoRA, its exact
            form, or a diffusers folder. SDXL's two files are loaded one after the other. Of a run of a published comparator that
            changes the denoiser (``--objective esd``), the result has that too.

    Returns:
        A new pipeline of the same class.

    Raises:
        UserError: `source` is none of these, is damaged, or does not fit the pipeline; or the pipeline's encoder is quantised,
            offloaded, or has a LoRA fused into it.

    Example:
        >>> pipe = load_erased(pipe, "bicycle-sd15-text_encoder-vit-l-fp16.safetensors")  # doctest: +SKIP
    """
    import inspect

    source = Path(source).expanduser()
    own = {name: encoder for name in ENCODERS if _is_clip(encoder := hosts.unwrapped(getattr(pipeline, name, None)))}
    if not own:
        raise UserError(f"A {type(pipeline).__name__} has no CLIP text encoder: pass a Stable Diffusion pipeline.")
    for name, encoder in own.items():
        hosts.check_host(encoder, name)
    changed = {name: hosts.with_weights(own[name], state, source) for name, state in _states(own, source).items()}
    changed |= _denoiser(pipeline, source)
    if any("T5" in type(part).__name__ for part in pipeline.components.values()):
        warnings.warn("The erasure is partial: this pipeline reads a T5 text encoder too, which is unchanged.", stacklevel=2)
    # a token that is added to the result, or its schedule, must not reach the source
    changed |= {name: hosts.copied(part) for name, part in pipeline.components.items() if name in SMALL and part is not None}
    parameters = inspect.signature(type(pipeline).__init__).parameters
    options = {key: value for key, value in pipeline.config.items() if key in parameters and key not in pipeline.components}
    erased = type(pipeline)(**{**pipeline.components, **changed}, **options)
    erased.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return erased


def _denoiser(pipeline: Any, source: Path) -> dict[str, Any]:
    """The pipeline's denoiser as a run changed it; nothing where `source` changed none."""
    file = RunDir(source).denoiser
    if not file.is_file():
        return {}
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise UserError(f"Run {source} changes a UNet, and a {type(pipeline).__name__} has none: pass a pipeline of its base.")
    return {"unet": denoiser.changed(unet, file)}


def _is_clip(encoder: Any) -> bool:
    return type(encoder).__name__ in {"CLIPTextModel", "CLIPTextModelWithProjection"}


def _states(own: dict[str, Any], source: Path) -> dict[str, dict[str, Any]]:
    """The erased encoders' tensors by the pipeline's component, with prefixed names."""
    if source.is_dir():
        folder = RunDir(source).encoder if RunDir(source).encoder.is_dir() else source
        files = {name: folder / name / "model.safetensors" for name in own}
        states = {name: state for name, file in files.items() if file.is_file() for state in formats.read_encoders(file).values()}
        if not states:
            raise UserError(f"Folder {source} is neither a trained run nor a diffusers folder with a text encoder.")
        return states
    if is_lora(formats.read_header(source).tensors):
        return add_lora({name: hosts.own_state(encoder) for name, encoder in own.items()}, source)
    found = formats.read_encoders(source)
    if "" in found:  # a file that does not say which encoder it is
        state = found.pop("")
        width = state[f"{formats.PREFIX}final_layer_norm.weight"].shape[0]
        found = {name: state for name, encoder in own.items() if encoder.config.hidden_size == width}
    if len(found) > len(own) or not found.keys() <= own.keys() or not found:
        raise UserError(
            f"File {source} holds no text encoder that this pipeline has ({', '.join(own)}): pass an export for its base."
        )
    return found
