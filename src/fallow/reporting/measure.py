"""What a report shows of one model, part by part, as JSON values that are small enough to embed."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fallow.calibration.calibrator import calibrate
from fallow.calibration.tradeoff import Row, make_rows, plan_path, tradeoff
from fallow.checkpoints.catalog import find_model
from fallow.checkpoints.text import Text, check_no_leakage, load_text
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.measure.evaluation import evaluate
from fallow.measure.profiling import STORED_BINS_PER_OCTAVE, WINDOWS, Profile, profile
from fallow.patterns.similarity import agreement, jaccard, recording
from fallow.patterns.store import row_sizes, unpack_bits
from fallow.plan import Plan
from fallow.reference.model import Model, in_words, text_tensors
from fallow.reporting.neurons import examine, token_texts
from fallow.reporting.parts import Parts

EXAMPLE_RULE, EXAMPLE_PPL_INCREASE = "tail", 1.0  # the plan of a report without one, percent
CALIBRATION_WINDOWS, VALIDATION_WINDOWS = 8, 4
SAMPLE_TOKENS, COMPARED_TOKENS = 512, 64  # what is shown of longer texts
NEURON_GROUPS = 32  # rows of a pattern's heat map
RANKED = 200  # points of a curve over a layer's neurons
NEURON_SNIPPETS = 4
LEAST_SHARE = 1e-4  # octaves of magnitude with less of every layer's values are left out

SAMPLE = (
    "The old lighthouse keeper climbed the stairs for the last time. Below him the sea was calm, "
    "and the evening light lay on it like copper. He had kept a diary of 14,235 nights: storms, "
    "ships, birds that flew into the lamp.\n\n"
    "def mean(values):\n    return sum(values) / len(values)\n\n"
    "Tomorrow a computer would do his work, and it would not know what to write."
)
COMPARED = (
    "The cat sat quietly by the window and watched the rain fall on the empty street.",
    "The dog sat quietly by the window and watched the rain fall on the empty street.",
)


@dataclass(frozen=True)
class Request:
    """What a report is asked to show; `measure` works it out for one model."""

    text: Text
    calibration_text: Text
    context: int
    windows: int | None
    rules: tuple[str, ...]
    sparsities: tuple[float, ...]
    plans: tuple[Plan, ...]  # none: an example is calibrated
    sample: Text
    compare: tuple[str, str]


def check_request(request: Request) -> None:
    """Raises UsageError, or FallowError, for what needs no model to be seen wrong."""
    make_rows(request.rules, request.sparsities)
    text = request.calibration_text
    check_no_leakage(text.sha256, request.text, False, text.sketch)
    for plan in request.plans:
        check_no_leakage(plan.calibration_sha256, request.text, False, plan.calibration_sketch)
    if not all(text.strip() for text in request.compare):
        raise UsageError("--compare has an empty text; give two texts")


def measure(model: Model, request: Request, folder: Path) -> dict[str, Any]:
    """Every part of the report on a model, by name; finished ones come from the folder.

    Raises:
        UsageError: the folder holds parts of another model, text or setting.
        FallowError: the plan is of another model, a text is too short, or NaN.
    """
    return _Measurement(model, request, folder).run()


class _Measurement:
    def __init__(self, model: Model, request: Request, folder: Path) -> None:
        for plan in request.plans:
            model.taps(plan)
        text, context = request.text, request.context
        windows = len(model.windows(text, context, request.windows, at_most=WINDOWS))
        model.windows(request.calibration_text, context, windows)  # as many, for neurons
        self.model, self.request = model, replace(request, windows=windows)
        self.parts = Parts(
            folder,
            {
                "model": model.name,
                "fingerprint": model.fingerprint,
                "dtype": model.dtype_name,
                "context": request.context,
                "windows": windows,
                "text_sha256": request.text.sha256,
                "calibration_sha256": request.calibration_text.sha256,
            },
        )
        self.found: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        steps = list(self._steps())
        for name, settings, _ in steps:  # a folder of other settings is refused before the work
            self.found[name] = self.parts.load(name, settings)
        for name, settings, make in steps:
            if self.found[name] is None:
                self.found[name] = make()
                self.parts.save(name, settings, self.found[name])
        return self.found

    def _steps(self) -> Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]:
        """Name, settings besides those of all parts, and function of every part, in order."""
        r = self.request
        given: list[str | None] = [plan.sha256 for plan in r.plans] or [None]
        yield "card", {}, self._card
        yield "profile", {}, self._profile
        rows = {"rules": list(r.rules), "sparsities": list(r.sparsities), "format": 3}
        yield "tradeoff", rows, self._tradeoff
        for i, sha256 in enumerate(given):
            settings = {"plan": sha256, "format": 2}
            yield f"plan-{i + 1}" if i else "plan", settings, partial(self._plan, i)
        yield "sample", {"plan": given[0], "sample": r.sample.sha256}, self._sample
        yield "comparison", {"plan": given[0], "compare": list(r.compare)}, self._comparison
        yield "neurons", {}, self._neurons

    @cached_property
    def plan(self) -> Plan:
        """The first plan asked for, or one that is calibrated as an example."""
        if self.request.plans:
            return self.request.plans[0]
        path = self.parts.folder / "example.plan"
        if not path.exists():
            calibrate(
                self.model,
                EXAMPLE_RULE,
                max_ppl_increase=EXAMPLE_PPL_INCREASE,
                text=self.request.calibration_text,
                context=self.request.context,
                windows=CALIBRATION_WINDOWS,
                validation_windows=VALIDATION_WINDOWS,
            ).save(path)
        return Plan.load(path)

    def _card(self) -> dict[str, Any]:
        model, config = self.model, self.model.module.config
        weights = sum(p.numel() for p in model.module.parameters())
        ffn = sum(
            parameter.numel()
            for layer in model.layers
            for module in (*layer.ffn_inputs.values(), layer.down_proj)
            for parameter in module.parameters()
        )
        ffn_bytes, file_bytes = stored_bytes(model)
        return {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "architecture": model.architecture.model_type,
            "gated": model.layers[0].gated,
            "dtype": model.dtype_name,
            "layers": len(model.layers),
            "hidden_size": config.hidden_size,
            "intermediate_size": in_words(model.intermediate_sizes),
            "attention_heads": config.num_attention_heads,
            "vocabulary": model.vocabulary_size,
            "longest_context": config.max_position_embeddings,
            "weights": weights,
            "ffn_weights": ffn,
            "file_bytes": file_bytes,
            "ffn_bytes": ffn_bytes,
        }

    def _profile(self) -> dict[str, Any]:
        r = self.request
        found = profile(self.model, r.text, context=r.context, windows=r.windows)
        return summarise_profile(found)

    def _tradeoff(self) -> list[dict[str, Any]]:
        r = self.request
        rows = make_rows(r.rules, r.sparsities)
        table = tradeoff(
            self.model,
            rows,
            self.parts.folder / "tradeoff",
            calibration_text=r.calibration_text,
            text=r.text,
            context=r.context,
            windows=r.windows,
            calibration_windows=CALIBRATION_WINDOWS,
            validation_windows=VALIDATION_WINDOWS,
        )
        return [table[0], *(self._with_plan(*each) for each in zip(table[1:], rows, strict=True))]

    def _with_plan(self, found: dict[str, Any], row: Row) -> dict[str, Any]:
        """A line of the table, with the plan that it is of; rows of selectors have none."""
        path = plan_path(self.parts.folder / "tradeoff", row)
        return found | {"plan_sha256": Plan.load(path).sha256 if path.exists() else None}

    def _plan(self, i: int) -> dict[str, Any]:
        r, plan = self.request, self.request.plans[i] if i else self.plan
        result = evaluate(self.model, plan, r.text, context=r.context, windows=r.windows)
        return {
            **{k: v for k, v in plan.metadata.items() if k != "format"},
            "given": bool(r.plans),
            "where": plan.where,
            "plan_sha256": plan.sha256,
            "ppl_change_percent": result.ppl_change_percent,
            "ppl_change_se": result.ppl_change_se,
            "sparsity": result.achieved_sparsity,
            "per_layer": {
                tap: [{k: _digits(v) for k, v in layer.items()} for layer in layers]
                for tap, layers in result.sparsity_per_layer.items()
            },
        }

    def _sample(self) -> dict[str, Any]:
        """Active neurons of every token of the sample text under the plan, (L, T) as a share."""
        whole = self._ids(self.request.sample.content)
        ids = whole[: min(SAMPLE_TOKENS, self.request.context)]
        rows = self._patterns(ids)[0]
        active = np.stack(
            [row_sizes(r) / n for r, n in zip(rows, self.model.intermediate_sizes, strict=True)]
        )
        return {
            "text": self.request.sample.name,
            "all_tokens": len(whole),
            "tokens": token_texts(self.model.tokenizer, ids),
            "active": _rounded(active.T, 3),
        }

    def _comparison(self) -> dict[str, Any]:
        """Two texts: active share by group of neurons, and agreement of the tokens both have."""
        limit = min(COMPARED_TOKENS, self.request.context)
        ids = [self._ids(text)[:limit] for text in self.request.compare]
        patterns = self._patterns(*ids)
        widths = self.model.intermediate_sizes
        pairs = align(*ids)
        if len(pairs) == 0:
            raise FallowError("--compare: the texts have no tokens that could be compared")
        others = np.argwhere(np.eye(len(ids[0]), len(ids[1])) == 0)
        both = list(zip(*patterns, widths, strict=True))
        return {
            "texts": list(self.request.compare),
            "tokens": [token_texts(self.model.tokenizer, some) for some in ids],
            "groups": [
                [_groups(layer, width) for layer, width in zip(rows, widths, strict=True)]
                for rows in patterns
            ],
            "neurons": in_words(widths),
            "pairs": pairs.tolist(),
            "same": (ids[0][pairs[:, 0]] == ids[1][pairs[:, 1]]).tolist(),
            "agreement": [
                _rounded(agreement(a[pairs[:, 0]], b[pairs[:, 1]], n), 4) for a, b, n in both
            ],
            "jaccard": [_rounded(jaccard(a[pairs[:, 0]], b[pairs[:, 1]]), 4) for a, b, _ in both],
            # The agreement of tokens at different places of the two texts, which have little to do
            # with each other: what agreement is worth is what it is above this.
            "unrelated": [
                _rounded(agreement(a[others[:, 0]], b[others[:, 1]], n).mean(), 4)
                for a, b, n in both
                if len(others)
            ],
        }

    def _neurons(self) -> list[dict[str, Any]]:
        r, picks = self.request, self.found["profile"]["picks"]
        found = examine(
            self.model,
            [(pick["layer"], pick["neuron"]) for pick in picks],
            [r.text, r.calibration_text],
            context=r.context,
            windows=r.windows,
            snippets=NEURON_SNIPPETS,
        )
        of_place = {(neuron.layer, neuron.neuron): _small(neuron.to_json()) for neuron in found}
        return [pick | of_place[pick["layer"], pick["neuron"]] for pick in picks]

    def _ids(self, text: str) -> np.ndarray:
        return self.model.tokenizer.prompt(text)

    def _patterns(self, *texts: np.ndarray) -> list[list[np.ndarray]]:
        """Rows of bits by layer, of the ids (T,) of each text, under the plan."""
        with recording(self.model, self.plan, "inter") as patterns:
            return [patterns(ids) for ids in texts]


def stored_bytes(model: Model) -> tuple[int, int]:
    """Bytes of the FFN's tensors and of all tensors, as they are stored in the model's files."""
    path = find_model(model.name)
    tensors = text_tensors(path) if path.is_dir() else read_gguf(path).tensors
    a = model.architecture
    paths = [p for p in (a.gate_proj, a.up_proj, a.gate_up_proj, a.down_proj) if p is not None]
    is_ffn = re.compile(rf"\.\d+\.({'|'.join(map(re.escape, paths))})\.")
    ffn = total = 0
    for stored, tensor in tensors.items():
        name = stored if path.is_dir() else a.hf_name(stored) or stored
        total += len(tensor.data)
        ffn += len(tensor.data) if is_ffn.search(name) else 0
    return ffn, total


def summarise_profile(found: Profile) -> dict[str, Any]:
    """A profile in few numbers: octaves of magnitude, quantiles, zeros, firing curves, picks."""
    summary, arrays = found.summary, found.arrays
    tensors = {}
    for kind, key, what in (
        ("magnitude", "magnitude_quantiles", "activation"),
        ("weight", "weight_quantiles", "weight"),
    ):
        for name in summary["layers"][0][key]:
            tensors[f"{what} {name}"] = {
                **octaves(arrays[f"{kind}.{name}"], arrays["edges"]),
                "quantiles": [
                    {q: _digits(v) for q, v in layer[key][name].items()}
                    for layer in summary["layers"]
                ],
            }
    kept = ("layer", "zeros", "inter_at_most", "out_norm_below_1e-7", "dead_neurons")
    top_half, natural = (  # a narrower layer's row ends in NaN
        [row[~np.isnan(row)] for row in arrays[f"{name}_frequency"]]
        for name in ("top_half", "firing")
    )
    shown = shown_layers(len(top_half))
    return {
        "tokens": summary["tokens"],
        "natural_sparsity": summary["natural_sparsity"],
        "tensors": tensors,
        "layers": [{k: row[k] for k in kept} for row in summary["layers"]],
        "firing": [
            {
                "layer": i,
                "top_half": ranked(top_half[i]),
                "natural": ranked(natural[i]),
            }
            for i in shown
        ],
        "picks": [pick for i in shown for pick in pick_neurons(i, top_half[i])],
    }


def octaves(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Counts (L, bins) of magnitudes as shares of each layer's values, one per doubling.

    `low` is the octaves' lower edges, `share` (L, octaves), `below` (L,) what is smaller, zeros
    included. Octaves at the ends that are next to empty in every layer are left out.
    """
    per_octave = STORED_BINS_PER_OCTAVE
    total = counts.sum(axis=1, keepdims=True)
    share = counts.reshape(len(counts), -1, per_octave).sum(axis=2) / total
    # Its first bin has all that is smaller than the histogram's range: zeros, in the main.
    share[:, 0] = 0
    filled = np.flatnonzero((share >= LEAST_SHARE).any(axis=0))
    part = slice(filled[0], filled[-1] + 1) if len(filled) else slice(1, 2)
    low = edges[:-1:per_octave][part]
    below = counts[:, : part.start * per_octave].sum(axis=1) / total[:, 0]
    return {
        "low": [_digits(value) for value in low.tolist()],
        "share": _rounded(share[:, part], 5),
        "below": _rounded(below, 5),
    }


def shown_layers(count: int) -> list[int]:
    """The first layer, the middle one and the last."""
    return sorted({0, count // 2, count - 1})


def ranked(values: np.ndarray) -> dict[str, list[float]]:
    """Values in falling order at no more than RANKED ranks; `rank` is a share of all."""
    ordered = np.sort(values)[::-1]
    at = np.unique(np.linspace(0, len(ordered) - 1, min(RANKED, len(ordered))).astype(int))
    return {"rank": _rounded(at / max(len(ordered) - 1, 1), 4), "value": _rounded(ordered[at], 4)}


def pick_neurons(layer: int, frequency: np.ndarray) -> list[dict[str, Any]]:
    """The neuron that is most often in the top half, the one in the middle and the rarest."""
    order = np.argsort(-frequency, kind="stable")
    places = {"most frequent": 0, "middle": len(order) // 2, "rarest": len(order) - 1}
    return [{"what": w, "layer": layer, "neuron": int(order[at])} for w, at in places.items()]


def align(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Positions (n, 2) that belong together in two lists of ids.

    Those of tokens that both have in the same order, and of stretches that one for one replace
    each other.
    """
    pairs: list[tuple[int, int]] = []
    matcher = SequenceMatcher(a=a.tolist(), b=b.tolist(), autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal" or (tag == "replace" and a1 - a0 == b1 - b0):
            pairs += zip(range(a0, a1), range(b0, b1), strict=True)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _groups(rows: np.ndarray, width: int) -> list[list[int]]:
    """Percent of active neurons in each of NEURON_GROUPS runs of neurons, (groups, T)."""
    active = unpack_bits(rows, width)
    parts = np.array_split(active, min(NEURON_GROUPS, width), axis=1)
    return [np.rint(100 * part.mean(axis=1)).astype(int).tolist() for part in parts]


def _digits(value: Any) -> Any:
    """A number to four digits."""
    return float(f"{value:.4g}")


def _rounded(values: np.ndarray, decimals: int) -> Any:
    return np.round(np.asarray(values, dtype=np.float64), decimals).tolist()


def _small(value: Any) -> Any:
    """A JSON value with its numbers to four digits."""
    if isinstance(value, float):
        return _digits(value)
    if isinstance(value, dict):
        return {k: _small(v) for k, v in value.items()}
    return [_small(v) for v in value] if isinstance(value, list) else value


def load_sample(path: str | Path | None) -> Text:
    """The sample text. Raises FallowError: missing, empty or not UTF-8."""
    if path is None:
        return Text("an example", SAMPLE)
    if not Path(path).is_file():
        raise FallowError(f"--sample {path} not found; give a text file")
    return load_text(path, "evaluation")
