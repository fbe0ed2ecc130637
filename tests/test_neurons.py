"""Neurons against plain numpy; explanations against an endpoint that is made up."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from conftest import TALK, make_folder
from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import attach
from fallow.reporting import explanation
from fallow.reporting.explanation import (
    RANDOM,
    STRONG,
    Endpoint,
    correlation,
    explain,
    key_from_environment,
    parse_activations,
)
from fallow.reporting.neurons import LENGTH, Neuron, _Seen, _Watch, examine, token_text, token_texts

Texts = tuple[Path, Path]
CONTEXT, WINDOWS = 64, 5


def stored(model: fallow.Model, texts: Texts, layer: int) -> dict[str, tuple[Any, Any]]:
    """Ids (n, T) and inter (n, T, d_ff) of every text's windows, by the text's name."""
    found = {}
    for path in texts:
        seen: list[list[np.ndarray]] = [[], []]
        windows = model.windows(load_text(path, "evaluation"), CONTEXT, WINDOWS)
        keep = {"inter": partial(lambda parts, i, v: parts[i].append(v.numpy().copy()), seen)}
        with attach(model.layers, keep):
            for window in windows:
                model.hidden(window[None])
        found[str(path)] = (windows, np.stack(seen[layer]))
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rates_and_snippets_against_numpy(
    name: str, tiny: dict[str, fallow.Model], texts: Texts
) -> None:
    model, layer, unit = tiny[name], 1, 5
    (found,) = examine(
        model, [(layer, unit)], texts, context=CONTEXT, windows=WINDOWS, snippets=4,
        random_snippets=3,
    )  # fmt: skip
    norm = np.linalg.norm(model.layers[layer].down_proj.weight.numpy(), axis=0)
    pieces = []
    for rate, (text, (windows, inter)) in zip(
        found.rates, stored(model, texts, layer).items(), strict=True
    ):
        out_norm = np.abs(inter) * norm
        middle = np.sort(out_norm, axis=2)[:, :, ::-1][:, :, round(0.5 * 37)]
        assert rate.text == text
        assert rate.tokens == windows.size
        assert rate.top_half == pytest.approx((out_norm[:, :, unit] > middle).mean())
        assert rate.natural == pytest.approx((out_norm[:, :, unit] >= 1e-7).mean())
        for w in range(len(windows)):
            for start in range(1, CONTEXT, LENGTH):
                peak = start + int(out_norm[w, start : start + LENGTH, unit].argmax())
                pieces.append((-out_norm[w, peak, unit], text, w, peak))
    chosen: list[tuple[str, int]] = []
    for _, text, w, peak in sorted(pieces, key=lambda piece: piece[0]):
        # A snippet reaches 20 tokens back and 7 ahead, but not out of its window.
        if all(t != text or v != w or abs(p - peak) >= LENGTH for t, v, p in chosen):
            chosen.append((text, w, peak))
    assert [(s.text, *divmod(s.start + s.peak, CONTEXT)) for s in found.snippets] == chosen[:4]
    everything = stored(model, texts, layer)
    for s in (*found.snippets, *found.random_snippets):
        windows, inter = everything[s.text]
        part = slice(s.start, s.start + len(s.tokens))
        values = inter.reshape(-1, 37)[part, unit]
        np.testing.assert_allclose(s.inter, values, rtol=1e-6)
        np.testing.assert_allclose(s.out_norm, np.abs(values) * norm[unit], rtol=1e-5)
        assert "".join(s.tokens) == model.tokenizer.decode(windows.ravel()[part])
    spans = [(s.text, s.start, s.start + len(s.tokens)) for s in found.snippets]
    spans += [(s.text, s.start, s.start + len(s.tokens)) for s in found.random_snippets]
    assert len(spans) == 7
    for i, (text, start, end) in enumerate(spans):
        assert all(t != text or end <= s or e <= start for t, s, e in spans[:i])


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])  # phi's head has a bias
def test_nearest_tokens_against_numpy(
    name: str, tiny: dict[str, fallow.Model], texts: Texts
) -> None:
    model = tiny[name]
    (found,) = examine(model, [(0, 36)], texts, context=32, windows=1)
    head = model.module.get_output_embeddings().weight.numpy()
    effect = head @ model.layers[0].down_proj.weight.numpy()[:, 36]
    order = np.argsort(effect)
    for nearest, ids in ((found.raised, order[::-1]), (found.lowered, order)):
        assert [t.token for t in nearest] == [token_text(model.tokenizer, i) for i in ids[:10]]
        np.testing.assert_allclose([t.logit for t in nearest], effect[ids[:10]], atol=1e-5)


def test_many_neurons_in_one_pass_equal_one_each(
    tiny: dict[str, fallow.Model], texts: Texts
) -> None:
    places = [(0, 3), (1, 3), (1, 30)]
    together = examine(tiny["llama"], places, texts, context=32, windows=3)
    alone = [examine(tiny["llama"], [p], texts, context=32, windows=3)[0] for p in places]
    assert together == alone


def test_what_is_kept_does_not_grow(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    watch, sizes = _Watch(2, 1, 0), []
    windows = tiny["llama"].windows(load_text(texts[0], "evaluation"), 32)
    for i, window in enumerate(windows):
        values = np.abs(np.sin(window + i)).astype(np.float32)
        watch.add("t", i * 32, window, _Seen(values, values, 1, 1))
        sizes.append(len(watch._strongest._heap) + len(watch._random._heap))
    assert max(sizes) == sizes[-1] == 3 * 2 + 1 + 2 * 2


def test_token_texts(tiny: dict[str, fallow.Model]) -> None:
    tokenizer = tiny["llama"].tokenizer
    ids = tokenizer.encode("a é 🙂 <b>\n")
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "a é 🙂 <b>\n"
    assert "🙂" in texts  # at its last byte
    assert token_texts(tokenizer, [0, *tokenizer.encode("a")]) == ["<s>", "a"]
    assert token_texts(tokenizer, ids[:3])[-1] == "\ufffd"  # half a character
    assert token_text(tokenizer, int(tokenizer.encode(" b")[0])) == " "
    assert token_text(tokenizer, 10_000) == "#10000"


def test_places_that_are_not_there(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    for place, message in (((2, 0), "--layer 2 is outside 0..1"), ((0, 37), "--neuron 37 is")):
        with pytest.raises(UsageError, match=message):
            examine(tiny["llama"], [place], texts, context=32)


# Explanations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1\t0\n2\t10\n3\t2.5", [0, 10, 2.5]),
        ("1. The: 0\n2. 2020: 7\n3. end = 1", [0, 7, 1]),
        ("**1** 4\n| 2 | the | 5 |\n 3: 6.", [4, 5, 6]),
        ("Sure!\n1\t0\n3\t4\n9\t1", [0, None, 4]),
        ("[1, 2, 3]", [1, 2, 3]),
        ("```json\n[1, 2.5,\n 3]\n```", [1, 2.5, 3]),
        ("0\n5\n10", [0, 5, 10]),
        ("<think>1\t9\n2\t9\n3\t9</think>1\t0\n2\t1\n3\t0", [0, 1, 0]),
        ("1\t0\n2\t11\n3\t-2", [0, None, None]),
        ("[1, 2]", [None] * 3),
        ("[[[" * 999, [None] * 3),
        ("1" * 500 + "\t3", [None] * 3),
        ("I cannot do this in 2 words.", [None] * 3),
        ("", [None] * 3),
    ],
)
def test_parse_activations(answer: str, expected: list[float | None]) -> None:
    wanted = [np.nan if value is None else value for value in expected]
    np.testing.assert_array_equal(parse_activations(answer, 3), wanted)


def test_correlation() -> None:
    true = np.arange(6.0)
    assert correlation([(true, 3 * true + 1), (true, 3 * true + 1)])[0] == pytest.approx(1)
    assert correlation([(true, -true)])[0] == pytest.approx(-1)
    some = np.where(true < 4, true**2, np.nan)
    expected = np.corrcoef(true[:4], some[:4])[0, 1]
    assert correlation([(true, some)]) == (pytest.approx(expected), None)
    few = np.where(true < 2, true, np.nan)
    assert correlation([(true, few)]) == (None, "answers had activations of 2 of 6 tokens only")
    assert correlation([(true, 0 * true)]) == (None, "all predicted activations are the same")
    assert correlation([(0 * true, true)]) == (None, "all true activations are the same")


Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class Fake:
    """An endpoint whose `answer` takes a request and gives status and body."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.requests, self.headers = answer, [], []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(body)
                fake.headers.append(dict(self.headers))
                status, content = fake.answer(body)
                self.send_response(status)
                self.send_header("Location", "/v1/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # clients that did not wait
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def said(text: str | None) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Fake]]:
    fakes: list[Fake] = []

    def start(answer: Answer) -> Fake:
        fakes.append(Fake(answer))
        threading.Thread(target=fakes[-1].server.serve_forever, args=(0.01,)).start()
        return fakes[-1]

    yield start
    for fake in fakes:
        fake.server.shutdown()
        fake.server.server_close()


@pytest.fixture(scope="module")
def neuron(tiny: dict[str, fallow.Model], texts: Texts) -> Neuron:
    return examine(
        tiny["llama"], [(1, 5)], texts, context=64, windows=6, snippets=STRONG,
        random_snippets=RANDOM,
    )[0]  # fmt: skip


def numbered_tokens(question: str) -> tuple[str, ...]:
    return tuple(m[1] for m in re.finditer(r"^\d+\t(.*)$", question, re.M))


def test_a_perfect_simulator_scores_one(serve: Any, neuron: Neuron) -> None:
    largest = max(neuron.snippets[0].out_norm)
    truth = {
        tuple(json.dumps(token, ensure_ascii=False)[1:-1] for token in s.tokens): s.out_norm
        for s in (*neuron.snippets, *neuron.random_snippets)
    }

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        question = body["messages"][0]["content"]
        if "numbered" not in question:
            return said("\n  It likes gates.\n")
        assert "It likes gates." in question
        values = truth[numbered_tokens(question)]
        return said("\n".join(f"{i}\t{10 * v / largest:.4f}" for i, v in enumerate(values, 1)))

    fake = serve(answer)
    found = explain(neuron, Endpoint(fake.url + "/", "some-model"))
    assert found.text == "It likes gates."
    assert found.score == pytest.approx(1, abs=1e-4)
    assert (found.reason, found.shown_snippets, found.held_out_snippets) == (None, 5, 10)
    assert found.scored_snippets == 10
    # The one that explains sees every other snippet, with rounded activations; none of the rest.
    asked = fake.requests[0]["messages"][0]["content"]
    for i, s in enumerate(neuron.snippets):
        lines = [
            f"{json.dumps(t, ensure_ascii=False)[1:-1]}\t{round(10 * v / largest)}"
            for t, v in zip(s.tokens, s.out_norm, strict=True)
        ]
        assert ("\n".join(lines) in asked) == (i % 2 == 0)
    assert {r["model"] for r in fake.requests} == {"some-model"}
    assert {r["temperature"] for r in fake.requests} == {0}
    assert len(fake.requests) == 11
    assert all("Authorization" not in headers for headers in fake.headers)


@pytest.mark.parametrize(
    ("simulated", "reason"),
    [
        ("I like trains.", "answers had activations of 0 of"),
        ("", "answers had activations of 0 of"),
        (None, "answers had activations of 0 of"),
        ("\n".join(f"{i}\t4" for i in range(1, 99)), "all predicted activations are the same"),
    ],
)
def test_nonsense_gets_no_score(
    serve: Any, neuron: Neuron, simulated: str | None, reason: str
) -> None:
    fake = serve(
        lambda body: said(
            simulated if "numbered" in body["messages"][0]["content"] else "Something."
        )
    )
    found = explain(neuron, Endpoint(fake.url, "m"))
    assert found.score is None
    assert found.reason.startswith(reason)


def test_an_empty_explanation_is_not_simulated(serve: Any, neuron: Neuron) -> None:
    fake = serve(lambda body: said(" \n"))
    found = explain(neuron, Endpoint(fake.url, "m"))
    assert (found.score, found.reason) == (None, "the answer is empty")
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": {"message": "wrong key"}}', "refuses: 401 wrong key; check --explain"),
        (500, b"<html>", "refuses: 500 Internal Server Error"),
        (302, b"", "refuses: 302 Found"),  # which would take the key elsewhere
        (200, b"<html>", "does not answer as OpenAI's chat/completions"),
        (200, b"{}", "does not answer as OpenAI's"),
        (200, b"[" * 100_000, "does not answer as OpenAI's"),
    ],
)
def test_endpoints_that_fail(
    serve: Any, neuron: Neuron, status: int, body: bytes, message: str
) -> None:
    fake = serve(lambda _: (status, body))
    with pytest.raises(FallowError) as error:
        explain(neuron, Endpoint(fake.url, "m"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_endpoints_that_cannot_be_reached(
    serve: Any, neuron: Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(FallowError, match=r"cannot reach http://127\.0\.0\.1.*refused"):
        explain(neuron, Endpoint(f"http://127.0.0.1:{port}/v1", "m"))
    stop = threading.Event()
    slow = serve(lambda _: (stop.wait(20), said("x"))[1])
    monkeypatch.setattr(explanation, "TIMEOUT", 0.2)
    with pytest.raises(FallowError, match=r"cannot reach .*timed out"):
        explain(neuron, Endpoint(slow.url, "m"))
    stop.set()
    for url in ("file:///etc/passwd", "127.0.0.1:8080", "http://"):
        with pytest.raises(UsageError, match="no address"):
            Endpoint(url, "m")


def test_too_few_snippets(neuron: Neuron) -> None:
    one = Neuron(**(vars(neuron) | {"snippets": neuron.snippets[:1], "random_snippets": []}))
    with pytest.raises(FallowError, match="1 snippets are too few"):
        explain(one, Endpoint("http://localhost:1", "m"))


def test_the_key(serve: Any, neuron: Neuron, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FALLOW_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert key_from_environment() is None
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert key_from_environment() == "second"
    monkeypatch.setenv("FALLOW_API_KEY", "first")
    fake = serve(lambda _: said(""))
    explain(neuron, Endpoint(fake.url, "m", key_from_environment()))
    assert fake.headers[0]["Authorization"] == "Bearer first"


def test_our_own_server(tmp_path: Path, neuron: Neuron) -> None:
    pytest.importorskip("fastapi")
    from fallow.engine.engine import Engine
    from fallow.packing.packer import pack
    from served import served

    folder = make_folder("llama", tmp_path / "model", max_position_embeddings=8192)
    (folder / "chat_template.jinja").write_text(TALK)
    pack(folder, tmp_path / "m.gguf", quant="f32")
    few = Neuron(**(vars(neuron) | {"snippets": neuron.snippets[:2], "random_snippets": []}))
    with served(Engine(tmp_path / "m.gguf", threads=1, context=8192)) as url:
        found = explain(few, Endpoint(url + "/v1", "tiny"))
        assert (found.shown_snippets, found.held_out_snippets) == (1, 1)
        assert (found.score is None) != (found.reason is None)
        with pytest.raises(FallowError, match="404 there is no model 'x' here"):
            explain(neuron, Endpoint(url + "/v1", "x"))


# The command -------------------------------------------------------------------------------------


def test_command(run: Any, serve: Any, folders: dict[str, Path], texts: Texts) -> None:
    command = ["neurons", folders["llama"], "--layer", 1, "--neuron", 5, "--context", 64]
    command += ["--text", texts[0], "--text", texts[1], "--windows", 4, "--snippets", 3]
    code, out, _ = run(*command, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (found["layer"], found["neuron"], len(found["snippets"])) == (1, 5, 3)
    assert [rate["text"] for rate in found["rates"]] == list(map(str, texts))
    assert "explanation" not in found
    assert "random_snippets" not in found
    code, out, _ = run(*command)
    assert out.count("«") == 3
    assert "raised by one unit of inter" in out
    assert len(out.splitlines()) == 1 + 2 + 2 + 1 + 3
    fake = serve(lambda _: said("A thing."))
    asked = (*command, "--explain", fake.url, "--explain-model", "m")
    explained = json.loads(run(*asked, "--json")[1].splitlines()[-1])["explanation"]
    assert (explained["text"], explained["score"]) == ("A thing.", None)
    assert "no score: answers had activations of 0 of" in run(*asked)[1]


def test_default_texts_are_the_two_halves(run: Any, folders: dict[str, Path]) -> None:
    command = ["neurons", folders["opt"], "--layer", 0, "--neuron", 0, "--context", 16]
    found = json.loads(run(*command, "--windows", 1, "--json")[1].splitlines()[-1])
    names = [rate["text"] for rate in found["rates"]]
    assert names == ["python-reference/calibration", "python-reference/evaluation"]


def test_command_errors(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    place = ["neurons", folders["llama"], "--layer", 0, "--neuron", 0]
    for arguments, code, message in (
        ([*place[:-1], 99], 2, "--neuron 99 is outside 0..36"),
        ([*place, "--explain", "http://localhost:1"], 2, "belong together"),
        ([*place, "--explain", "nowhere", "--explain-model", "m"], 2, "no address"),
        ([*place, "--text", tmp_path / "none"], 1, "cannot read text"),
        ([*place, "--snippets", 0], 2, "--snippets"),
    ):
        found = run(*arguments)
        assert (found[0], found[1]) == (code, "")
        assert message in found[2]
        assert len(found[2].splitlines()) <= 2
