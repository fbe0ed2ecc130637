"""Activation sparsity for language models: measure, calibrate, predict, run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallow.calibration import calibrate
    from fallow.errors import FallowError, UsageError
    from fallow.evaluation import Evaluation, evaluate
    from fallow.model import Model, load
    from fallow.plan import Plan
    from fallow.profiling import profile
    from fallow.sweep import tradeoff

# Found when first used: importing fallow needs no torch.
_PUBLIC = {
    "Evaluation": "fallow.evaluation",
    "FallowError": "fallow.errors",
    "Model": "fallow.model",
    "Plan": "fallow.plan",
    "UsageError": "fallow.errors",
    "calibrate": "fallow.calibration",
    "evaluate": "fallow.evaluation",
    "load": "fallow.model",
    "profile": "fallow.profiling",
    "tradeoff": "fallow.sweep",
}

__all__ = [
    "Evaluation",
    "FallowError",
    "Model",
    "Plan",
    "UsageError",
    "calibrate",
    "evaluate",
    "load",
    "profile",
    "tradeoff",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fallow' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
