"""From a model to a packed file that skips the neurons a stated loss allows, chosen by measurement.

What may be spared: rows of up_proj of neurons whose gate is small, rows of down_proj of neurons
whose output is small (rule `two_stage`), and exact logits of unlikely tokens (the shortlist).
What each layer's thresholds cost the whole model is measured layer by layer; then every layer takes
the cheapest of its choices at one common price of divergence for bytes, and the price is searched
for which held-out text loses as much as is allowed. What of that plan is worth its loss is timed.

Three texts, none of which shares a token with another: the plan is made on the first, the search
judges by the second, and the third, which neither has seen, checks what came of it.

A model may be adapted first (`fallow.adaptation`). The plan is then the one that it was taught, and
is checked and timed; the source is still the model as it was.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fallow.adaptation.adapter import AdaptSettings, report_of
from fallow.adaptation.adapter import adapt as teach
from fallow.checkpoints.text import Text, check_no_leakage, load_text, split_windows
from fallow.common.errors import UsageError
from fallow.common.files import atomic_path, check_writable
from fallow.common.progress import console
from fallow.common.tables import Result, plus_minus
from fallow.engine.engine import Engine
from fallow.measure.evaluation import final_hidden, logits_of
from fallow.measure.quality import Evaluation, Logits, evaluate_engine
from fallow.optimization.candidates import Candidates
from fallow.optimization.costs import measure_costs
from fallow.optimization.search import (
    Judge,
    Runs,
    Search,
    decode_ratio,
    selector_of,
    worth_of_taught,
)
from fallow.packing.packer import Packer
from fallow.plan import Plan
from fallow.reference.model import Model, load
from fallow.reference.sparsified import PLAN_FILE

PREFERENCES = ("speed", "bytes")
# Of each window that checks a plan, read again token by token.
DECODED_TOKENS = 64


@dataclass(repr=False)
class Optimized(Result):
    """What a plan saves and costs. Quality is against the source model, on held-out text."""

    path: str
    fingerprint: str  # of the source model
    plan_sha256: str | None  # None: no plan was worth its loss
    selector: str
    # On windows that only checked the plan, read in blocks of tokens; as are the next two.
    ppl_change_percent: float
    ppl_change_se: float | None  # paired
    kl_to_dense: float  # nats per token, from the source model
    # Read token by token, as it is timed: that, and what the beginnings of the same windows,
    # `decode_tokens` in all, differ when read so. The errors of both add up.
    decode_ppl_change_percent: float
    decode_ppl_change_se: float | None
    decode_tokens: int
    bytes_per_token: float  # weights and cache read per decoded token
    bytes_ratio: float  # that over the same of the packed model run dense
    decode_tps: float  # median of alternating runs
    decode_ratio_dense: float  # against the packed model run dense: shortlist_gain * neuron_gain
    shortlist_gain: float  # decode with the shortlist alone over dense; 1 if it is not used
    neuron_gain: float  # decode with the plan over that with its shortlist alone
    sparsity_ratio: float  # S(inter) while decoding
    # On the text that the search judged by; of an adapted model, as it was trained, on the windows
    # that the adaptation held out.
    validation_ppl_change_percent: float
    text: str
    windows: int  # of the text
    calibration_text: str
    threads: int
    seconds: float
    seconds_by_stage: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def __repr__(self) -> str:
        change = plus_minus(self.ppl_change_percent, self.ppl_change_se, sign="+")
        return (
            f"<Optimized {self.path} ({self.selector}): {self.decode_tps:.1f} tok/s on "
            f"{self.threads} threads, {self.decode_ratio_dense:.2f} times dense, "
            f"{self.bytes_per_token / 1e6:.1f} MB per token, {change} % PPL>"
        )


def optimize(
    model: str | Path | Model,
    output: str | Path,
    *,
    max_ppl_increase: float = 1.0,
    calibration_text: str | Path | Text | None = None,
    text: str | Path | Text | None = None,
    context: int = 1024,
    windows: int = 4,
    validation_windows: int = 10,
    check_windows: int = 8,
    threads: int | None = None,
    prefer: str = "speed",
    quant: str | None = None,
    down: str | None = None,
    adapt: AdaptSettings | None = None,
    device: str = "cpu",
) -> Optimized:
    """Packs a model with a plan that costs at most `max_ppl_increase` percent of perplexity.

    The search keeps the limit, with one standard error to spare, on windows of the calibration text
    that nothing was fitted on. The result's figures come from `text`, which must be another one: if
    the limit is exceeded there by more than one paired standard error, the search is repeated for a
    smaller loss, twice at most. What does not surely gain 3 % is left out: of runs in turn the
    lower quartile has to, of a plan over none and of thresholds over the shortlist alone. Measured
    costs of layers are kept beside the output until it is written, so that a stopped run continues
    there.

    Args:
        windows: of the calibration text, for thresholds; `validation_windows` more judge plans,
            `check_windows` of `text` check what was found.
        prefer: "speed": rows are priced by what they take when scattered, as timed here, and what
            does not make decode faster is left out; "bytes": rows are priced by their bytes, and
            what does not make them fewer is left out.
        quant: as for `pack`.
        down: as for `pack`.
        adapt: how to adapt the model first, to the folder `output`.adapted, which stays; one that
            is there is taken if it came of the same. Then there is no search.
        device: what the source runs on, by which plans are made and judged, and what an adaptation
            runs on: see `load`.

    Raises:
        UsageError: a limit that is no positive percentage, an unknown preference, the same text
            twice, or as `fallow.adaptation.adapter.adapt`.
        FallowError: as `pack`; the packed model costs more than the limit by itself; the limit
            does not hold on `text`; or skipping what an adapted model can spare is not surely
            faster (nothing is written).
    """
    stages = Stages()
    counts = {"windows": windows, "validation-windows": validation_windows}
    counts["check-windows"] = check_windows
    _check_request(output, max_ppl_increase, prefer, counts)
    fit_text, check_text = _load_texts(calibration_text, text)
    taught = None
    if adapt is not None:
        taught = _Taught(model, Path(f"{output}.adapted"), adapt, fit_text, device)
        model = taught.folder
        stages.end("adapt")
    # The packer's own check may refuse a type of down_proj_t, so it reads no check text either.
    packer = Packer(
        model, quant=quant, down=down, text=load_text(None, "calibration"), device=device
    )
    packer.model.layers[0].one_ffn()  # or it is refused
    texts = _cut(packer, fit_text, check_text, context, counts)
    stages.end("load")
    packer.add_coarse_head(fit_text, texts.for_head)
    stages.end("coarse head")
    costs_path, packing = Path(f"{output}.costs.jsonl"), {"quant": quant, "down": down}
    with atomic_path(output) as temporary:
        packer.write(temporary)
        stages.end("pack")
        engine = Engine(temporary, plan=False, threads=threads, context=texts.context)
        check = _Check(taught.source if taught else packer.model, engine, texts)
        plan: Plan | None
        if taught:
            plan, quality, runs = worth_of_taught(
                engine, taught.plan, check.blocks, max_ppl_increase, prefer, taught.folder
            )
            judged = plan.achieved_ppl_increase = taught.judged
        else:
            search = _prepare(
                packer.model, engine, texts, costs_path, packing, max_ppl_increase, prefer, stages
            )
            plan, judged, quality, runs = search.run(check.blocks)
        stages.end("search and check")
        differs = check.decode(plan)
        stages.end("decode check")
        packer.leave_out_unused(plan)
        packer.write_again(temporary, plan)
        stages.end("pack again")
    costs_path.unlink(missing_ok=True)
    return Optimized(
        path=str(output),
        fingerprint=check.source.fingerprint,
        plan_sha256=None if plan is None else plan.sha256,
        **_quality(quality, differs, texts),
        **_speed(plan, runs),
        validation_ppl_change_percent=judged,
        calibration_text=texts.fit_text.name,
        threads=engine.threads,
        seconds=sum(stages.seconds.values()),
        seconds_by_stage=stages.seconds,
    )


class _Taught:
    """An adapted model and the plan that it was taught, made or found.

    Raises:
        UsageError: the folder is of another model, text or other settings; or the model is one in
            memory, which an adaptation could not read again.
    """

    def __init__(
        self,
        model: str | Path | Model,
        folder: Path,
        settings: AdaptSettings,
        text: Text,
        device: str,
    ) -> None:
        if isinstance(model, Model):
            raise UsageError(
                "what is adapted is read from its files; give the model's name or path"
            )
        self.folder = folder
        if not folder.exists():
            teach(model, folder, settings, text=[text], device=device)
        self.source = load(model, "float32", device)
        report, self.plan = report_of(folder), Plan.load(folder / PLAN_FILE)
        found = (report.fingerprint, report.settings, report.texts[0]["sha256"])
        if found != (self.source.fingerprint, asdict(settings), text.sha256):
            raise UsageError(
                f"{folder} was adapted from another model or text, or by other settings; remove "
                "it, or choose another --output"
            )
        self.judged = report.best.ppl_change_percent


def _check_request(
    output: str | Path, max_ppl_increase: float, prefer: str, counts: dict[str, int]
) -> None:
    """Refuses what needs neither text nor model to be seen wrong."""
    if not (np.isfinite(max_ppl_increase) and max_ppl_increase > 0):
        raise UsageError(f"--max-ppl-increase {max_ppl_increase} is not a positive percentage")
    if prefer not in PREFERENCES:
        raise UsageError(f"unknown preference {prefer!r}; known: {', '.join(PREFERENCES)}")
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"--{option} {count} is too few; give at least 1")
    check_writable(output)


def _load_texts(
    calibration_text: str | Path | Text | None, text: str | Path | Text | None
) -> tuple[Text, Text]:
    """The text of the search, and the one that checks it."""
    check_text = load_text(text, "evaluation")
    fit_text = load_text(calibration_text, "calibration")
    check_no_leakage(fit_text.sha256, check_text, False, fit_text.sketch)
    return fit_text, check_text


class Stages:
    """How long each stage of the work took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def end(self, stage: str) -> None:
        """One that begins where the one before ended."""
        now = time.monotonic()
        self.seconds[stage], self._start = now - self._start, now
        console.print(f"{stage}: {self.seconds[stage]:.0f} s", highlight=False)


@dataclass(frozen=True)
class _Texts:
    """What plans are made on, judged by and checked on; windows are (n, context)."""

    fit_text: Text
    fit: np.ndarray
    validation: np.ndarray
    for_head: np.ndarray  # the coarse head's: all but what judges
    check_text: Text
    check_windows: int
    context: int


def _cut(
    packer: Packer, fit_text: Text, check_text: Text, context: int, counts: dict[str, int]
) -> _Texts:
    """The texts in windows that the model can read."""
    source, context = packer.model, min(context, packer.context_length)
    cut = source.windows(fit_text, context)
    sizes = [counts["windows"], counts["validation-windows"]]
    fit, validation = split_windows(cut, sizes)
    # Fewer are refused before the work.
    source.windows(check_text, context, counts["check-windows"])
    for_head = np.concatenate([fit, cut[sum(sizes) :]])
    return _Texts(fit_text, fit, validation, for_head, check_text, counts["check-windows"], context)


def _prepare(
    source: Model,
    engine: Engine,
    texts: _Texts,
    costs_path: Path,
    packing: dict[str, str | None],
    max_ppl_increase: float,
    prefer: str,
    stages: Stages,
) -> Search:
    """A search with all that it needs to know of the layers."""
    candidates = Candidates(source, texts.fit, texts.fit_text, engine, prefer)
    stages.end("thresholds")
    settings: dict[str, Any] = {"fingerprint": source.fingerprint, "text": texts.fit_text.sha256}
    settings |= {"windows": len(texts.fit), "context": texts.context} | packing
    costs = measure_costs(candidates, engine, texts.fit, costs_path, settings)
    stages.end("costs")
    judge = Judge(source, engine, texts.validation)
    return Search(candidates, costs, engine, judge, max_ppl_increase, prefer)


class _Check:
    """Reads windows that neither plan nor search has seen, against the source in float32."""

    def __init__(self, source: Model, engine: Engine, texts: _Texts) -> None:
        self.source, self._engine, self._text = source, engine, texts.check_text
        self._windows = source.windows(texts.check_text, texts.context, texts.check_windows)
        self._hidden: dict[bytes, torch.Tensor] = {}  # the source's, of windows that were read

    def blocks(self, plan: Plan | None) -> Evaluation:
        """In blocks of tokens, without the products in bytes that a prompt may get."""
        return evaluate_engine(
            self._engine, plan, self._text, windows=self._windows, against=self._dense
        )

    def _dense(self, window: np.ndarray) -> Logits:
        key = window.tobytes()
        if key not in self._hidden:
            self._hidden[key] = final_hidden(self.source, window)
        return logits_of(self.source, self._hidden[key])

    def decode(self, plan: Plan | None) -> Evaluation:
        """What the windows' beginnings differ token by token from the same plan in blocks."""

        def blocks(window: np.ndarray) -> Logits:
            self._engine.use_plan(plan)
            return self._engine.logits(window).__getitem__

        return evaluate_engine(
            self._engine,
            plan,
            self._text,
            windows=self._windows[:, :DECODED_TOKENS],
            against=blocks,
            decode=True,
        )


def _quality(blocks: Evaluation, differs: Evaluation, texts: _Texts) -> dict[str, Any]:
    """What the check found, in blocks and token by token."""
    kl = blocks.kl_to_dense["mean"]
    assert kl is not None
    change = blocks.ppl_change_percent
    errors = [e for e in (blocks.ppl_change_se, differs.ppl_change_se) if e is not None]
    both = (1 + change / 100) * (1 + differs.ppl_change_percent / 100)
    return {
        "ppl_change_percent": change,
        "ppl_change_se": blocks.ppl_change_se,
        "kl_to_dense": kl,
        "decode_ppl_change_percent": 100 * (both - 1),
        "decode_ppl_change_se": math.hypot(*errors) if len(errors) == 2 else None,
        "decode_tokens": differs.tokens,
        "text": blocks.text,
        "windows": blocks.windows,
    }


def _speed(plan: Plan | None, runs: Runs) -> dict[str, Any]:
    """What the runs that chose the plan say of it."""
    name = selector_of(plan)
    first, ratio = runs[name][0], decode_ratio(runs, name)
    lists = plan is not None and plan.head_margin > 0
    shortlist = decode_ratio(runs, "shortlist") if lists else 1.0
    return {
        "selector": name,
        "bytes_per_token": first["bytes_per_token"],
        "bytes_ratio": first["bytes_per_token"] / runs["dense"][0]["bytes_per_token"],
        "decode_tps": median(r["decode_tps"] for r in runs[name]),
        "decode_ratio_dense": ratio,
        "shortlist_gain": shortlist,
        "neuron_gain": ratio / shortlist,
        "sparsity_ratio": first["sparsity"],
    }
