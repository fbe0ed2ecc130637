"""How many neurons each layer leaves out, when all together leave out a stated share."""

import numpy as np

BUDGETS = {
    "even": "the same share of each layer",
    "measured": "more of layers whose own cut changes the predictions less",
}
STEP = 0.01  # of a layer's neurons, at once


def measured_at(sparsity: float) -> np.ndarray:
    """Shares left out, (3,), at which every layer's cost is measured; budgets lie in between."""
    return np.array([sparsity / 2, sparsity, (1 + sparsity) / 2])


def allocate(costs: np.ndarray, sparsity: float) -> np.ndarray:
    """Shares left out, (L,), of mean `sparsity`, with the smallest sum of costs.

    Args:
        costs: (L, 3), of each layer alone at `measured_at`; in between their logarithms are taken
            as straight. Costs of layers are taken to add up: for SmolLM2 at 0.5 the KL of all
            layers is 1.2 times the sum of each one's.
    """
    levels, logs = measured_at(sparsity), np.log(np.maximum(costs, 1e-12))
    shares = np.full(len(costs), levels[0])

    def cost(i: int, share: float) -> float:
        return float(np.exp(np.interp(share, levels, logs[i])))

    left = sparsity * len(costs) - shares.sum()
    while left > 1e-9:
        step = min(STEP, left)
        prices = [
            cost(i, share + step) - cost(i, share) if share + step <= levels[-1] else np.inf
            for i, share in enumerate(shares)
        ]
        shares[int(np.argmin(prices))] += step
        left -= step
    return shares
