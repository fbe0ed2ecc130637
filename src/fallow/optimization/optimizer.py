"""From a model to a packed file that skips the neurons a stated loss allows, chosen by measurement.

What may be spared: rows of up_proj of neurons whose gate is small, rows of down_proj of neurons
whose output is small (rule `two_stage`), and exact logits of unlikely tokens (the shortlist).
What each layer's thresholds cost the whole model is measured layer by layer; then every layer takes
the cheapest of its choices at one common price of divergence for bytes, and the price is searched
for which held-out text loses as much as is allowed.

Three texts, none of which shares a token with another: the plan is made on the first, the search
judges by the second, and the third, which neither has seen, checks what came of it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fallow.checkpoints.text import Text, check_no_leakage, load_text, split_windows
from fallow.common.errors import UsageError
from fallow.common.files import atomic_path, check_writable
from fallow.engine.engine import Engine
from fallow.measure.evaluation import dense_logits
from fallow.measure.quality import Evaluation, evaluate_engine
from fallow.optimization.candidates import Candidates
from fallow.optimization.costs import measure_costs
from fallow.optimization.search import Judge, Search, selector_of, time_plans
from fallow.packing.packer import Packer
from fallow.plan import Plan
from fallow.reference.model import Model

PREFERENCES = ("speed", "bytes")


@dataclass
class Optimized:
    """What a plan saves and costs. Quality is against the source model, on held-out text."""

    path: str
    selector: str
    ppl_change_percent: float  # on windows that only checked the plan, as are the next two
    ppl_change_se: float | None  # paired
    kl_to_dense: float  # nats per token, from the source model
    bytes_per_token: float  # weights and cache read per decoded token
    bytes_ratio: float  # that over the same of the packed model run dense
    decode_tps: float  # median of alternating runs
    decode_ratio_dense: float  # against the packed model run dense
    sparsity_ratio: float  # S(inter) while decoding
    validation_ppl_change_percent: float  # on the text that the search judged by
    text: str
    windows: int  # of the text
    calibration_text: str
    threads: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def optimize(
    model: str | Path | Model,
    output: str | Path,
    *,
    max_ppl_increase: float = 1.0,
    calibration_text: str | Path | Text | None = None,
    text: str | Path | Text | None = None,
    context: int = 1024,
    windows: int = 4,
    validation_windows: int = 24,
    check_windows: int = 8,
    threads: int | None = None,
    prefer: str = "speed",
    quant: str | None = None,
    down: str | None = None,
) -> Optimized:
    """Packs a model with a plan that costs at most `max_ppl_increase` percent of perplexity.

    The search keeps the limit, with one standard error to spare, on windows of the calibration text
    that nothing was fitted on. The result's figures come from `text`, which must be another one: if
    the limit is exceeded there by more than one paired standard error, the search is repeated for a
    smaller loss, twice at most. A plan that gains less than 3 % over none is left out. Measured
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

    Raises:
        UsageError: a limit that is no positive percentage, an unknown preference, or the same
            text twice.
        FallowError: as `pack`; the packed model costs more than the limit by itself; or the limit
            does not hold on `text` (nothing is written).
    """
    start = time.monotonic()
    counts = {"windows": windows, "validation-windows": validation_windows}
    counts["check-windows"] = check_windows
    _check_request(output, max_ppl_increase, prefer, counts)
    fit_text, check_text = _load_texts(calibration_text, text)
    # The packer's own check may refuse a type of down_proj_t, so it reads no check text either.
    packer = Packer(model, quant=quant, down=down, text=load_text(None, "calibration"))
    texts = _cut(packer, fit_text, check_text, context, counts)
    packer.add_coarse_head(fit_text, texts.for_head)
    costs_path, packing = Path(f"{output}.costs.jsonl"), {"quant": quant, "down": down}
    with atomic_path(output) as temporary:
        packer.write(temporary)
        engine = Engine(temporary, plan=False, threads=threads, context=texts.context)
        plan, judged, quality = _search(
            packer.model, engine, texts, costs_path, packing, max_ppl_increase, prefer
        )
        packer.leave_out_unused(plan)
        packer.write(temporary, plan)
    costs_path.unlink(missing_ok=True)
    return _result(output, plan, quality, judged, texts, threads, start)


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


def _search(
    source: Model,
    engine: Engine,
    texts: _Texts,
    costs_path: Path,
    packing: dict[str, str | None],
    max_ppl_increase: float,
    prefer: str,
) -> tuple[Plan | None, float, Evaluation]:
    """What `Search` finds: the plan, its PPL change as judged, and what the check says."""
    candidates = Candidates(source, texts.fit, texts.fit_text, engine, prefer)
    settings: dict[str, Any] = {"fingerprint": source.fingerprint, "text": texts.fit_text.sha256}
    settings |= {"windows": len(texts.fit), "context": texts.context} | packing
    costs = measure_costs(candidates, engine, texts.fit, costs_path, settings)

    def check(plan: Plan | None) -> Evaluation:
        return evaluate_engine(
            engine,
            plan,
            texts.check_text,
            context=texts.context,
            windows=texts.check_windows,
            against=lambda window: dense_logits(source, window),
        )

    judge = Judge(source, engine, texts.validation)
    return Search(candidates, costs, engine, judge, max_ppl_increase, prefer).run(check)


def _result(
    output: str | Path,
    plan: Plan | None,
    quality: Evaluation,
    validation: float,
    texts: _Texts,
    threads: int | None,
    start: float,
) -> Optimized:
    """The packed file's figures; its speed is timed here."""
    engine = Engine(output, threads=threads, context=texts.context)
    runs = time_plans(engine, {"dense": None} | ({"plan": plan} if plan else {}))
    dense = runs["dense"]
    sparse = runs.get("plan", dense)
    kl = quality.kl_to_dense["mean"]
    assert kl is not None
    return Optimized(
        path=str(output),
        selector=selector_of(plan),
        ppl_change_percent=quality.ppl_change_percent,
        ppl_change_se=quality.ppl_change_se,
        kl_to_dense=kl,
        bytes_per_token=sparse[0]["bytes_per_token"],
        bytes_ratio=sparse[0]["bytes_per_token"] / dense[0]["bytes_per_token"],
        decode_tps=median(r["decode_tps"] for r in sparse),
        decode_ratio_dense=median(
            a["decode_tps"] / b["decode_tps"] for a, b in zip(sparse, dense, strict=True)
        ),
        sparsity_ratio=sparse[0]["sparsity"],
        validation_ppl_change_percent=validation,
        text=quality.text,
        windows=quality.windows,
        calibration_text=texts.fit_text.name,
        threads=engine.threads,
        seconds=time.monotonic() - start,
    )
