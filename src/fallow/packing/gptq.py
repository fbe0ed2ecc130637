"""Rounding weights one input at a time, the inputs not yet rounded compensating for the error.

y = x W for inputs x with E[x xᵀ] = M. When row j of W is rounded, the rows after it are changed to
undo the error in y as far as their inputs correlate with input j (GPTQ, arXiv:2210.17323; inputs
with the largest second moment first, as in its code).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch

INPUTS_AT_ONCE = 128


@dataclass(frozen=True)
class MomentFactor:
    """What the rounding needs to know of the inputs.

    `order` (n,) sorts them by loudness; `factor` (n, n) is upper triangular, and factorᵀ factor the
    inverse of M in that order.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def from_moment(cls, moment: torch.Tensor, damping: float) -> Self:
        """Of M (n, n), to whose diagonal `damping` times its mean is added."""
        diagonal = moment.diagonal()
        order = torch.argsort(-diagonal)
        damped = moment[order][:, order]
        damped.diagonal().add_(damping * diagonal.mean().clamp_min(1e-30))
        # M = U Uᵀ, U upper triangular: with both axes turned round, an ordinary Cholesky factor.
        upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        eye = torch.eye(len(upper), dtype=upper.dtype)
        return cls(order, torch.linalg.solve_triangular(upper, eye, upper=True).float())


def compensated(
    weight: torch.Tensor, moment: MomentFactor, rounded: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """W (inputs, outputs) rounded; `rounded(j, row)` gives row j's (outputs,) nearest values."""
    rest, found = weight[moment.order], torch.empty_like(weight)
    for start in range(0, len(rest), INPUTS_AT_ONCE):
        end = min(start + INPUTS_AT_ONCE, len(rest))
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        for i, row in enumerate(moment.factor[start:end, start:end]):
            j = int(moment.order[start + i])
            found[j] = rounded(j, block[i])
            errors[i] = (block[i] - found[j]) / row[i]
            block[i + 1 :] -= row[i + 1 :, None] * errors[i]
        rest[end:] -= moment.factor[start:end, end:].T @ errors
    return found
