"""The embedded world: emoji scenes with captions, and a small Stable Diffusion that was truly trained on them."""
