"""Thresholds published with P1, as plans."""

import re
from pathlib import Path

import numpy as np

from fallow.errors import FallowError, UsageError
from fallow.files import parse_json
from fallow.model import Model
from fallow.plan import Plan
from fallow.rules import find_rule

# The published thresholds were calibrated on the canonical WikiText-2 raw test text; evaluating on
# it is leakage and is refused like any other (METHODS 2.5).
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"

# Keys of the files against taps. `act_fn` and `activation_fn` are calibrated but never applied.
_TAPS = {
    "gate_proj": "gate_pre",
    "gate_up_proj": "gate_pre",
    "up_proj": "up",
    "down_proj": "ffn_out",
}


def import_thresholds(path: str | Path, model: Model, knob: float | None = None) -> Plan:
    """A percentile plan from a published file ({projection: {"layer_0": threshold}}).

    `knob`, the percentile / 100, is read off a name such as mistral-7b_50.json if not given.

    Raises:
        FallowError: not such a file, or one for another shape of model.
        UsageError: the percentile is not given and not in the name.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_bytes())
        found = {
            _TAPS[name]: [float(layers[f"layer_{i}"]) for i in range(len(layers))]
            for name, layers in content.items()
            if name in _TAPS
        }
        largest = float(np.finfo(np.float32).max)
        if not all(0 <= v <= largest for values in found.values() for v in values):
            raise ValueError
    except OSError as error:
        raise FallowError(f"cannot read thresholds {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FallowError(
            f"{path} is no threshold file: expected {{projection: {{layer_0: number, ...}}}}"
        ) from error
    rule = find_rule("percentile")
    expected = rule.cuts(model.layers[0])
    if set(found) != set(expected) or any(len(v) != len(model.layers) for v in found.values()):
        raise FallowError(
            f"{path} has {', '.join(f'{t} ({len(v)} layers)' for t, v in found.items())}, "
            f"{model.name} needs {', '.join(expected)} ({len(model.layers)} layers)"
        )
    knob = _knob_from_name(path) if knob is None else knob
    return Plan(
        model=model.name,
        fingerprint=model.fingerprint,
        rule=rule.name,
        where=rule.where,
        knob=knob,
        knob_name=rule.knob_name,
        arrays={f"threshold.{tap}": np.array(v, dtype=np.float32) for tap, v in found.items()},
        target_sparsity=knob,
        dtype=model.dtype_name,
        calibration_text=f"WikiText-2 raw test, by the authors ({path.name})",
        calibration_sha256=WIKITEXT2_TEST_SHA256,
    )


def _knob_from_name(path: Path) -> float:
    match = re.search(r"_(\d{1,2})$", path.stem)
    if match is None:
        raise UsageError(f"the name {path.name} does not end in a percentile; give --knob")
    return int(match.group(1)) / 100
