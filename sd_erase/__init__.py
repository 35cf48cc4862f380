"""sd-erase: make Stable Diffusion forget a concept by unlearning it from the CLIP text encoder."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_erased"]


def __getattr__(name: str) -> Any:
    """`load_erased` on first use: importing the package stays instant."""
    if name == "load_erased":
        from sd_erase.pipeline import load_erased

        return load_erased
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
