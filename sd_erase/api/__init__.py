"""sd-erase from Python: a pipeline in, the same pipeline without the concept out.

    import sd_erase

    erased = sd_erase.erase(pipe, "bicycle")
    erased.model("a bicycle next to a dog").images[0]
    erased.save("bicycle.safetensors", form="comfyui")
    sd_erase.evaluate(pipe, erased, ["a bicycle next to a dog"])

These are thin: the stages of a run do the work, in a folder of their own that goes with the result. Nothing here imports torch before it
is called.
"""

from __future__ import annotations

from sd_erase.api.erasing import erase, load_pocket
from sd_erase.api.measuring import audit, evaluate
from sd_erase.api.results import Audit, Erasure, Evaluation, Rate, Row

__all__ = ["Audit", "Erasure", "Evaluation", "Rate", "Row", "audit", "erase", "evaluate", "load_pocket"]
