"""The reference path off the CPU: torch's own operations against the core's."""

import numpy as np
import pytest
import torch

from fallow.models import cuts, devices

RNG = np.random.default_rng(11)


@pytest.fixture
def off_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of those on another device."""
    monkeypatch.setattr(devices, "on_cpu", lambda _: False)


def scores(rows: int, width: int) -> list[torch.Tensor]:
    """Distinct scores, many ties, some rows of zeros."""
    ties = RNG.integers(0, max(2, width // 2), (rows, width)).astype(np.float32) / 8
    ties[0] = 0
    plain = np.abs(RNG.standard_normal((rows, width))).astype(np.float32)
    return [torch.from_numpy(plain), torch.from_numpy(ties), torch.from_numpy(plain * (ties > 1))]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 333, 1537])
@pytest.mark.parametrize("kept", [0.0, 0.003, 0.5, 0.99, 1.0])
def test_topk_in_torch_is_the_cores(width: int, kept: float) -> None:
    for score in scores(6, width):
        expected = cuts.per_token_topk(score, kept)
        assert torch.equal(cuts._topk_in_torch(score, round(kept * width)), expected)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 333, 1537])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_tail_in_torch_is_the_cores(width: int, tau: float) -> None:
    for score in scores(6, width):
        assert torch.equal(cuts._tail_in_torch(score, tau), cuts.per_token_tail(score, tau))


def test_tiny_scores_have_a_tail_of_their_own() -> None:
    score = torch.tensor([[1e-45, 1e-45, 3e-45], [1e-30, 1e38, 0.0], [0.0, 0.0, 0.0]])
    for tau in (0.0, 0.5, 0.8, 1.0):
        assert torch.equal(cuts._tail_in_torch(score, tau), cuts.per_token_tail(score, tau))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_whole(off_cpu: None, bad: float) -> None:
    score = torch.tensor([[1.0, bad, 2.0], [1.0, 3.0, 2.0]])
    for kept in (0.0, 1 / 3, 1.0):
        assert cuts.per_token_topk(score, kept).isnan().flatten().tolist() == [True, False]
    assert cuts.per_token_tail(score, 0.5).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("way", ["core", "torch"])
def test_what_is_cut_is_a_constant_for_a_gradient(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda _: way == "core")
    value = torch.randn(5, 31, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.rand(31, requires_grad=True)
    for threshold_of in (cuts.per_token_topk, cuts.per_token_tail):
        score = value.abs() * weight
        threshold = threshold_of(score, 0.4)
        assert not threshold.requires_grad
        kept = cuts.zero_where(score <= threshold, value)
        (found,) = torch.autograd.grad(kept.sum(), value)
        assert torch.equal(found, (kept != 0).float())
        assert 0 < float(found.sum()) < 5 * 31
