"""Answers of one engine that are made at once."""

from collections.abc import Generator
from dataclasses import dataclass

from fallow import _core
from fallow.engine.answer import Answer, Piece, Read
from fallow.engine.engine import Engine
from fallow.engine.stats import Share


@dataclass(eq=False)
class Said:
    """What a round gave of an answer; if `ended` it was the last, because of an error or not."""

    answer: Answer
    pieces: list[Piece]
    ended: bool
    error: Exception | None = None


class Batch:
    """Answers in slots of one engine, which it makes in rounds.

    A round reads a token of every answer that is being said, up to `_core.FEW` of them in one pass
    over the weights, and a part of one of the prompts that wait, which take turns. What an answer
    says does not depend on those beside it, to the bit; a failure ends those alone that it is of.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What each answer needs read next; prompts in the order of their turns.
        self._reads: dict[Answer, Read] = {}
        self._steps: dict[Answer, Generator[Piece | Read]] = {}
        self._shares: dict[Answer, Share] = {}

    def add(self, answer: Answer) -> Said:
        """Takes an answer in, whose slot then holds nothing but what it shares with its prompt."""
        answer.counters = self._shares[answer] = Share()
        self._steps[answer] = answer.steps()
        return self._go_on(answer)

    def drop(self, answer: Answer) -> None:
        """Ends an answer that is not ended yet; its `stats` are those of what it said."""
        self._reads.pop(answer, None)
        self._steps.pop(answer).close()
        del self._shares[answer]

    def round(self) -> list[Said]:
        for answer in self._reads:
            answer.alone = len(self._reads) == 1
        said: list[Said] = []
        for reads in self._passes():
            answers = [read.answer for read in reads]
            try:
                self._engine.reset_stats()
                self._engine.read(reads)
                figures = self._engine.core_stats()
            except Exception as error:
                for answer in answers:
                    self.drop(answer)
                    said.append(Said(answer, [], True, error))
                continue
            for answer in answers:
                self._shares[answer].add(figures, len(answers))
                said.append(self._go_on(answer))
        return said

    def _passes(self) -> list[list[Read]]:
        """What is read in this round, of several answers at once where each needs one token."""
        reads = self._reads.values()
        single = [read for read in reads if len(read.ids) == 1 and not read.hidden]
        passes = []
        for lossless in (False, True):
            alike = [read for read in single if read.answer.lossless is lossless]
            passes += [alike[i : i + _core.FEW] for i in range(0, len(alike), _core.FEW)]
        longer = [read for read in reads if len(read.ids) > 1 or read.hidden]
        prompts = [read for read in longer if read.of_prompt]
        return passes + [[r] for r in longer if not r.of_prompt] + [[r] for r in prompts[:1]]

    def _go_on(self, answer: Answer) -> Said:
        """To what it needs read next, or to its end."""
        self._reads.pop(answer, None)  # it goes behind the others
        pieces: list[Piece] = []
        try:
            for step in self._steps[answer]:
                if isinstance(step, Read):
                    self._reads[answer] = step
                    return Said(answer, pieces, ended=False)
                pieces.append(step)
        except Exception as error:
            self.drop(answer)
            return Said(answer, pieces, True, error)
        self.drop(answer)
        return Said(answer, pieces, ended=True)
