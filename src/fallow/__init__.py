"""Activation sparsity for language models: measure, calibrate, predict, run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallow.adaptation.adapter import AdaptReport, AdaptSettings, adapt
    from fallow.calibration.calibrator import calibrate
    from fallow.calibration.tradeoff import Row, tradeoff
    from fallow.checkpoints.text import Text
    from fallow.common.errors import FallowError, UsageError
    from fallow.common.progress import watch
    from fallow.common.tables import Table
    from fallow.engine.engine import Engine
    from fallow.engine.stats import Stats
    from fallow.gpu.accelerate import accelerate
    from fallow.measure.evaluation import evaluate
    from fallow.measure.profiling import Profile, profile
    from fallow.measure.quality import Evaluation
    from fallow.optimization.optimizer import Optimized, optimize
    from fallow.packing.packer import pack
    from fallow.plan import Cut, Plan
    from fallow.reference.model import Model, load
    from fallow.reference.sparsified import densify, load_sparse, save_sparse, sparsify
    from fallow.reporting.page import report

# Found when first used: importing fallow needs no torch.
_PUBLIC = {
    "AdaptReport": "fallow.adaptation.adapter",
    "AdaptSettings": "fallow.adaptation.adapter",
    "Cut": "fallow.plan",
    "Engine": "fallow.engine.engine",
    "Evaluation": "fallow.measure.quality",
    "FallowError": "fallow.common.errors",
    "Model": "fallow.reference.model",
    "Optimized": "fallow.optimization.optimizer",
    "Plan": "fallow.plan",
    "Profile": "fallow.measure.profiling",
    "Row": "fallow.calibration.tradeoff",
    "Stats": "fallow.engine.stats",
    "Table": "fallow.common.tables",
    "Text": "fallow.checkpoints.text",
    "UsageError": "fallow.common.errors",
    "accelerate": "fallow.gpu.accelerate",
    "adapt": "fallow.adaptation.adapter",
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
    "watch": "fallow.common.progress",
}

__all__ = [
    "AdaptReport",
    "AdaptSettings",
    "Cut",
    "Engine",
    "Evaluation",
    "FallowError",
    "Model",
    "Optimized",
    "Plan",
    "Profile",
    "Row",
    "Stats",
    "Table",
    "Text",
    "UsageError",
    "accelerate",
    "adapt",
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
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        metadata = import_module("importlib.metadata")
        try:
            version = metadata.version("fallow")
        except metadata.PackageNotFoundError:  # it runs from its sources, without an installation
            version = "unknown"
        globals()[name] = version  # every plan has it
        return version
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fallow' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
