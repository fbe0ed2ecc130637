"""Thresholds published with arXiv:2412.12178, as plans."""

import re
from pathlib import Path

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.common.files import parse_json
from fallow.plan import Cut, Plan
from fallow.reference.model import Model
from fallow.rules.percentile import Percentile, percentile_taps

# The published thresholds were calibrated on the canonical WikiText-2 raw test text; evaluating on
# it is leakage and is refused like any other (docs/methods.md, "Leakage").
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
# The smallest hashes of its `Text.sketch`, so that it is found with other line breaks too.
WIKITEXT2_TEST_SKETCH = np.array(
    [
        0x19db70d8169e, 0x2bc53c3e1b13, 0x3e75b9477d32, 0x50ca20dffcaf, 0x5ce6d4851396,
        0x7bf4135a3c44, 0x7dd0eea90284, 0x91d87867d1b2, 0x9a7188514d65, 0xd8b13d6be7d4,
        0xfe4c306d82b3, 0x116184c34fba7, 0x11fac510f615b, 0x125dd023100af, 0x12ebf27626ee0,
        0x13fa27f0c5278, 0x144719be5c222, 0x145aee7595d85, 0x16b1a70399249, 0x17497d99f1c38,
        0x179e3ae86461c, 0x1863671c11170, 0x1b887b231af7e, 0x1d27013d61cfa,
    ],
    dtype=np.uint64,
)  # fmt: skip

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
    expected = percentile_taps(model.layers[0])
    if set(found) != set(expected) or any(len(v) != len(model.layers) for v in found.values()):
        raise FallowError(
            f"{path} has {', '.join(f'{t} ({len(v)} layers)' for t, v in found.items())}, "
            f"{model.name} needs {', '.join(expected)} ({len(model.layers)} layers)"
        )
    knob = _knob_from_name(path) if knob is None else knob
    return Plan(
        model=model.name,
        fingerprint=model.fingerprint,
        rule=Percentile.name,
        knob=knob,
        knob_name=Percentile.knob_name,
        cuts=tuple(Cut(tap, "threshold", np.array(v)) for tap, v in found.items()),
        target_sparsity=knob,
        dtype=model.dtype_name,
        calibration_text=f"WikiText-2 raw test, by the authors ({path.name})",
        calibration_sha256=WIKITEXT2_TEST_SHA256,
        calibration_sketch=WIKITEXT2_TEST_SKETCH,
    )


def _knob_from_name(path: Path) -> float:
    match = re.search(r"_(\d{1,2})$", path.stem)
    if match is None:
        raise UsageError(f"the name {path.name} does not end in a percentile; give --knob")
    return int(match.group(1)) / 100
