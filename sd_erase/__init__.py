"""sd-erase: make Stable Diffusion forget a concept by unlearning it from the CLIP text encoder.

From Python: `erase`, `evaluate`, `audit` and `load_erased`, see `sd_erase.api`. Importing the package imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_erase.api import Audit, Erasure, Evaluation, audit, erase, evaluate, load_pocket
    from sd_erase.errors import UserError
    from sd_erase.pipeline import load_erased

__version__ = "0.1.0"
__all__ = ["Audit", "Erasure", "Evaluation", "UserError", "audit", "erase", "evaluate", "load_erased", "load_pocket"]
_ELSEWHERE = {"UserError": "sd_erase.errors", "load_erased": "sd_erase.pipeline"}  # than in `sd_erase.api`


def __getattr__(name: str) -> Any:
    """What `__all__` names, on first use: importing the package stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ELSEWHERE.get(name, "sd_erase.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
