"""What the rules share that choose neurons by their gate alone, before up_proj is read."""

import numpy as np

from fallow.models.capture import Calibration
from fallow.models.devices import as_array

GATE_KNOWN = "after gate: saves up_proj and down_proj"


def gate_weights(calibration: Calibration) -> list[np.ndarray]:
    """E|up_i| ||down_proj[:, i]|| per layer, (d_ff,) float32; of a mixture (n_experts * d_ff,).

    E|up_i| is the calibration mean, so that |gate_act_i| times this is the norm to expect of a
    neuron's output when its gate is known.
    """
    return [
        mean * as_array(layer.down_norm).ravel()
        for mean, layer in zip(calibration.mean_up, calibration.layers, strict=True)
    ]
