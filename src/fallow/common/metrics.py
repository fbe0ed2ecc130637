"""Numbers from numbers: no models, no files. numpy only."""

import math
from functools import cache

import numpy as np

from fallow import _core


@cache
def bin_edges() -> np.ndarray:
    """Lower edges of the magnitude histogram's bins and the last upper edge, (bins + 1,) float64.

    1024 bins per octave from 2^-64 to 2^32; a bin's lower edge belongs to it.
    """
    position = np.arange(_core.HISTOGRAM_BINS + 1)
    octave, step = np.divmod(position, _core.HISTOGRAM_BINS_PER_OCTAVE)
    edges = np.ldexp(
        1 + step / _core.HISTOGRAM_BINS_PER_OCTAVE, octave + _core.HISTOGRAM_MIN_EXPONENT
    )
    edges[0] = 0.0  # the first bin takes everything below
    return edges


def histogram_quantile(counts: np.ndarray, q: float) -> float:
    """The q-th quantile (0..1) of magnitudes counted in log-spaced bins, (bins,).

    numpy's linear percentile: between the two neighbouring values, each known to its bin, so
    within 2^-10 of the exact quantile, relatively. The quantile 0 is 0, not the smallest
    magnitude: a threshold at sparsity 0 leaves every non-zero value.
    """
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    if total == 0 or q <= 0:
        return 0.0
    rank = q * (total - 1)
    below, above = (_value_at(counts, cumulative, r) for r in (math.floor(rank), math.ceil(rank)))
    return below + (above - below) * (rank - math.floor(rank))


def _value_at(counts: np.ndarray, cumulative: np.ndarray, rank: int) -> float:
    """The value of a rank (0 is the smallest): values lie evenly in their bin."""
    # Of another type than the counts' a rank would be looked for in a copy of them, as float64.
    index = int(np.searchsorted(cumulative, cumulative.dtype.type(rank), side="right"))
    before = int(cumulative[index]) - int(counts[index])
    low, high = bin_edges()[index : index + 2]
    return float(low + (high - low) * (rank - before + 0.5) / int(counts[index]))


def perplexity(window_loss: np.ndarray) -> tuple[float, float | None]:
    """PPL and its standard error from the mean next-token loss of each window, (n,) nats.

    PPL = exp(mean over windows); docs/methods.md, "Perplexity". The error is PPL times
    `window_error` (delta method), None for a single window.
    """
    ppl = math.exp(float(np.mean(window_loss)))
    error = window_error(window_loss)
    return ppl, None if error is None else ppl * error


def ppl_change_percent(
    window_loss: np.ndarray, dense_window_loss: np.ndarray
) -> tuple[float, float | None]:
    """Change of PPL against dense in percent, and its *paired* standard error, both (n,) nats.

    The windows are the same on both sides, so the error is that of the mean difference: text that
    is hard for both cancels.
    """
    difference = np.asarray(window_loss) - np.asarray(dense_window_loss)
    ratio = math.exp(float(np.mean(difference)))
    error = window_error(difference)
    return 100 * (ratio - 1), None if error is None else 100 * ratio * error


def energy_recall(energy: np.ndarray, right: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The share of each token's energy in the right neurons that chosen ones among them have.

    Σ over right and chosen of energy_i / Σ over right of energy_i (docs/methods.md): for energies
    (T, d_ff), which are (|inter_i| ||down_proj[:, i]||)², and both sets (T, d_ff) bool. A share per
    token, since summed over tokens an attention sink's, thousands of times as large, would be all
    that counts. Tokens whose right neurons have none, say of a ReLU that is silent, are left out.
    """
    whole = (energy * right).sum(axis=1, dtype=np.float64)
    found = (energy * (right & chosen)).sum(axis=1, dtype=np.float64)
    return energy_shares(found, whole)


def energy_shares(found: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The same from each token's sums (T,): of the right neurons that were chosen, and of all."""
    return found[whole > 0] / whole[whole > 0]


# Windows from which on what neighbours have in common can be told from chance: of 20 independent
# ones the correlation is 0 ± 0.22. Near 1 it says no more than that there are too few.
CORRELATED_FROM, MOST_CORRELATED = 20, 0.95


def window_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of a text's successive windows, (n,); None if n < 2.

    Neighbouring windows are often of one document, hence alike (docs/methods.md, "Errors"). From
    CORRELATED_FROM windows on, n of them count as n (1 - r) / (1 + r) independent ones, where r is
    the correlation of neighbours as far as it is above 0, without the bias of a short series
    (Marriott, Pope, Biometrika 41, 1954): right where it falls by r from window to window.
    """
    values = np.asarray(values, dtype=np.float64)
    error, n = standard_error(values), values.size
    if not error or n < CORRELATED_FROM:
        return error
    deviation = values - values.mean()
    found = float(deviation[1:] @ deviation[:-1] / (deviation @ deviation))
    r = min(max((n * found + 1) / (n - 3), 0.0), MOST_CORRELATED)
    return error * math.sqrt((1 + r) / (1 - r))


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values (n,); None if n < 2."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return None
    return float(values.std(ddof=1) / math.sqrt(values.size))
