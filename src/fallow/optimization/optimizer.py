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
        quant, down: as for `pack`.

    Raises:
        UsageError: a limit that is no positive percentage, an unknown preference, or the same
            text twice.
        FallowError: as `pack`; the packed model costs more than the limit by itself; or the limit
            does not hold on `text` (nothing is written).
    """
    start = time.monotonic()
    counts = {"windows": windows, "validation-windows": validation_windows}
    _check_request(max_ppl_increase, prefer, counts | {"check-windows": check_windows})
    check_writable(output)
    check_text = load_text(text, "evaluation")
    fit_text = load_text(calibration_text, "calibration")
    check_no_leakage(fit_text.sha256, check_text, False, fit_text.sketch)
    # The packer's own check may refuse a type of down_proj_t, so it reads no check text either.
    calibration = load_text(None, "calibration")
    packer = Packer(model, quant=quant, down=down, text=calibration)
    source = packer.model
    context = min(context, packer.context_length)
    cut = source.windows(fit_text, context)
    fit, validation = split_windows(cut, [windows, validation_windows])
    source.windows(check_text, context, check_windows)  # fewer are refused before the work
    packer.add_coarse_head(fit_text, np.concatenate([fit, cut[windows + validation_windows :]]))
    with atomic_path(output) as temporary:
        packer.write(temporary)
        engine = Engine(temporary, plan=False, threads=threads, context=context)
        candidates = Candidates(source, fit, fit_text, engine, prefer)
        costs_path = Path(f"{output}.costs.jsonl")
        settings: dict[str, Any] = {"fingerprint": source.fingerprint, "text": fit_text.sha256}
        settings |= {"windows": windows, "context": context, "quant": quant, "down": down}
        costs = measure_costs(candidates, engine, fit, costs_path, settings)

        def check(plan: Plan | None) -> Evaluation:
            return evaluate_engine(
                engine,
                plan,
                check_text,
                context=context,
                windows=check_windows,
                against=lambda window: dense_logits(source, window),
            )

        judge = Judge(source, engine, validation)
        search = Search(candidates, costs, engine, judge, max_ppl_increase, prefer)
        plan, judged, quality = search.run(check)
        packer.leave_out_unused(plan)
        packer.write(temporary, plan)
    costs_path.unlink(missing_ok=True)
    engine = Engine(output, threads=threads, context=context)
    runs = time_plans(engine, {"dense": None} | ({"plan": plan} if plan else {}))
    return _result(engine, plan, quality, runs, judged, fit_text, output, time.monotonic() - start)


def _check_request(max_ppl_increase: float, prefer: str, counts: dict[str, int]) -> None:
    if not (np.isfinite(max_ppl_increase) and max_ppl_increase > 0):
        raise UsageError(f"--max-ppl-increase {max_ppl_increase} is not a positive percentage")
    if prefer not in PREFERENCES:
        raise UsageError(f"unknown preference {prefer!r}; known: {', '.join(PREFERENCES)}")
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"--{option} {count} is too few; give at least 1")


def _result(
    engine: Engine,
    plan: Plan | None,
    quality: Evaluation,
    runs: dict[str, list[dict[str, float]]],
    validation: float,
    fit_text: Text,
    output: str | Path,
    seconds: float,
) -> Optimized:
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
        calibration_text=fit_text.name,
        threads=engine.threads,
        seconds=seconds,
    )
