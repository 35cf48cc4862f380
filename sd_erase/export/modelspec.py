"""The fields of ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec) that every exported file carries."""

from __future__ import annotations

from sd_erase.bases import Base

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def architecture(base: Base) -> str:
    """ModelSpec's name of a base's kind; of SD 2.x it says what the denoiser predicts."""
    is_velocity = base.family == "sd2" and base.prediction == "v_prediction"
    return "stable-diffusion-v2-768-v" if is_velocity else ARCHITECTURES[base.family]


def kohya_version(base: Base) -> str:
    """kohya's name of the same (``ss_base_model_version``), by which A1111 sorts LoRAs."""
    return VERSIONS[base.family] + ("_v" if base.family == "sd2" and base.prediction == "v_prediction" else "")


def modelspec(title: str, description: str, base: Base, kind: str, date: str) -> dict[str, str]:
    """The fields of a file; `formats.write_tensors` adds the hash.

    Args:
        kind: what of the architecture the file holds ("text-encoder", "lora"); "" for all of it.
        date: in ISO 8601; "" where it is not known, which leaves the field out.
    """
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(base)}/{kind}".rstrip("/"),
        "modelspec.implementation": "https://github.com/"
        + ("huggingface/transformers" if kind == "text-encoder" else "Stability-AI/generative-models"),
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.author": "sd-erase",
        "modelspec.date": date,
    }
    return {name: value for name, value in fields.items() if value}
