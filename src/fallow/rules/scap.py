"""SCAP: magnitude thresholds on the FFN's inputs, more of them on those of down_proj."""

from typing import ClassVar

import numpy as np

from fallow.common.errors import UsageError
from fallow.models.capture import Calibration, input_histogram
from fallow.models.taps import Layer
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect, layer_quantiles


class Scap(Rule):
    """|x_j| of gate_proj and up_proj, |inter_i| of down_proj, against the layer's own quantiles.

    Without mode-centring, as published for models with a gate: a mode that is not 0 is taken off
    the values and its product with the weights added to the output, which no cut says. gate_proj
    and up_proj are `less` percentage points less sparse than down_proj: 20 is the published 35
    against 55 % of Llama-2-7B and one of Mistral-7B's, 40 the other.
    """

    name = "scap"
    paper = "arXiv:2412.07174"
    where = "input"
    knob_name = "quantile of |inter_i| per layer; that of gate_proj's and up_proj's inputs follows"
    known = "before each projection of the FFN: saves its columns"
    search = "knob"
    options: ClassVar[dict[str, int]] = {"less": 20}
    option_ranges: ClassVar[dict[str, range]] = {"less": range(101)}

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        """The knob that gives a sparsity of the FFN's inputs, weighted by parameters.

        Raises:
            UsageError: no knob does, as gate_proj and up_proj stay behind.
        """
        layer = calibration.layers[0]
        names = _names(layer)
        sizes = np.array([layer.projections[name].weight.numel() for name in names])

        def mean_sparsity(knob: float) -> float:
            return float(np.average([cls._quantile(name, knob) for name in names], weights=sizes))

        if sparsity > mean_sparsity(1):
            raise UsageError(
                f"rule {cls.name} reaches no sparsity above {mean_sparsity(1):.3f}: gate_proj and "
                f"up_proj stay {cls.options['less']} points behind down_proj; give a smaller less"
            )
        return bisect(mean_sparsity, sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        layer = calibration.layers[0]
        return [
            Cut(
                name,
                "threshold",
                layer_quantiles(
                    calibration, input_histogram(layer, name), cls._quantile(name, knob)
                ),
            )
            for name in _names(layer)
        ]

    @classmethod
    def _quantile(cls, projection: str, knob: float) -> float:
        less = 0 if projection == "down_proj" else cls.options["less"] / 100
        return max(0.0, knob - less)


def _names(layer: Layer) -> tuple[str, ...]:
    """The projections of an FFN. Raises FallowError for a mixture of experts."""
    layer.one_ffn()
    return (*layer.ffn_inputs, "down_proj")


RULE = Scap
