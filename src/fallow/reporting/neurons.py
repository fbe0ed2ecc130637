"""What single neurons do: where they are active most, how often they fire, what they write.

A snippet is a token with the tokens around it. Of each neuron only its best are kept, so that
memory does not grow with the text.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.checkpoints.text import Text, load_text
from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.common.errors import UsageError
from fallow.common.progress import progress
from fallow.engine.answer import AnswerText
from fallow.engine.sampling import TokenChoice
from fallow.measure.profiling import TOP, WINDOWS, ZERO_OUT_NORM
from fallow.models.capture import non_finite_error
from fallow.models.cuts import per_token_topk
from fallow.models.devices import as_floats
from fallow.models.taps import Tap, attach
from fallow.reference.model import Model

BEFORE, AFTER = 20, 7  # tokens of a snippet besides the one it is about
LENGTH = BEFORE + 1 + AFTER
NEAREST = 10  # tokens that an output raises most, and as many that it lowers

Place = tuple[int, int]
"""(layer, neuron)"""


@dataclass(frozen=True)
class Snippet:
    """A token and its context, with what the neuron does on each token."""

    text: str
    start: int  # of its first token among those of the text's windows
    peak: int  # the token it is about, counted from `start`
    tokens: list[str]
    inter: list[float]
    out_norm: list[float]


@dataclass(frozen=True)
class Rate:
    """How often a neuron fires in one text."""

    text: str
    tokens: int
    top_half: float  # share of tokens in whose top half of neurons (by out_norm) it is
    natural: float  # share of tokens with out_norm >= 1e-7


@dataclass(frozen=True)
class NearestToken:
    """A token, and by how much the logit grows with each unit of inter."""

    token: str
    logit: float


@dataclass
class Neuron:
    """What `examine` found of a neuron."""

    model: str
    layer: int
    neuron: int
    down_norm: float
    rates: list[Rate]
    snippets: list[Snippet]  # strongest first; they do not overlap
    raised: list[NearestToken]
    lowered: list[NearestToken]
    random_snippets: list[Snippet] = field(default_factory=list)  # they overlap no other

    def to_json(self) -> dict[str, Any]:
        """All but the random snippets."""
        return {k: v for k, v in asdict(self).items() if k != "random_snippets"}


def examine(
    model: Model,
    places: Sequence[Place],
    texts: Sequence[str | Path | Text] | None = None,
    *,
    context: int = 1024,
    windows: int | None = None,
    snippets: int = 10,
    random_snippets: int = 0,
    seed: int = 0,
) -> list[Neuron]:
    """Looks at neurons of the dense model, (layer, neuron) each, in one pass over the texts.

    A window's first token counts for rates and heads no snippet: many neurons are loudest there,
    whatever the token is.

    Args:
        texts: each is a type of text with rates of its own; None: both halves of the default text.
        windows: how many of each text's windows, from the first; None: 8, or all of fewer.
        seed: of the random snippets.

    Raises:
        UsageError: a layer or neuron that the model lacks, or no snippet is asked for.
        FallowError: a text has fewer windows; NaN, naming tensor and layer; a mixture of experts.
    """
    model.layers[0].one_ffn()  # or it is refused
    for place in places:
        check_place(model, *place)
    if snippets < 1:
        raise UsageError(f"--snippets {snippets} is too few; give at least 1")
    sources = (
        [load_text(None, "calibration"), load_text(None, "evaluation")]
        if texts is None
        else [load_text(text, "evaluation") for text in texts]
    )
    cut = [model.windows(source, context, windows, at_most=WINDOWS) for source in sources]
    watched = {place: _Watch(snippets, random_snippets, seed) for place in places}
    seen: dict[Place, _Seen] = {}
    with (
        progress("neurons", sum(map(len, cut))) as ticker,
        attach(model.layers, {"inter": _recorder(model, watched, seen)}),
    ):
        for source, of_text in zip(sources, cut, strict=True):
            for number, window in enumerate(of_text):
                model.hidden(window[None])
                for place, watch in watched.items():
                    watch.add(source.name, number * len(window), window, seen[place])
                ticker.advance()
    return [_report(model, place, watch) for place, watch in watched.items()]


def check_place(model: Model, layer: int, neuron: int) -> None:
    """Raises UsageError if the model has no such layer or neuron."""
    _check_number("--layer", layer, len(model.layers), model)
    _check_number("--neuron", neuron, model.layers[layer].d_ff, model)


def _check_number(option: str, value: int, count: int, model: Model) -> None:
    if not 0 <= value < count:
        raise UsageError(f"{option} {value} is outside 0..{count - 1} of {model.name}")


@dataclass(frozen=True)
class _Seen:
    """One neuron in one window, (T,) each; of the last two how many tokens."""

    inter: np.ndarray
    out_norm: np.ndarray
    top_half: int
    natural: int


def _recorder(model: Model, places: Any, seen: dict[Place, _Seen]) -> Tap:
    """A tap on `inter` that leaves what the neurons did in a window in `seen`."""

    def keep(layer: int, value: torch.Tensor) -> None:
        here = [neuron for of_layer, neuron in places if of_layer == layer]
        if not here:
            return
        if not torch.isfinite(value).all():
            raise non_finite_error("inter", layer, int((~torch.isfinite(value)).sum()))
        out_norm = value.abs().float() * model.layers[layer].down_norm
        top, fires = out_norm > per_token_topk(out_norm, TOP), out_norm >= ZERO_OUT_NORM
        for neuron in here:
            seen[layer, neuron] = _Seen(
                as_floats(value[:, neuron]).copy(),
                as_floats(out_norm[:, neuron]).copy(),
                int(top[:, neuron].sum()),
                int(fires[:, neuron].sum()),
            )

    return keep


@dataclass(frozen=True)
class _Found:
    """A snippet before its tokens have become text."""

    text: str
    start: int
    peak: int
    ids: np.ndarray
    inter: np.ndarray
    out_norm: np.ndarray

    def overlaps(self, other: "_Found") -> bool:
        return self.text == other.text and (
            self.start < other.start + len(other.ids) and other.start < self.start + len(self.ids)
        )

    def read(self, tokenizer: TextTokenizer) -> Snippet:
        return Snippet(
            self.text,
            self.start,
            self.peak,
            token_texts(tokenizer, self.ids),
            self.inter.tolist(),
            self.out_norm.tolist(),
        )


class _Largest:
    """The `size` things of the largest values; of equal values those that came first."""

    def __init__(self, size: int) -> None:
        self._size, self._count = size, 0
        self._heap: list[tuple[float, int, _Found]] = []

    def offer(self, value: float, found: _Found) -> None:
        self._count += 1
        entry = (value, -self._count, found)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def sorted(self) -> list[_Found]:
        return [found for _, _, found in sorted(self._heap, reverse=True, key=lambda e: e[:2])]


class _Watch:
    """One neuron's counts, its strongest snippets and some random ones."""

    def __init__(self, snippets: int, random_snippets: int, seed: int) -> None:
        self._wanted, self._wanted_random = snippets, random_snippets
        # Each offer is of another LENGTH tokens of a window, so that a snippet that is chosen
        # overlaps those of two other offers at most.
        self._strongest = _Largest(3 * snippets)
        self._random = _Largest(random_snippets + 2 * snippets)
        self._generator = np.random.default_rng(seed)
        self._counts: dict[str, list[int]] = {}  # by text: tokens, in the top half, natural

    def add(self, text: str, start: int, window: np.ndarray, seen: _Seen) -> None:
        """A window of token ids (T,), the text's tokens from `start` on."""
        counts = self._counts.setdefault(text, [0, 0, 0])
        for i, count in enumerate((len(window), seen.top_half, seen.natural)):
            counts[i] += count

        def cut(first: int, peak: int, end: int) -> _Found:
            part = slice(first, min(end, len(window)))
            inter, out_norm = seen.inter[part], seen.out_norm[part]
            return _Found(text, start + first, peak - first, window[part], inter, out_norm)

        for first in range(1, len(window), LENGTH):
            peak = first + int(np.argmax(seen.out_norm[first : first + LENGTH]))
            around = cut(max(peak - BEFORE, 0), peak, peak + AFTER + 1)
            self._strongest.offer(float(seen.out_norm[peak]), around)
            self._random.offer(self._generator.random(), cut(first, peak, first + LENGTH))

    def rates(self) -> list[Rate]:
        return [Rate(text, n, top / n, fires / n) for text, (n, top, fires) in self._counts.items()]

    def choose(self) -> tuple[list[_Found], list[_Found]]:
        """The strongest snippets and random ones, none of which overlap."""
        strongest = _apart(self._strongest.sorted(), [], self._wanted)
        return strongest, _apart(self._random.sorted(), strongest, self._wanted_random)


def _apart(candidates: list[_Found], others: list[_Found], count: int) -> list[_Found]:
    """The first `count` candidates that overlap none of the others, nor each other."""
    chosen: list[_Found] = []
    for candidate in candidates:
        if len(chosen) < count and not any(candidate.overlaps(o) for o in (*others, *chosen)):
            chosen.append(candidate)
    return chosen


def _report(model: Model, place: Place, watch: _Watch) -> Neuron:
    layer, neuron = place
    strongest, random = watch.choose()
    raised, lowered = nearest_tokens(model, layer, neuron)
    return Neuron(
        model=model.name,
        layer=layer,
        neuron=neuron,
        down_norm=float(model.layers[layer].down_norm[neuron]),
        rates=watch.rates(),
        snippets=[found.read(model.tokenizer) for found in strongest],
        raised=raised,
        lowered=lowered,
        random_snippets=[found.read(model.tokenizer) for found in random],
    )


def nearest_tokens(
    model: Model, layer: int, neuron: int
) -> tuple[list[NearestToken], list[NearestToken]]:
    """The tokens that one unit of `inter` raises most, and those that it lowers most.

    head · down_proj[:, neuron], the plain product: later layers and norms are left out, the final
    one too, and where there is a norm behind the FFN (Gemma) also that.
    """
    column = model.layers[layer].down_proj.weight[:, neuron].detach().float()
    with_column, bias = model.logits(torch.stack([column, torch.zeros_like(column)]))
    effect = with_column - bias  # (vocabulary,)
    count = min(NEAREST, len(effect))
    found = []
    for largest in (True, False):
        values, ids = torch.topk(effect, count, largest=largest)
        texts = [token_text(model.tokenizer, i) for i in ids.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        found.append([NearestToken(text, value) for text, value in pairs])
    return found[0], found[1]


def token_texts(tokenizer: TextTokenizer, ids: np.ndarray | Sequence[int]) -> list[str]:
    """What each token (T,) adds to the text: (T,) strings.

    A character of several tokens stands at the last of them, the others are empty; control tokens
    have their names.
    """
    texts: list[str] = []
    text = AnswerText(tokenizer, ())
    for end, token_id in enumerate(map(int, ids), 1):
        added = text.add(TokenChoice(token_id), last=end == len(ids)).text
        if not added and not text.is_cut:
            added = tokenizer.backend.id_to_token(token_id) or ""
        texts.append(added)
    return texts


def token_text(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token as it continues a text; what is no text by itself, by its name in the vocabulary."""
    text = tokenizer.piece(token_id).decode("utf-8", "replace")
    if text and "\ufffd" not in text:
        return text
    return tokenizer.backend.id_to_token(token_id) or f"#{token_id}"
