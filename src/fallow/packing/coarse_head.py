"""A coarse copy of the language-model head that finds the few tokens worth exact logits.

Most of a vocabulary is never likely. The coarse copy is read whole; tokens whose coarse logit comes
within some nats of the largest get exact ones. As far as a token's probability matters, so does
its logit's exactness (the idea of arXiv:1806.00588 and of SVD-softmax, with few bits in place of
few dimensions).
"""

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.packing.gptq import MomentFactor, compensated

CODES = 4  # of two bits; a weight is scale * (code - 1.5)
# A row's scale, as a share of its root mean square: the least squared error of these is taken. For
# a Gaussian it is 0.996 (Max, IRE Transactions on Information Theory 6, 1960, table II).
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1)
DAMPING = 0.01  # of the inputs' mean variance, as in GPTQ's code
ROWS_AT_ONCE = 16384


def coarse_head(
    weight: np.ndarray, moment: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A head (vocabulary, d_model) in two bits, (vocabulary, d_model / 4 + 4) bytes, and its bias.

    A row's codes and its scale lie as csrc/formats/two_bits.h describes. Rounding errors are made
    up for as far as `moment`, E[h hᵀ] (d_model, d_model) of the hidden states, lets them
    (fallow.packing.gptq). The bias (vocabulary,) is what the logits of `mean`, E[h] (d_model,), are
    then short of.
    """
    factor = _factor(torch.from_numpy(moment))
    parts, biases = [], []
    with progress("coarse head", len(weight)) as ticker:
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = torch.from_numpy(weight[start : start + ROWS_AT_ONCE].astype(np.float32))
            parts.append(_rounded(rows, factor))
            error = rows - decode_rows(parts[-1])
            biases.append((error @ torch.from_numpy(mean)).numpy())
            ticker.advance(len(rows))
    return np.concatenate(parts), np.concatenate(biases)


def coarse_rows(weight: torch.Tensor, moment: torch.Tensor) -> np.ndarray:
    """Rows (n, d_model) in two bits, (n, d_model / 4 + 4) bytes, rounded as the head's are."""
    return _rounded(weight, _factor(moment))


def decode_rows(rows: np.ndarray) -> torch.Tensor:
    """What rows in two bits stand for, (n, d_model) float32."""
    packed, scale = rows[:, :-4], np.ascontiguousarray(rows[:, -4:]).view(np.float32)
    codes = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _value(torch.from_numpy(codes).float(), torch.from_numpy(scale))


def _factor(moment: torch.Tensor) -> MomentFactor:
    return MomentFactor.from_moment(moment.double(), DAMPING)


def _rounded(rows: torch.Tensor, factor: MomentFactor) -> np.ndarray:
    scale = _scales(rows)
    return _encode(_round(rows, scale, factor), scale)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """The scale of each row, (n,)."""
    mean = rows.square().mean(dim=1).sqrt()
    scales = torch.stack([share * mean for share in SCALES])
    errors = [(rows - _value(_codes(rows, s[:, None]), s[:, None])).square().sum(1) for s in scales]
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def _codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The code nearest to each value, 0 to 3."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (values * inverse + (CODES - 1) / 2).round().clamp(0, CODES - 1)


def _value(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes - (CODES - 1) / 2) * scale


def _round(rows: torch.Tensor, scale: torch.Tensor, factor: MomentFactor) -> torch.Tensor:
    """Codes (n, d_model)."""
    values = compensated(
        rows.T.contiguous(),  # an input's weights lie together
        factor,
        lambda _, column: _value(_codes(column, scale), scale),
    )
    return _codes(values.T, scale[:, None])


def _encode(codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Bytes of which each holds the codes of one column of each quarter, then the scale."""
    n = len(codes)
    parts = codes.to(torch.uint8).numpy().reshape(n, 4, -1)
    packed = parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6
    return np.concatenate([packed, scale.numpy()[:, None].view(np.uint8)], axis=1)
