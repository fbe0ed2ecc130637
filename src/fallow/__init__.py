"""Activation sparsity for language models: measure, calibrate, predict, run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallow.calibration import calibrate
    from fallow.engine import Engine
    from fallow.errors import FallowError, UsageError
    from fallow.evaluation import evaluate
    from fallow.model import Model, load
    from fallow.optimization import Optimized, optimize
    from fallow.packing import pack
    from fallow.plan import Plan
    from fallow.profiling import profile
    from fallow.quality import Evaluation
    from fallow.reporting.page import report
    from fallow.sparsified import densify, load_sparse, save_sparse, sparsify
    from fallow.sweep import tradeoff

# Found when first used: importing fallow needs no torch.
_PUBLIC = {
    "Engine": "fallow.engine",
    "Evaluation": "fallow.quality",
    "FallowError": "fallow.errors",
    "Model": "fallow.model",
    "Optimized": "fallow.optimization",
    "Plan": "fallow.plan",
    "UsageError": "fallow.errors",
    "calibrate": "fallow.calibration",
    "densify": "fallow.sparsified",
    "evaluate": "fallow.evaluation",
    "load": "fallow.model",
    "load_sparse": "fallow.sparsified",
    "optimize": "fallow.optimization",
    "pack": "fallow.packing",
    "profile": "fallow.profiling",
    "report": "fallow.reporting.page",
    "save_sparse": "fallow.sparsified",
    "sparsify": "fallow.sparsified",
    "tradeoff": "fallow.sweep",
}

__all__ = [
    "Engine",
    "Evaluation",
    "FallowError",
    "Model",
    "Optimized",
    "Plan",
    "UsageError",
    "calibrate",
    "densify",
    "evaluate",
    "load",
    "load_sparse",
    "optimize",
    "pack",
    "profile",
    "report",
    "save_sparse",
    "sparsify",
    "tradeoff",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fallow' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
