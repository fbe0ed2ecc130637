"""From logits to tokens."""

from dataclasses import dataclass

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.engine.stats import Activity


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer. Log-probabilities are the model's own, before any sampling option."""

    id: int
    logprob: float | None = 0.0  # nats; None: nothing is before it
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and theirs
    activity: Activity | None = None  # where it was asked for


@dataclass
class Sampler:
    """Picks the next token. Filters apply in the order top_k, top_p, min_p."""

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this probability
    top_k: int = 0  # that many tokens; 0: all
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature:g} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p:g} is outside (0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} must be at least 0")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p:g} is outside [0, 1]")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} must be at least 0")
        self._random = np.random.default_rng(self.seed)

    def pick(self, logits: np.ndarray) -> int:
        """A token id from logits (vocabulary,).

        A logit of minus infinity is a token that is never picked.

        Raises:
            FallowError: NaN or infinity among them, or nothing but minus infinity.
        """
        best = int(np.argmax(logits))  # NaN counts as the largest
        check_largest(logits[best])
        if self.temperature == 0:
            return best
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        below = logits[order].astype(np.float64) - logits[best]
        with np.errstate(over="ignore"):  # at tiny temperatures, where only the best is left
            p = np.exp(below / self.temperature)
        p /= p.sum()
        keep = max(1, int(np.searchsorted(np.cumsum(p), self.top_p)) + 1)
        keep = min(keep, max(1, int((p >= self.min_p * p[0]).sum())))
        p = p[:keep] / p[:keep].sum()
        return int(self._random.choice(order[:keep], p=p))


def choice_of(
    token: int, logits: np.ndarray, top: int | None, activity: Activity | None = None
) -> TokenChoice:
    """A token with its log-probability, and the `top` likeliest tokens with theirs."""
    if top is None:
        return TokenChoice(token, activity=activity)
    row = logits.astype(np.float64)
    check_largest(row.max())
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best = np.argsort(-row, kind="stable")[:top]
    likeliest = tuple((int(i), float(row[i])) for i in best)
    return TokenChoice(token, float(row[token]), likeliest, activity)


def check_largest(logits: np.ndarray) -> None:
    """Raises FallowError where the largest logit of a token is none to compute with."""
    if np.isnan(logits).any():
        raise FallowError("the model's logits are NaN; check the file with: fallow evaluate")
    if np.isinf(logits).any():
        raise FallowError("the model's logits are infinite; check the file with: fallow evaluate")
