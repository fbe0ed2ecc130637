"""A figure of a curve, its law with a band, and its rivals."""

from pathlib import Path

import numpy as np

from fallow.common.files import atomic_path
from fallow.laws.curves import TOKENS, Curve
from fallow.laws.fitting import LawFit
from fallow.laws.forms import FORMS


def draw(curves: list[Curve], laws: list[LawFit], path: str | Path) -> None:
    """Data, fit with its 95 % band, and rivals; one column per curve.

    Raises:
        FallowError: the file cannot be written.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(curves), figsize=(6 * len(curves), 4.5), layout="constrained", squeeze=False
    )
    for axis, curve, law in zip(axes[0], curves, laws, strict=True):
        used = curve.without_first(law.dropped)
        axis.plot(curve.x, curve.ratio, "o", color="0.6", markersize=4, label="dropped")
        axis.plot(used.x, used.ratio, "o", color="black", markersize=4, label=curve.name)
        x = np.array(law.band_x)
        for rival in law.rivals[1:]:
            values = FORMS[rival.form].values(rival.params, x)
            axis.plot(x, values, "--", linewidth=1, label=rival.form)
        axis.fill_between(x, *np.array(law.band).T, color="C0", alpha=0.25)
        axis.plot(x, FORMS[law.form].values(law.params, x), color="C0", label=law.form)
        axis.set_xscale("log")
        axis.set_xlabel("1e9 tokens" if curve.kind == TOKENS else "d_model / layers")
        axis.set_ylabel("activation ratio")
        margin = 0.3 * (used.ratio.max() - used.ratio.min()) + 1e-6
        axis.set_ylim(used.ratio.min() - 2 * margin, used.ratio.max() + margin)
        axis.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
