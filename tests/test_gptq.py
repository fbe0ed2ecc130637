"""Rounding that later inputs make up for."""

import torch

from fallow.packing.gptq import INPUTS_AT_ONCE, MomentFactor, compensated

N, OUTPUTS = INPUTS_AT_ONCE + 30, 5  # more than one block


def moment_of(n: int) -> torch.Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(0)).double()
    mix = 0.3 * torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    x = x @ (torch.eye(n) + mix).double()
    return x.T @ x / len(x)


def error(moment: torch.Tensor, difference: torch.Tensor) -> float:
    return float(torch.einsum("io,ij,jo->", difference, moment, difference))


def test_others_make_up_for_one_rounded_input_as_least_squares_would() -> None:
    moment = moment_of(N)
    weight = torch.randn(N, OUTPUTS, generator=torch.Generator().manual_seed(2))
    first = int(moment.diagonal().argmax())  # the loudest
    factor = MomentFactor.from_moment(moment, 0.0)
    found = compensated(weight, factor, lambda j, row: row.round() if j == first else row)
    off = (found - weight)[first]
    others = [j for j in range(N) if j != first]
    best = -torch.linalg.solve(
        moment[others][:, others], moment[others, first][:, None] * off.double()
    )
    torch.testing.assert_close((found - weight)[others].double(), best, rtol=1e-3, atol=1e-4)


def test_errors_cancel_on_correlated_inputs() -> None:
    moment = moment_of(N)
    weight = torch.randn(N, OUTPUTS, generator=torch.Generator().manual_seed(3))
    factor = MomentFactor.from_moment(moment, 0.01)
    found = compensated(weight, factor, lambda _, row: row.round())
    torch.testing.assert_close(found, found.round())
    plain = error(moment, weight.round().double() - weight)
    assert error(moment, found.double() - weight) < 0.5 * plain


def test_independent_inputs_are_rounded_alone() -> None:
    weight = torch.randn(N, OUTPUTS, generator=torch.Generator().manual_seed(4))
    factor = MomentFactor.from_moment(torch.eye(N).double(), 0.1)
    assert torch.equal(compensated(weight, factor, lambda _, row: row.round()), weight.round())
