"""A coarse copy of the language-model head that finds the few tokens worth exact logits.

Most of a vocabulary is never likely. The coarse copy is read whole; tokens whose coarse logit comes
within some nats of the largest get exact ones. As far as a token's probability matters, so does
its logit's exactness (the idea of arXiv:1806.00588 and of SVD-softmax, with few bits in place of
few dimensions).
"""

import numpy as np
import torch

from fallow.progress import progress

# Q4_0: blocks of 32 weights in 18 bytes, a half-precision scale and values -8 to 7.
GROUP, BLOCK_BYTES, LEVELS = 32, 18, 16
# A group's step, as a share of the one that reaches its largest weight: the least squared error
# of the four is taken.
STEPS = (0.7, 0.8, 0.9, 1.0)
DAMPING = 0.01  # of the inputs' mean variance, as in GPTQ's code
ROWS_AT_ONCE = 16384
COLUMNS_AT_ONCE = 64


def coarse_head(weight: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """A head (vocabulary, d_model) as bytes of Q4_0, (vocabulary, d_model / 32 * 18).

    Rounding goes column by column, the loudest input first, and what each column's rounding did
    to the logits is made up for by the columns still to come, as far as `moment`, E[h hᵀ]
    (d_model, d_model) of the hidden states, lets them (GPTQ, arXiv:2210.17323). On SmolLM2 that
    leaves a sixth of the divergence that rounding to nearest does.
    """
    second = torch.from_numpy(moment).double()
    second += DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    order = torch.argsort(-second.diagonal())
    inverse = torch.linalg.inv(second[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    parts = []
    with progress("coarse head", len(weight)) as ticker:
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = torch.from_numpy(weight[start : start + ROWS_AT_ONCE].astype(np.float32))
            scale = _steps(rows)
            parts.append(_encode(_round(rows, scale, factor, order), scale))
            ticker.advance(len(rows))
    return np.concatenate(parts)


def _steps(rows: torch.Tensor) -> torch.Tensor:
    """The step of each group, (n, d_model / 32), representable in half precision."""
    groups = rows.reshape(len(rows), -1, GROUP)
    # The largest weight by magnitude becomes -8, so that the step carries its sign, as in ggml.
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)) / -(LEVELS // 2)
    best = torch.full(largest.shape, torch.inf)
    chosen = largest
    for share in STEPS:
        step = (largest * share).half().float()
        error = (groups - _nearest(groups, step) * step).square().sum(dim=2, keepdim=True)
        chosen = torch.where(error < best, step, chosen)
        best = torch.minimum(error, best)
    return chosen[..., 0]


def _nearest(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(step == 0, 0.0, 1 / step)
    return (values * inverse).round().clamp(-(LEVELS // 2), LEVELS // 2 - 1)


def _round(
    rows: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Whole numbers -8 to 7, (n, d_model), in the columns' own order."""
    rest = rows[:, order]
    steps = scale.repeat_interleave(GROUP, dim=1)[:, order]
    rounded = torch.empty_like(rest)
    for start in range(0, rest.shape[1], COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, rest.shape[1])
        block = rest[:, start:end].T.contiguous()  # columns lie together
        errors = torch.empty_like(block)
        for j in range(end - start):
            step = steps[:, start + j]
            value = _nearest(block[j], step)
            rounded[:, start + j] = value
            row = factor[start + j, start + j : end]
            errors[j] = (block[j] - value * step) / row[0]
            block[j + 1 :] -= row[1:, None] * errors[j]
        rest[:, end:] -= errors.T @ factor[start:end, end:]
    restored = torch.empty_like(rounded)
    restored[:, order] = rounded
    return restored


def _encode(rounded: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Blocks of Q4_0: the scale, then 16 bytes of which each holds weights j and j + 16."""
    n = len(rounded)
    unsigned = (rounded + LEVELS // 2).to(torch.uint8).numpy().reshape(n, -1, 2, GROUP // 2)
    nibbles = unsigned[:, :, 0] | unsigned[:, :, 1] << 4
    halves = scale.numpy().astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate([halves, nibbles], axis=2).reshape(n, -1)
