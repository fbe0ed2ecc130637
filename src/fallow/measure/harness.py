"""EleutherAI's lm-evaluation-harness on models of fallow, dense or with a plan.

Importing this module registers the model `fallow` with the harness, whose own command then is

    python -m fallow.measure.harness run --model fallow --model_args path=m.gguf,plan=m.plan …
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fallow.common.errors import FallowError, UsageError
from fallow.common.metrics import standard_error
from fallow.common.progress import progress
from fallow.engine.engine import Engine
from fallow.engine.packed import is_packed
from fallow.engine.sampling import Sampler
from fallow.measure.tasks import Result, ScoredIds, read_engine, read_model
from fallow.plan import Plan
from fallow.reference.model import Model, load

NEW_TOKENS = 256  # of an answer, where a task does not say


def open_model(
    path: str, *, threads: int | None = None, context: int | None = None, dtype: str = "auto"
) -> Engine | Model:
    """A packed model in the engine, any other in transformers. Raises as these do."""
    if is_packed(path):
        return Engine(path, threads=threads, context=context)
    return load(path, dtype)


@register_model("fallow")
class HarnessModel(TemplateLM):
    """What the harness asks: likelihoods of continuations and of texts, and answers.

    Args:
        path: a packed model, or any other that fallow loads.
        plan: a plan's file; default: the one packed with the model.
        dense: leave the packed plan aside.
        threads, context, dtype: as for `open_model`.
        batch_size, max_batch_size, device: the harness gives them; one text after another on CPU.
    """

    def __init__(
        self,
        path: str = "",
        plan: str | None = None,
        dense: bool = False,
        threads: int | None = None,
        context: int | None = None,
        dtype: str = "auto",
        *,
        model: Engine | Model | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not path and model is None:
            raise UsageError("--model_args lacks path=FILE")
        if dense and plan:
            raise UsageError("--model_args has a plan and dense=True; leave one out")
        if model is None:
            model = open_model(str(path), threads=threads, context=context, dtype=dtype)
        self.model = model
        self._dense = dense
        self.use_plan(Plan.load(plan) if plan else None if dense else packed_plan(self.model))

    def use_plan(self, plan: Plan | None) -> None:
        """Another plan from the next request on, or none."""
        self.plan = plan
        if isinstance(self.model, Engine):
            self.model.use_plan(plan)

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    @property
    def max_length(self) -> int:
        if isinstance(self.model, Engine):
            return self.model.context
        return self.model.module.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        ends = self.model.tokenizer.eos_ids
        if not ends:
            raise FallowError(f"{self.model.name} has no end token, which the harness asks for")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self.model.tokenizer.encode(string, parse_special=True)
        if add_special_tokens is not False:
            ids = self.model.tokenizer.with_bos(ids)
        return ids.tolist()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.tokenizer.render(chat_history, answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_template

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Result]:
        """Requests of one context, which follow one another, are read together."""
        found: list[Result] = []
        with progress("harness", len(requests)) as ticker:
            for group in _by_context(requests):
                found += self._score(group)
                ticker.advance(len(group))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        found = []
        with progress("harness", len(requests)) as ticker:
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                )
                pairs = [make_disjoint_window(window) for window in windows]
                found.append(sum(self._score([("", *pair)])[0][0] for pair in pairs))
                ticker.advance()
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = []
        with progress("harness", len(requests)) as ticker:
            for prompt, options in (request.args for request in requests):
                found.append(self._answer(prompt, dict(options)))
                ticker.advance()
        return found

    def _score(self, pairs: Sequence[tuple[Any, list[int], list[int]]]) -> list[Result]:
        """Scores of pairs; of a text that is too long, the last tokens alone are read."""
        ids = [
            ScoredIds(np.array(context + text)[-self.max_length :], len(text))
            for _, context, text in pairs
        ]
        if any(len(each.ids) <= each.n_scored for each in ids):
            raise FallowError(
                f"a continuation is longer than the context of {self.max_length}; raise context="
            )
        if isinstance(self.model, Engine):
            return read_engine(self.model, ids, dense=self.plan is None)
        with self.model.sparse(self.plan):
            return read_model(self.model, ids)

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks", options.get("max_new_tokens", NEW_TOKENS)))
        warm = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        ids = np.array(self.tok_encode(prompt))[-max(1, self.max_length - most) :]
        stop = [s for s in stop if s]
        top_p, top_k = float(options.get("top_p", 1.0)), int(options.get("top_k", 0))
        if isinstance(self.model, Engine):
            sampler = Sampler(warm, top_p, top_k)
            pieces = self.model.answer(ids, most, sampler, stop, reuse=True)
            return "".join(piece.text for piece in pieces)
        return "".join(
            self.model.generate(ids, most, warm, top_p, top_k, stop=stop, plan=self.plan)
        )


def packed_plan(model: Engine | Model) -> Plan | None:
    """The plan that the engine found in its file."""
    return model.plan if isinstance(model, Engine) else None


def _by_context(
    requests: Sequence[tuple[Any, list[int], list[int]]],
) -> list[list[tuple[Any, list[int], list[int]]]]:
    groups: list[list[tuple[Any, list[int], list[int]]]] = []
    for request in requests:
        if groups and groups[-1][-1][1] == request[1]:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


# Dense and sparse in one run ---------------------------------------------------------------------


def compare(
    model: Engine | Model,
    plan: Plan | None,
    tasks: Sequence[str],
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Tasks on the dense model and under a plan, by default the packed one.

    Returns:
        A row per task and metric: `dense`, `sparse` and `change` with their standard errors, that
        of the change over pairs of documents; None where there is no plan or no value of a
        document.

    Raises:
        UsageError: an unknown task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    plan = plan or packed_plan(model)
    adapter = HarnessModel(model=model)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval knows no task {unknown[0]!r}; see: lm-eval ls tasks")
    run: Callable[..., Any] = partial(
        simple_evaluate,
        model=adapter,
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    found = []
    for each in (None,) if plan is None else (None, plan):
        adapter.use_plan(each)
        found.append(run())
    return _rows(found[0], found[1] if len(found) > 1 else None)


def _rows(dense: Any, sparse: Any | None) -> list[dict[str, Any]]:
    rows = []
    for task, results in dense["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            before = _values(dense, task, metric)
            row = {"task": task, "metric": metric, "dense": float(value), "dense_se": _se(before)}
            row |= dict.fromkeys(("sparse", "sparse_se", "change", "change_se"))
            if sparse is not None:
                row["sparse"] = float(sparse["results"][task][key])
                row["change"] = row["sparse"] - row["dense"]
                after = _values(sparse, task, metric)
                row["sparse_se"] = _se(after)
                if before is not None and after is not None:
                    row["change_se"] = _se(after - before)
            rows.append(row)
    return rows


def _values(results: Any, task: str, metric: str) -> np.ndarray | None:
    """A metric of every document, where it has one number for each."""
    values = [sample.get(metric) for sample in results["samples"].get(task, [])]
    if not values or not all(isinstance(v, int | float) for v in values):
        return None
    return np.array(values, dtype=np.float64)


def _se(values: np.ndarray | None) -> float | None:
    return None if values is None else standard_error(values)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
