"""From logits to tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.engine.grammar import Grammar
from fallow.engine.stats import Activity

# Ranges of sampling options. Those of penalties and biases are OpenAI's; beyond that of
# repeat_penalty nothing but the order of tokens would be left of float32 logits.
REPEAT_PENALTIES = (0.1, 10)
LARGEST_PENALTY = 2
LARGEST_BIAS = 100


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer. Log-probabilities are the model's own, before any sampling option."""

    id: int
    logprob: float | None = 0.0  # nats; None: nothing is before it
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and theirs
    activity: Activity | None = None  # where it was asked for


@dataclass
class Sampler:
    """Picks the next token of an answer.

    First the logits are changed: where a token is in the prompt or the answer, its logit l becomes
    l / repeat_penalty, or l * repeat_penalty below 0 (arXiv:1909.05858, as transformers has it),
    and where it is c times in the answer, frequency_penalty * c + presence_penalty is taken off, as
    OpenAI's API has it; then logit_bias is added, and what the grammar does not allow is left out.
    Filters then apply in the order top_k, top_p, min_p.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this probability
    top_k: int = 0  # that many tokens; 0: all
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    seed: int = 0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # of token ids
    grammar: Grammar | None = None  # the form of the answer; this sampler's own
    _changes: "_Changes | None" = field(default=None, init=False, repr=False)

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
        low, high = REPEAT_PENALTIES
        if not low <= self.repeat_penalty <= high:
            raise UsageError(f"repeat_penalty {self.repeat_penalty:g} is outside [{low}, {high}]")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST_PENALTY:
                raise UsageError(
                    f"{name} {getattr(self, name):g} is outside "
                    f"[-{LARGEST_PENALTY}, {LARGEST_PENALTY}]"
                )
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= LARGEST_BIAS:
                raise UsageError(
                    f"logit_bias {bias:g} of token {token} is outside "
                    f"[-{LARGEST_BIAS}, {LARGEST_BIAS}]"
                )
        self._random = np.random.default_rng(self.seed)

    def begin(self, prompt: Sequence[int] | np.ndarray, vocabulary_size: int) -> None:
        """An answer to a prompt (T,) begins: what was picked before is none of it.

        Raises:
            UsageError: a token of logit_bias is outside the vocabulary.
        """
        if self.grammar is not None:
            self.grammar.begin()
        is_neutral = self.repeat_penalty == 1 and not self.presence_penalty
        if is_neutral and not self.frequency_penalty and not self.logit_bias:
            return
        self._changes = _Changes(self, prompt, vocabulary_size)

    def pick(self, logits: np.ndarray) -> int:
        """A token id from logits (vocabulary,), the next one of the answer.

        A logit of minus infinity is a token that is never picked.

        Raises:
            FallowError: NaN or infinity among them, or nothing but minus infinity.
            FormError: the grammar cannot be followed.
        """
        if self._changes is not None:
            logits = self._changes.made(logits)
        if self.grammar is not None:
            logits = self.grammar.masked(logits)
        token = self._drawn(logits)
        if self._changes is not None:
            self._changes.add(token)
        if self.grammar is not None:
            self.grammar.add(token)
        return token

    def _drawn(self, logits: np.ndarray) -> int:
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


class _Changes:
    """What penalties and biases make of logits: for a token the same work however long the answer.

    Raises:
        UsageError: a token of logit_bias is outside the vocabulary.
    """

    def __init__(
        self, sampler: Sampler, prompt: Sequence[int] | np.ndarray, vocabulary_size: int
    ) -> None:
        self._sampler = sampler
        self._added = np.zeros(vocabulary_size, dtype=np.float32)
        for token, bias in sampler.logit_bias.items():
            if not 0 <= token < vocabulary_size:
                raise UsageError(
                    f"logit_bias: token id {token} is outside the vocabulary of {vocabulary_size}"
                )
            self._added[token] = bias
        self._answered = np.zeros(vocabulary_size, dtype=bool)
        self._seen = np.zeros(vocabulary_size, dtype=bool)  # in the prompt, too
        self._seen[np.asarray(prompt, dtype=np.int64)] = True

    def made(self, logits: np.ndarray) -> np.ndarray:
        factor = np.float32(self._sampler.repeat_penalty)
        if factor != 1:
            penalised = np.where(logits > 0, logits / factor, logits * factor)
            logits = np.where(self._seen, penalised, logits)
        return logits + self._added

    def add(self, token: int) -> None:
        self._added[token] -= self._sampler.frequency_penalty
        if not self._answered[token]:
            self._added[token] -= self._sampler.presence_penalty
        self._answered[token] = self._seen[token] = True


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
