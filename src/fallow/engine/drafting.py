"""Guesses of the next tokens that cost nothing, for the lossless mode and for memory budgets.

A model reads a few tokens at once in less time than one by one, to the bit with the same logits;
where its weights come from the disk, in little more than one alone. Tokens guessed ahead are read
along; those that are not what the model then says are forgotten. What comes out is the model's own
text, whatever the guesses were.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

LONGEST = 4  # tokens of a suffix that is looked up
# A first opinion: of guesses after a suffix of 1 to 4 tokens that many hold, worth PRIOR guesses.
HOLDING = (0.2, 0.4, 0.6, 0.7)
PRIOR = 4.0
FADING = 0.98  # of what was counted, per guess: texts change
# Time of a pass of 1, 2, 3 ... tokens over that of one token, until TIMED passes of each are timed:
# Qwen2.5-1.5B, 2 threads with AVX-512.
PASS_COST = (1.0, 1.2, 1.7, 2.2, 2.8, 3.3)
STREAMED_COST = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7)  # where weights come from the disk
TIMED = 3


class Lookup:
    """Guesses that a text goes on as it did after the last occurrence of its longest suffix.

    Prompt lookup, with the number of tokens chosen by how often such guesses held in this text and
    by what a longer pass takes on this machine.
    """

    def __init__(self, ids: Sequence[int], pass_cost: Sequence[float] = PASS_COST) -> None:
        """`ids`: the text so far; `pass_cost`: of a pass, as of PASS_COST, until it is timed."""
        self._pass_cost = pass_cost
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where an n-gram last ended
        self._found = 0, 0  # length of the suffix, where its earlier occurrence ended
        self._held = [share * PRIOR for share in HOLDING]
        self._tried = [PRIOR] * LONGEST
        self._seconds: list[deque[float]] = [deque(maxlen=9) for _ in pass_cost]
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text's next token."""
        self._ids.append(int(token))
        self._found = 0, 0
        for n in range(1, min(LONGEST, len(self._ids)) + 1):
            suffix = tuple(self._ids[-n:])
            if suffix in self._ends:
                self._found = n, self._ends[suffix]
            self._ends[suffix] = len(self._ids)

    def propose(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where guessing would not pay."""
        n, end = self._found
        if n == 0:
            return []
        share = self._held[n - 1] / self._tried[n - 1]
        kept, best, length = 1.0, 1.0, 0
        expected = 1.0  # tokens of a pass
        for k in range(1, min(most, len(self._ids) - end, len(self._pass_cost) - 1) + 1):
            kept *= share
            expected += kept
            if expected / self._cost(k) > best:
                best, length = expected / self._cost(k), k
        return self._ids[end : end + length]

    def _cost(self, k: int) -> float:
        """Time of a pass with k guesses over that of one without."""
        one, more = self._seconds[0], self._seconds[k]
        if min(len(one), len(more)) < TIMED:
            return self._pass_cost[k]
        return median(more) / median(one)

    def learn(self, proposed: int, held: int, seconds: float) -> None:
        """Records that the first `held` of the tokens that `propose` just gave were right."""
        self._seconds[proposed].append(seconds)
        n = self._found[0] - 1
        if n < 0 or proposed == 0:
            return
        tried = held + (held < proposed)
        self._held[n] = self._held[n] * FADING**tried + held
        self._tried[n] = self._tried[n] * FADING**tried + tried
