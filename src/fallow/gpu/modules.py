"""Modules that take the places of a model's projections and FFNs, and read what is active.

Up to `TOKENS` tokens at once go through the operators; more, as in prefill, are computed densely
with the same values set to zero, as `fallow.sparsify` does it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fallow.gpu import ops


@dataclass(frozen=True)
class Limit:
    """A cut of one layer: scores |value| * weight up to a threshold are inactive."""

    threshold: float  # of a cut by threshold
    k: int | None  # of one by top-k: how many stay
    weight: torch.Tensor | None  # (width,) float32


class _Cut(nn.Module):
    """A `Limit` on the device."""

    threshold: torch.Tensor | None  # (1,), bits
    weight: torch.Tensor | None  # (width,)

    def __init__(self, limit: Limit, device: torch.device) -> None:
        super().__init__()
        self.k = -1 if limit.k is None else limit.k
        bits = None if limit.k is not None else threshold_bits([limit.threshold], device)
        self.register_buffer("threshold", bits, persistent=False)
        weight = None if limit.weight is None else limit.weight.to(device, torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def bits(self, value: torch.Tensor, counted: bool = False) -> torch.Tensor:
        """The threshold of value (B, width): (1,), or of a cut by top-k (B,); as bits.

        `counted`: `ops.gemv` made the value, and counted.
        """
        if self.threshold is not None:
            return self.threshold
        weight = None if self.weight is None else self.weight[None]
        return ops.thresholds(value, weight, self.k, counted)[0]

    def masked(self, value: torch.Tensor) -> torch.Tensor:
        """value (T, width) with zeros where it is inactive."""
        score = value.abs().float()
        if self.weight is not None:
            score = score * self.weight
        if self.k >= score.shape[1]:
            return value
        if self.threshold is None:
            return value * ~(score <= score.topk(self.k + 1).values[:, -1:])
        return value * ~(_bits(score) <= self.threshold)


def threshold_bits(thresholds: Sequence[float], device: torch.device) -> torch.Tensor:
    """Thresholds as the bits of float32, (n,) int32; -1, below all scores, for negative ones."""
    values = torch.tensor(thresholds, dtype=torch.float32)
    return torch.where(values < 0, -1, _bits(values.abs())).to(device)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


class SparseDown(nn.Module):
    """down_proj that reads only the columns of active neurons.

    y = Σ_i inter_i down_proj[:, i] over the i whose score is above the threshold.
    """

    def __init__(self, down_proj: nn.Linear, limit: Limit) -> None:
        super().__init__()
        weight = down_proj.weight
        self.cut = _Cut(limit, weight.device)
        self.weight_t = _frozen(weight.t())  # (d_ff, d_model)
        self.bias = down_proj.bias
        ops.prepare(weight.device)

    def forward(self, inter: torch.Tensor) -> torch.Tensor:
        shape, values = inter.shape, inter.reshape(-1, inter.shape[-1])
        if len(values) > ops.TOKENS:
            out = _times(self.cut.masked(values), self.weight_t, self.bias)
        else:
            values = values.contiguous()
            weight = None if self.cut.weight is None else self.cut.weight[None]
            out = ops.gather_sum(
                values, None, "none", weight, self.cut.bits(values)[None], self.weight_t,
                self.bias, [self.weight_t.shape[1]],
            )  # fmt: skip
        return out.reshape(*shape[:-1], -1)


class SparseFfn(nn.Module):
    """A gated FFN: the gate is read whole, up_proj and down_proj where it is active.

    y = Σ_i act(gate_proj x)_i (up_proj x)_i down_proj[:, i], over the i that `early` leaves active
    by their gate_act, less those that `late`, if given, leaves out by their inter.
    """

    def __init__(
        self,
        gate: tuple[torch.Tensor, torch.Tensor | None],
        up: tuple[torch.Tensor, torch.Tensor | None],
        down_proj: nn.Linear,
        act: str,
        early: Limit,
        late: Limit | None,
    ) -> None:
        super().__init__()
        device = down_proj.weight.device
        self.act = act
        self.early = _Cut(early, device)
        self.late = None if late is None else _Cut(late, device)
        self.gate_weight, self.gate_bias = _frozen(gate[0]), gate[1]  # (d_ff, d_model)
        self.up_weight, self.up_bias = _frozen(up[0]), up[1]
        self.down_weight_t = _frozen(down_proj.weight.t())  # (d_ff, d_model)
        self.down_bias = down_proj.bias
        ops.prepare(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, values = x.shape, x.reshape(-1, x.shape[-1])
        out = self._dense(values) if len(values) > ops.TOKENS else self._sparse(values)
        return out.reshape(shape)

    def _sparse(self, x: torch.Tensor) -> torch.Tensor:
        x, early, late = x.contiguous(), self.early, self.late
        counted = early.threshold is None
        gate_act = ops.gemv(x, self.gate_weight, self.gate_bias, self.act, counted, early.weight)
        inter = ops.gather_rows(
            x, self.up_weight, self.up_bias, gate_act, early.weight, early.bits(gate_act, counted),
            None if late is None else late.weight, None if late is None else late.threshold,
        )  # fmt: skip
        out = self.down_weight_t.shape[1]
        return ops.gather_sum(
            inter, None, "none", None, None, self.down_weight_t, self.down_bias, [out]
        )

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        gate_pre = functional.linear(x, self.gate_weight, self.gate_bias)
        gate_act = self.early.masked(ACTIVATIONS[self.act](gate_pre))
        inter = gate_act * functional.linear(x, self.up_weight, self.up_bias)
        if self.late is not None:
            inter = self.late.masked(inter)
        return _times(inter, self.down_weight_t, self.down_bias)


class SparseInputs(nn.Module):
    """Projections of one input that read only the columns of its active values.

    y_p = Σ_j x_j W_p[:, j] over the j that projection p's cut leaves; the outputs lie side by side.
    Cuts are all by threshold, or all by top-k with one k.
    """

    thresholds: torch.Tensor | None  # (P, 1), bits
    weights: torch.Tensor | None  # (P, in)
    bias: torch.Tensor | None  # (Σ out,)

    def __init__(self, projections: Sequence[nn.Linear], limits: Sequence[Limit]) -> None:
        super().__init__()
        device = projections[0].weight.device
        widths = [p.out_features for p in projections]
        self.ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        cuts = [_Cut(limit, device) for limit in limits]
        self.cuts = nn.ModuleList(cuts)
        self.k = -1 if limits[0].k is None else limits[0].k
        self.weight_t = _frozen(torch.cat([p.weight.t() for p in projections], 1))  # (in, Σ out)
        biases = [p.bias for p in projections]
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        self.register_buffer("bias", bias, persistent=False)
        found = [cut.threshold for cut in cuts if cut.threshold is not None]
        bits = torch.cat(found)[:, None] if found else None
        self.register_buffer("thresholds", bits, persistent=False)
        weights = [cut.weight for cut in cuts if cut.weight is not None]
        weight = torch.stack(weights) if weights else None
        self.register_buffer("weights", weight, persistent=False)
        ops.prepare(device)

    def forward(
        self, x: torch.Tensor, up: torch.Tensor | None = None, act: str = "none"
    ) -> torch.Tensor:
        """(..., Σ out) of x (..., in); with `up` the input is act(x) * up."""
        shape, values = x.shape, x.reshape(-1, x.shape[-1])
        if up is not None:
            up = up.reshape(-1, up.shape[-1])
        if len(values) > ops.TOKENS:
            out = self._dense(values if up is None else ACTIVATIONS[act](values) * up)
        else:
            out = self._sparse(values, up, act)
        return out.reshape(*shape[:-1], -1)

    def _sparse(self, x: torch.Tensor, up: torch.Tensor | None, act: str) -> torch.Tensor:
        thresholds = self.thresholds
        if thresholds is None:
            if up is not None:
                x, up = ACTIVATIONS[act](x) * up, None
            x = x.contiguous()
            thresholds = ops.thresholds(x, self._one_weight_each(x), self.k)
        return ops.gather_sum(
            x, up, act, self.weights, thresholds, self.weight_t, self.bias, self.ends
        )

    def _one_weight_each(self, x: torch.Tensor) -> torch.Tensor:
        if self.weights is not None:
            return self.weights
        return x.new_ones(len(self.ends), x.shape[1], dtype=torch.float32)

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.weight_t.tensor_split(self.ends[:-1], dim=1)
        outs = []
        for cut, part in zip(self.cuts, parts, strict=True):
            assert isinstance(cut, _Cut)
            outs.append(cut.masked(x) @ part)
        out = torch.cat(outs, 1)
        return out if self.bias is None else out + self.bias


class DenseInputs(nn.Module):
    """Projections of one input, read whole by one product; the outputs lie side by side."""

    bias: torch.Tensor | None

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        super().__init__()
        widths = [p.out_features for p in projections]
        self.ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        weights, biases = [p.weight for p in projections], [p.bias for p in projections]
        # A head's weight is the embeddings' too, and stays where it is.
        self.weight = weights[0] if len(weights) == 1 else _frozen(torch.cat(weights))
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., Σ out) of x (..., in)."""
        if x.numel() > x.shape[-1]:  # of several tokens a library's product is the faster one
            return functional.linear(x, self.weight, self.bias)
        out = ops.gemv(x.reshape(1, -1).contiguous(), self.weight, self.bias, "none")
        return out.reshape(*x.shape[:-1], -1)


class InputsFfn(nn.Module):
    """A gated FFN whose three projections read only active values of their inputs."""

    def __init__(self, gate_up: SparseInputs, down: SparseInputs, act: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = gate_up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(gate, up, self.act)


class Shared(nn.Module):
    """One of several projections of one input: the first computes all, the others take theirs."""

    def __init__(
        self, all_of_them: SparseInputs | DenseInputs, index: int, left: dict[int, torch.Tensor]
    ) -> None:
        super().__init__()
        self.inputs = all_of_them
        self.index, self.left = index, left

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.index == 0:
            parts = self.inputs(x).tensor_split(self.inputs.ends[:-1], dim=-1)
            self.left.update(enumerate(parts[1:], 1))
            return parts[0]
        return self.left.pop(self.index)


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous(), requires_grad=False)


def _times(value: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = value @ weight_t
    return out if bias is None else out + bias


# By the names that kernels know them by.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
