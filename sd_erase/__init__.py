"""sd-erase: make Stable Diffusion forget a concept by unlearning it from the CLIP text encoder."""

__version__ = "0.1.0"
