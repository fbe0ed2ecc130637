"""lm-evaluation-harness on our models, on local task files, against fallow's own tasks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

import fallow
from conftest import engine_plan
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.measure.harness import HarnessModel, compare, open_model
from fallow.measure.tasks import evaluate_task
from fallow.plan import Cut, Plan

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {kind}
test_split: test
doc_to_text: "{{{{query}}}}"
{rest}
metadata:
  version: 1
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks: choose one of three, and answer with a text."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    words = ["neuron", "gate", "rest", "work", "seven", "token"]
    with (folder / "docs.jsonl").open("w") as file:
        for i in range(40):
            choices = rng.choice(words, 3, replace=False).tolist()
            doc = {"query": f"{i}: the {words[i % 6]}", "choices": choices, "gold": i % 3}
            file.write(json.dumps(doc) + "\n")
    choose = 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n'
    answer = (
        'doc_to_target: "{{choices[gold]}}"\ngeneration_kwargs:\n  until: ["z"]\n'
        "  max_gen_toks: 5\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    )
    for name, kind, rest in (
        ("choose", "multiple_choice", choose),
        ("answer", "generate_until", answer),
    ):
        text = TASK.format(name=name, kind=kind, file=folder / "docs.jsonl", rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def cutting(engine: Engine) -> Plan:
    return engine_plan(engine, Cut("gate_act", "threshold", 4.0))


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_likelihoods_are_the_engines(talking: Path) -> None:
    engine = Engine(talking, threads=1)
    adapter = HarnessModel(model=engine)
    pairs = [("neuron 3", " rests"), ("neuron 3", " works well"), ("", "the gate")]
    found = adapter.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, text), (likelihood, _) in zip(pairs, found, strict=True):
        whole = engine.tokenizer.encode(context + text)
        before = len(engine.tokenizer.encode(context))
        ids = whole if before else np.r_[engine.tokenizer.bos_id, whole]
        scored = len(whole) - before
        assert likelihood == pytest.approx(engine.score(ids)[-scored:].sum(), abs=0.02)
    text = "the gate lets 3 of them through"
    ids = np.r_[engine.tokenizer.bos_id, engine.tokenizer.encode(text)]
    rolling = adapter.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert rolling[0] == pytest.approx(engine.score(ids).sum(), abs=0.02)
    long = "neuron " * 300
    assert adapter.loglikelihood_rolling(ask("loglikelihood_rolling", (long,)))[0] < -100
    greedy = "".join(engine.generate("neuron 3", 6))
    prompts = [("neuron 3", {"until": [], "max_gen_toks": 6, "do_sample": False})]
    assert adapter.generate_until(ask("generate_until", *prompts)) == [greedy]


@pytest.mark.usefixtures("own_tasks_only")
def test_a_transformers_model_says_the_same(
    talking: Path, folders: dict[str, Path], tasks: Path
) -> None:
    rows = [
        compare(open_model(str(path), threads=1), None, ["choose", "answer"], 12, None, tasks)
        for path in (talking, folders["llama"])
    ]
    assert rows[0] == rows[1]
    assert {row["task"] for row in rows[0]} == {"choose", "answer"}
    assert all(row["sparse"] is None for row in rows[0])


@pytest.mark.usefixtures("own_tasks_only")
def test_dense_and_sparse_in_one_run(talking: Path, tasks: Path) -> None:
    engine = Engine(talking, threads=1)
    plan = cutting(engine)
    rows = {r["metric"]: r for r in compare(engine, plan, ["choose"], None, 0, tasks)}
    row = rows["acc"]
    assert row["change"] == pytest.approx(row["sparse"] - row["dense"])
    assert row["change_se"] > 0
    found = compare(engine, None, ["choose"], None, 0, tasks)  # the plan is in use still
    assert found[0]["sparse"] == row["sparse"]
    # fallow's own tasks divide by length, so they agree where choices have one length.
    same = tasks.parent / "same.jsonl"
    lines = (tasks / "docs.jsonl").read_text().splitlines()
    docs = [json.loads(line) for line in lines]
    fours = [d | {"choices": [c[:4] for c in d["choices"]]} for d in docs]
    same.write_text("\n".join(map(json.dumps, fours)) + "\n")
    text = (tasks / "choose.yaml").read_text()
    own = tasks.parent / "own"
    own.mkdir()
    text = text.replace("task: choose", "task: fours").replace(str(tasks / "docs.jsonl"), str(same))
    (own / "fours.yaml").write_text(text)
    ours = evaluate_task(engine, plan, same)
    theirs = compare(engine, plan, ["fours"], None, 0, own)[0]
    assert (theirs["dense"], theirs["sparse"]) == (ours["dense_accuracy"], ours["accuracy"])
    assert theirs["change_se"] == pytest.approx(ours["change_se"])


# `python -m fallow.measure.harness` with its own tasks only: see `own_tasks_only`.
RUN = """
import functools, runpy
from lm_eval import tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
runpy.run_module("fallow.measure.harness", run_name="__main__", alter_sys=True)
"""


def test_the_harness_has_our_model(talking: Path, tasks: Path, tmp_path: Path) -> None:
    cutting(Engine(talking)).save(tmp_path / "m.plan")
    done = subprocess.run(
        [
            *(sys.executable, "-c", RUN, "run", "--model", "fallow"),
            *("--model_args", f"path={talking},plan={tmp_path / 'm.plan'},threads=1"),
            *("--tasks", "choose", "--include_path", str(tasks), "--limit", "5"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "choose" in done.stdout


@pytest.mark.usefixtures("own_tasks_only")
def test_errors(talking: Path, folders: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks path"):
        HarnessModel()
    with pytest.raises(UsageError, match="a plan and dense"):
        HarnessModel(str(talking), plan="m.plan", dense=True)
    with pytest.raises(FallowError, match="no such file"):
        HarnessModel(str(talking), plan=str(tmp_path / "none.plan"))
    with pytest.raises(UsageError, match="knows no task 'sing'"):
        compare(Engine(talking), None, ["sing"], include_path=tasks)
    short = HarnessModel(model=Engine(talking, context=8))
    with pytest.raises(FallowError, match="longer than the context of 8"):
        short.loglikelihood(ask("loglikelihood", ("a", " neuron rests" * 20)), disable_tqdm=True)
    assert isinstance(open_model(str(folders["opt"])), fallow.Model)
