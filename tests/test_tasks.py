"""Zero-shot tasks: scores against whole logits, and the three file forms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import engine_plan
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.measure.tasks import Item, evaluate_task, load_task
from fallow.packing.packer import pack
from fallow.plan import Cut


def write(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_forms(tmp_path: Path) -> None:
    items = load_task(
        write(
            tmp_path / "t.jsonl",
            {"query": "Question: 1 + 1?\n", "choices": ["1", "2"], "gold": 1},
            {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
            {"context": "the end is", "continuation": "near"},
        )
    )
    assert items == [
        Item((("Question: 1 + 1?\nAnswer:", " 1"), ("Question: 1 + 1?\nAnswer:", " 2")), 1),
        Item((("a", " c"), ("b", " c")), 0),
        Item((("the end is", " near"),)),
    ]


@pytest.mark.parametrize(
    "entry", [{}, [], {"query": "q", "choices": ["a"], "gold": 1}, {"query": "q", "gold": 0}, 3]
)
def test_other_forms_are_refused(entry: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"context": "a", "continuation": "b"}, entry)
    with pytest.raises(FallowError) as error:
        load_task(path)
    assert str(error.value) == (
        f"task {path}, line 2 is none of query/choices/gold, context_options/continuation/gold "
        "and context/continuation"
    )


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match=r"cannot read task .*: No such file or directory"):
        load_task(tmp_path / "t")
    with pytest.raises(FallowError, match="is empty"):
        load_task(write(tmp_path / "t"))


def log_likelihood(model: fallow.Model, context: str, text: str) -> float:
    whole = model.tokenizer.encode(context + text)
    n = len(model.tokenizer.encode(context))
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(whole)[None]).logits[0]
    log_p = logits.double().log_softmax(-1).numpy()
    return sum(log_p[t - 1, whole[t]] for t in range(n, len(whole)))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_choices_are_scored_by_likelihood_per_byte(
    name: str, tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    model = tiny[name]
    rng = np.random.default_rng(0)
    entries = [
        {
            "query": f"neuron {i}",
            "choices": ["works and works.", "rests", "sleeps in"],
            "gold": int(rng.integers(3)),
        }
        for i in range(12)
    ]
    right = []
    for entry in entries:
        texts = [" " + choice for choice in entry["choices"]]
        scores = [log_likelihood(model, entry["query"], t) / (len(t.encode()) - 1) for t in texts]
        right.append(float(np.argmax(scores) == entry["gold"]))
    result = evaluate_task(model, None, write(tmp_path / "t.jsonl", *entries))
    assert result["accuracy"] == pytest.approx(np.mean(right))
    assert 0 < result["accuracy"] < 1
    assert (result["items"], result["change"], result["change_se"]) == (12, 0, 0)
    assert evaluate_task(model, None, tmp_path / "t.jsonl", limit=5)["items"] == 5


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_a_packed_model_answers_as_its_source(
    name: str, folders: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    """Also where choices share nothing, share all but the end, and continue several contexts."""
    pack(folders[name], tmp_path / "m.gguf", quant="f32")
    engine = Engine(tmp_path / "m.gguf", context=64)
    rng = np.random.default_rng(0)
    words = ["neuron", "works", "and", "rests", "sleeps", "in", "on", "the", "gate"]
    entries: list[dict[str, Any]] = []
    for i in range(20):
        some = [" ".join(rng.choice(words, n)) for n in (1, 5, 5, 9)]
        entries += [
            {"query": f"{some[1]} {i}", "choices": some[1:], "gold": int(rng.integers(3))},
            {"context_options": some[1:], "continuation": some[0], "gold": int(rng.integers(3))},
            {"context": some[2], "continuation": some[0]},
        ]
    path = write(tmp_path / "t.jsonl", *entries)
    plan = engine_plan(engine, Cut("inter", "topk", 0.1, "column_norm"))
    expected, found = (evaluate_task(m, plan, path) for m in (tiny[name], engine))
    assert found == pytest.approx(expected)
    assert 0 < found["accuracy"] < 1
    assert found["change_se"] > 0


def test_word_prediction(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    """What greedy decoding gives is right, anything else is wrong."""
    model = tiny["llama"]
    # Ids of plain text survive decoding and encoding only where the tokenizer would cut there.
    for i in range(50):
        context = f"neuron {i}"
        ids = model.tokenizer.encode(context)
        best = int(model.logits(model.hidden(ids[None]))[0, -1].argmax())
        word = model.tokenizer.decode([best])
        again = model.tokenizer.encode(context + word)
        if word.startswith(" ") and again.tolist() == [*ids.tolist(), best]:
            break
    else:
        pytest.fail("no context found whose greedy continuation is a word")
    path = write(
        tmp_path / "t.jsonl",
        {"context": context, "continuation": word[1:]},
        {"context": context, "continuation": word[1:] + "x"},
    )
    assert evaluate_task(model, None, path)["accuracy"] == 0.5


def test_nan_is_an_error_not_an_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    model = fallow.load(folders["llama"])
    assert model.layers[0].up_proj is not None
    model.layers[0].up_proj.weight[0, 0] = float("nan")
    path = write(tmp_path / "t.jsonl", {"query": "a", "choices": ["b", "c"], "gold": 0})
    with pytest.raises(FallowError, match="NaN or infinite logits"):
        evaluate_task(model, None, path)


def test_sparse_is_paired_with_dense(
    tiny: dict[str, fallow.Model], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tiny["llama"]
    plan = fallow.calibrate(model, "topk", sparsity=0.9, text=texts[0], context=32, windows=2)
    entries = [
        {"query": f"neuron {i}", "choices": ["rests", "works"], "gold": i % 2} for i in range(30)
    ]
    result = evaluate_task(model, plan, write(tmp_path / "t.jsonl", *entries))
    assert result["change"] == pytest.approx(result["accuracy"] - result["dense_accuracy"])
    assert result["change_se"] > 0
