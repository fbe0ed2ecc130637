"""A neuron in one sentence, by a language model, and how well the sentence predicts the neuron.

After Bills et al. (2023), "Language models can explain neurons in language models": the model
reads strongly activating snippets and writes an explanation; from that alone it then predicts an
activation for each token of snippets that were held out, and the score is the correlation of
predicted and true ("ev correlation scoring"). Activations are out_norm over the neuron's largest,
0 to 10.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.files import parse_json
from fallow.common.progress import progress
from fallow.reporting.neurons import Neuron, Snippet

SHOWN = 5  # snippets that the explanation is made of
HELD_OUT = 5  # strong ones that it is scored on, and as many random ones
STRONG, RANDOM = SHOWN + HELD_OUT, HELD_OUT  # what `fallow.reporting.neurons.examine` must find
HIGHEST = 10.0
LEAST_PREDICTED = 0.5  # share of the tokens that must have a prediction for a score
TIMEOUT = 300  # seconds for one answer, which a model on two cores may need
LARGEST_ANSWER = 1 << 22  # bytes
LONGEST_LINE = 200  # characters: of what a model says of one token
KEY_VARIABLES = ("FALLOW_API_KEY", "OPENAI_API_KEY")

_EXPLAIN = """A neuron of a language model is active on some tokens and not on others. Below are \
pieces of text, one token per line with the neuron's activation from 0 (none) to 10 (most).

{snippets}

What does this neuron look for? Answer with one short sentence and nothing else."""

_SIMULATE = """A neuron of a language model looks for this: {explanation}

Predict its activation on each token of the text below, from 0 (none) to 10 (most). Most tokens of \
a text have 0. Here are the text's {count} tokens, numbered:

{tokens}

Answer with {count} lines and nothing else. Each line is a token's number, a tab, and its \
activation."""


@dataclass
class Explanation:
    """A sentence about a neuron and its score; one of `score` and `reason` is None."""

    text: str
    model: str
    score: float | None  # Pearson correlation of predicted and true activations
    reason: str | None  # why there is no score
    shown_snippets: int
    held_out_snippets: int
    scored_snippets: int  # those for which the answer had activations
    scored_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Endpoint:
    """A server of OpenAI's API: POST url/chat/completions."""

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        """Raises UsageError for what is no http or https address."""
        if not re.match(r"https?://[^/]", url):
            raise UsageError(f"--explain {url} is no address such as http://127.0.0.1:8080/v1")
        self.model = model
        self._url = url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # A redirect would take the key elsewhere.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, question: str, max_tokens: int) -> str:
        """The answer to one message, at temperature 0.

        Raises:
            FallowError: the endpoint cannot be reached, refuses, or does not answer as OpenAI's.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        try:
            request = urllib.request.Request(
                self._url, json.dumps(body).encode(), self._headers, method="POST"
            )
            with self._opener.open(request, timeout=TIMEOUT) as response:
                content = response.read(LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            with error:
                reason = _error_message(error.read(LARGEST_ANSWER))
            raise FallowError(
                f"{self._url} refuses: {error.code} {reason or error.reason}; "
                f"check --explain, --explain-model and {' or '.join(KEY_VARIABLES)}"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = in_one_line(getattr(error, "reason", None) or error) or type(error).__name__
            raise FallowError(f"cannot reach {self._url}: {cause}; check --explain") from error
        try:
            return str(parse_json(content)["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as error:
            raise FallowError(
                f"{self._url} does not answer as OpenAI's chat/completions; check --explain"
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _error_message(content: bytes) -> str:
    """What an error's body says: {"error": {"message": ...}} or {"error": ...}."""
    try:
        error = parse_json(content)["error"]
    except (ValueError, LookupError, TypeError):
        return ""
    return in_one_line(error.get("message", "") if isinstance(error, dict) else error)


def key_from_environment() -> str | None:
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


def explain(neuron: Neuron, endpoint: Endpoint) -> Explanation:
    """Asks for an explanation and scores it by simulation.

    Every other one of the STRONG strongest is shown, so that those held out are as strong.

    Raises:
        FallowError: an answer fails, or the neuron has too few snippets to hold some out.
    """
    strong = neuron.snippets[:STRONG]
    shown = strong[::2]
    held_out = [*strong[1::2], *neuron.random_snippets[:RANDOM]]
    if not held_out:
        raise FallowError(
            f"{len(strong)} snippets are too few to hold some out; give more --text or --windows"
        )
    largest = max(max(strong[0].out_norm), 1e-30)
    pieces = [_with_activations(snippet, largest) for snippet in shown]
    answer = endpoint.ask(_EXPLAIN.format(snippets="\n\n".join(pieces)), max_tokens=100)
    text = _first_line(answer)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []  # true and predicted
    if text:
        with progress("simulate", len(held_out)) as ticker:
            for snippet in held_out:
                true = np.array(snippet.out_norm) * (HIGHEST / largest)
                pairs.append((true, _simulate(snippet, text, endpoint)))
                ticker.advance()
    score, reason = correlation(pairs) if text else (None, "the answer is empty")
    told = [int(np.isfinite(predicted).sum()) for _, predicted in pairs]
    return Explanation(
        text=text,
        model=endpoint.model,
        score=score,
        reason=reason,
        shown_snippets=len(shown),
        held_out_snippets=len(held_out),
        scored_snippets=sum(count > 0 for count in told),
        scored_tokens=sum(told),
    )


def _with_activations(snippet: Snippet, largest: float) -> str:
    return "\n".join(
        f"{_one_line(token)}\t{round(HIGHEST * value / largest)}"
        for token, value in zip(snippet.tokens, snippet.out_norm, strict=True)
    )


def _one_line(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)[1:-1]


def _simulate(snippet: Snippet, explanation: str, endpoint: Endpoint) -> np.ndarray:
    """Activations that the explanation lets the model expect, (T,); NaN where it says nothing."""
    count = len(snippet.tokens)
    tokens = "\n".join(f"{i}\t{_one_line(token)}" for i, token in enumerate(snippet.tokens, 1))
    question = _SIMULATE.format(explanation=explanation, count=count, tokens=tokens)
    return parse_activations(endpoint.ask(question, max_tokens=12 * count), count)


_NUMBER = r"-?\d+(?:\.\d+)?"
_START = r"[\s*|]*"  # of a line, in Markdown too


def parse_activations(answer: str, count: int) -> np.ndarray:
    """Activations (count,) from an answer; NaN where it has none, or none from 0 to 10.

    Understood are a JSON list of that many numbers, lines that begin with a token's number and end
    with its activation, and that many lines of one number each.
    """
    answer = _without_thoughts(answer)
    values = np.full(count, np.nan)
    numbered: dict[int, float] = {}
    bare: list[float] = []
    for line in (line for line in answer.splitlines() if len(line) <= LONGEST_LINE):
        if match := re.fullmatch(rf"{_START}(\d+)\b.*?(?<![\d.-])({_NUMBER})\W*", line):
            numbered.setdefault(int(match[1]), float(match[2]))
        elif match := re.fullmatch(rf"{_START}({_NUMBER})\W*", line):
            bare.append(float(match[1]))
    if (listed := _listed(answer, count)) is not None:
        values[:] = listed
    elif any(1 <= i <= count for i in numbered):
        for i, value in numbered.items():
            if 1 <= i <= count:
                values[i - 1] = value
    elif len(bare) == count:
        values[:] = bare
    values[(values < 0) | (values > HIGHEST)] = np.nan
    return values


def _listed(answer: str, count: int) -> list[float] | None:
    """The first JSON list of `count` numbers in an answer."""
    for match in re.finditer(r"\[[^\[\]]*\]", answer):
        try:
            found = parse_json(match[0])
        except ValueError:
            continue
        if len(found) == count and all(type(value) in (int, float) for value in found):
            return [float(value) for value in found]
    return None


def _without_thoughts(answer: str) -> str:
    """An answer without what models that think aloud put before it."""
    return answer.rpartition("</think>")[2]


def _first_line(answer: str) -> str:
    lines = (line.strip() for line in _without_thoughts(answer).splitlines())
    return next((line[:400] for line in lines if line), "")


def correlation(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float | None, str | None]:
    """Pearson correlation of true and predicted values of all snippets, or why there is none."""
    true, predicted = (np.concatenate(values) for values in zip(*pairs, strict=True))
    known = np.isfinite(predicted)
    if known.mean() < LEAST_PREDICTED:
        return None, f"answers had activations of {known.sum()} of {len(known)} tokens only"
    true, predicted = true[known], predicted[known]
    for name, values in (("predicted", predicted), ("true", true)):
        if np.ptp(values) == 0:
            return None, f"all {name} activations are the same"
    return float(np.corrcoef(true, predicted)[0, 1]), None
