"""Activation sparsity for language models: measure, calibrate, predict, run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallow.calibration.calibrator import calibrate
    from fallow.calibration.tradeoff import tradeoff
    from fallow.common.errors import FallowError, UsageError
    from fallow.engine.engine import Engine
    from fallow.gpu.accelerate import accelerate
    from fallow.measure.evaluation import evaluate
    from fallow.measure.profiling import profile
    from fallow.measure.quality import Evaluation
    from fallow.optimization.optimizer import Optimized, optimize
    from fallow.packing.packer import pack
    from fallow.plan import Cut, Plan
    from fallow.reference.model import Model, load
    from fallow.reference.sparsified import densify, load_sparse, save_sparse, sparsify
    from fallow.reporting.page import report

# Found when first used: importing fallow needs no torch.
_PUBLIC = {
    "Cut": "fallow.plan",
    "Engine": "fallow.engine.engine",
    "Evaluation": "fallow.measure.quality",
    "FallowError": "fallow.common.errors",
    "Model": "fallow.reference.model",
    "Optimized": "fallow.optimization.optimizer",
    "Plan": "fallow.plan",
    "UsageError": "fallow.common.errors",
    "accelerate": "fallow.gpu.accelerate",
    "calibrate": "fallow.calibration.calibrator",
    "densify": "fallow.reference.sparsified",
    "evaluate": "fallow.measure.evaluation",
    "load": "fallow.reference.model",
    "load_sparse": "fallow.reference.sparsified",
    "optimize": "fallow.optimization.optimizer",
    "pack": "fallow.packing.packer",
    "profile": "fallow.measure.profiling",
    "report": "fallow.reporting.page",
    "save_sparse": "fallow.reference.sparsified",
    "sparsify": "fallow.reference.sparsified",
    "tradeoff": "fallow.calibration.tradeoff",
}

__all__ = [
    "Cut",
    "Engine",
    "Evaluation",
    "FallowError",
    "Model",
    "Optimized",
    "Plan",
    "UsageError",
    "accelerate",
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
    if name == "__version__":
        return import_module("importlib.metadata").version("fallow")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fallow' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
