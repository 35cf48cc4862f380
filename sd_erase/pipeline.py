"""An erased encoder into a diffusers pipeline; everything else of the pipeline is shared with the original."""

from __future__ import annotations

from typing import Any

from sd_erase.bases import Base, load_pipeline
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir


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
    import copy

    from sd_erase.clip import load_prefixed

    names = [name for name in ("text_encoder", "text_encoder_2") if (run.encoder / name / "model.safetensors").is_file()]
    if not names:
        raise UserError(f"Run {run} holds no erased encoder: run `sd-erase train` first.")
    encoders = {}
    for name in names:
        encoder = copy.deepcopy(getattr(original, name))
        load_prefixed(encoder, run.encoder / name / "model.safetensors")
        encoders[name] = encoder
    options = {} if "text_encoder_2" in original.components else {"requires_safety_checker": False}
    erased = type(original)(**{**original.components, **encoders}, **options)
    erased.set_progress_bar_config(disable=True)
    return erased
