"""The fields of ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec) that every exported file carries."""

from __future__ import annotations

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}


def modelspec(title: str, description: str, family: str, kind: str, date: str) -> dict[str, str]:
    """The fields of a file; `formats.write_tensors` adds the hash.

    Args:
        kind: what of the architecture the file holds ("text-encoder", "lora"); "" for all of it.
        date: in ISO 8601; "" where it is not known, which leaves the field out.
    """
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES[family]}/{kind}".rstrip("/"),
        "modelspec.implementation": "https://github.com/"
        + ("huggingface/transformers" if kind == "text-encoder" else "Stability-AI/generative-models"),
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.author": "sd-erase",
        "modelspec.date": date,
    }
    return {name: value for name, value in fields.items() if value}
