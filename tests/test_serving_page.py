"""The server's web page: how it is sent, what tokens tell of neurons, and talks in a browser."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from conftest import engine_plan
from engines import IDS, one_by_one
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import BINS, Activity
from fallow.plan import Cut
from looks import cut_texts, faint, small_controls, tab_order
from served import HI, served
from test_memory import COMING, Foresight

CHAT = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 9, "stream": True}
NO_PLAN = "Every neuron is computed: the file has no plan"


def endless(talking: Path) -> Engine:
    """One whose answers have as many tokens as are asked for."""
    engine = Engine(talking, threads=2)
    engine.tokenizer = dataclasses.replace(engine.tokenizer, eos_ids=())
    return engine


@pytest.fixture(scope="module")
def planned(talking: Path) -> Engine:
    """Under a plan that leaves out as many neurons as tokens have small gates."""
    engine = endless(talking)
    engine.use_plan(engine_plan(engine, Cut("gate_act", "threshold", 0.3)))
    return engine


@pytest.fixture(scope="module")
def planned_address(planned: Engine) -> Iterator[str]:
    with served(planned) as found:
        yield found


def chunks(address: str, **changes: Any) -> list[Any]:
    body = CHAT | {"stream_options": {"include_usage": True}} | changes
    lines = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


# Routes -------------------------------------------------------------------------------------------


def test_the_page_asks_nobody_else(address: str) -> None:
    page = httpx.get(address)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    policy = dict(p.split(" ", 1) for p in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script(?! src=)|<style| style=| on\w+=", page.text)
    assert set(re.findall(r"//[\w.]+", page.text)) == {"//www.w3.org"}  # a namespace, of the icon
    assets = re.findall(r'(?:src|href)="(page\.[^"]+)"', page.text)
    assert [re.sub(r"\?\w{16}$", "", name) for name in assets] == ["page.css", "page.js"]
    for name, kind in zip(assets, ("css", "javascript"), strict=True):
        asset = httpx.get(f"{address}/{name}")
        assert asset.headers["content-type"] == f"text/{kind}; charset=utf-8"
        assert "immutable" in asset.headers["cache-control"]
        assert asset.headers["x-content-type-options"] == "nosniff"
        assert "http" not in asset.text
    assert httpx.post(address).status_code == 405


def test_the_page_needs_no_key(engine: Engine) -> None:
    with served(engine, api_key="secret") as address:
        for path in ("", "/page.css", "/page.js"):
            assert httpx.get(address + path).status_code == 200
        for path in ("/page", "/page.html", "/v1/models"):
            assert httpx.get(address + path).status_code == 401
    with served(engine, hosts=["localhost"]) as address:
        assert httpx.get(address).status_code == 403


def test_the_model_tells_its_plan(address: str, planned_address: str) -> None:
    cards = [httpx.get(f"{a}/v1/models").json()["data"][0] for a in (address, planned_address)]
    assert [card["plan"] for card in cards] == [None, "by hand, knob 0"]


# Activity -----------------------------------------------------------------------------------------


def test_nothing_is_recorded_unasked(planned: Engine) -> None:
    planned.reset()
    planned.forward([3], record=True)
    assert planned.active_neurons().shape == (1, 2, 37)
    planned.forward([4])
    assert planned.active_neurons().shape == (0, 2, 37)
    plain = one_by_one(planned)
    planned.reset()
    recorded = [planned.forward(IDS[i : i + 1], record=True) for i in range(len(IDS))]
    np.testing.assert_array_equal(np.concatenate(recorded), plain)


def test_bins_are_shares_of_equal_ranges() -> None:
    neurons = np.random.default_rng(0).random((3, 1000)) < 0.4
    found = Activity.of(neurons, [1000] * 3, 7)
    parts = [neurons[:, b * 1000 // BINS : (b + 1) * 1000 // BINS] for b in range(BINS)]
    np.testing.assert_allclose(found.bins, np.stack([p.mean(axis=1) for p in parts], axis=1))
    np.testing.assert_allclose(found.active, neurons.mean(axis=1))
    found = Activity.of(neurons[:, :37], [37] * 3, 0)
    np.testing.assert_array_equal(found.bins, neurons[:, :37])


def test_activities_add_up_to_the_figures(planned: Engine) -> None:
    """Tokens after the first tell what the answer's figures do, and the text is the same."""
    ids = planned.tokenizer.prompt("neuron 3 rests")
    said = "".join(p.text for p in planned.answer(ids, 30, Sampler()))
    pieces = list(planned.answer(ids, 30, Sampler(), activity=True))
    assert "".join(p.text for p in pieces) == said
    found: Any = [t.activity for p in pieces for t in p.tokens]
    stats = planned.stats
    assert len(found) == stats.new_tokens == 30
    assert found[0].bytes_read is None
    assert len({a.active.sum() for a in found}) > 1
    active = np.mean([a.active for a in found[1:]], axis=0)
    np.testing.assert_allclose(1 - active, stats.sparsity_per_layer, atol=1e-12)
    assert np.mean([a.bytes_read for a in found[1:]]) == pytest.approx(stats.bytes_per_token)
    pieces = list(planned.answer(ids, 3, Sampler(), lossless=True, activity=True))
    assert all(t.activity.active.min() == 1 for p in pieces for t in p.tokens)  # type: ignore


def test_activity_of_a_stream(planned: Engine, planned_address: str) -> None:
    *made, usage = chunks(planned_address, fallow_activity=True)
    told = [a for chunk in made for a in chunk.get("fallow_activity", ())]
    stats = planned.stats
    assert len(told) == stats.new_tokens == 9
    assert [a["bytes_read"] is None for a in told] == [True] + [False] * 8
    active = np.array([a["active_per_layer"] for a in told])
    np.testing.assert_allclose(1 - active[1:].mean(axis=0), stats.sparsity_per_layer, atol=1e-4)
    assert 0.1 < active.mean() < 0.9
    bins = np.array([a["active_bins"] for a in told])
    assert bins.shape == (9, 2, 37)
    np.testing.assert_allclose(bins.mean(axis=2), active, atol=1e-4)
    read = sum(a["bytes_read"] for a in told[1:])
    assert read / 8 == pytest.approx(usage["usage"]["sparsity"]["bytes_per_token"])
    unasked = chunks(planned_address)
    assert "fallow_activity" not in json.dumps(unasked)
    assert [c["choices"] for c in unasked] == [c["choices"] for c in [*made, usage]]


def test_activity_where_guesses_are_read_along(
    planned: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As within a memory budget: every token has its own neurons, and a pass its bytes once."""
    ids = planned.tokenizer.prompt("neuron 3 rests").tolist()

    def tokens() -> Any:
        pieces = planned.answer(ids, 60, Sampler(), activity=True)
        return [t for p in pieces for t in p.tokens]

    single = tokens()
    COMING[:] = ids + [t.id for t in single]
    monkeypatch.setattr("fallow.engine.answer.Lookup", Foresight)
    monkeypatch.setattr(Engine, "streams", True)
    several = tokens()
    assert 0 < planned.stats.accepted < planned.stats.drafted
    read = [t.activity.bytes_read for t in several[1:]]
    assert 0 in read
    assert sum(read) == planned.core_stats()["bytes_read"]
    for one, other in zip(single, several, strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.activity.bins, other.activity.bins)


def test_an_embedding_without_the_plan(planned: Engine, planned_address: str) -> None:
    under = planned.embed("neuron 3")
    for extra, differs in (({}, False), ({"fallow_plan": False}, True)):
        body = {"model": "tiny", "input": "neuron 3"} | extra
        found = httpx.post(f"{planned_address}/v1/embeddings", json=body).json()["data"][0]
        assert (np.abs(under - found["embedding"]).max() > 1e-4) == differs


def test_an_answer_without_the_plan(planned: Engine, planned_address: str, talking: Path) -> None:
    """The text of an engine without a plan, whatever the cache holds; then the plan is back."""
    plain = endless(talking)
    with openai.OpenAI(base_url=f"{planned_address}/v1", api_key="any") as client:
        options: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 30}

        def say(with_plan: bool | None) -> str | None:
            body = {"fallow_plan": with_plan}
            answer = client.chat.completions.create(**options, extra_body=body)
            return answer.choices[0].message.content

        sparse, dense = say(True), say(False)
        assert planned.plan is None
        assert planned.idle_neurons().max() == 0
        assert dense == "".join(plain.generate("hi", 30, chat=True))
        assert sparse != dense
        assert [say(None), say(False), say(True)] == [sparse, dense, sparse]
        assert planned.plan is not None


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(params=[(390, 844), (1440, 900)], ids=["phone", "desk"])
def view(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab; `faults` has what a page must not say or ask."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    tab = context.new_page()
    tab.faults = []
    tab.on("console", lambda message: tab.faults.append(message.text))
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on(
        "request",
        lambda r: r.url.startswith(("http://127.0.0.1:", "data:")) or tab.faults.append(r.url),
    )
    yield tab
    context.close()


def ask(view: Any, question: str) -> Any:
    """The answer's element, when it is whole."""
    before = view.locator(".answer").count()
    view.fill("#question", question)
    view.press("#question", "Enter")
    answer = view.locator(".answer").nth(before)
    answer.wait_for()
    view.locator("#send").wait_for()
    return answer


def picture(view: Any) -> str:
    return view.evaluate("() => document.getElementById('layers').toDataURL()")


def test_a_talk(view: Any, planned: Engine, planned_address: str) -> None:
    view.goto(planned_address)
    view.locator("#about", has_text="tiny, plan by hand").wait_for()
    view.fill("#temperature", "0")
    view.fill("#longest", "20")
    blank = picture(view)
    answer = ask(view, "hi <b>there</b>")
    assert view.locator(".asked").inner_text() == "hi <b>there</b>"
    said = "".join(planned.generate("hi <b>there</b>", 20, chat=True))
    assert answer.locator("p").text_content() == said
    whole = picture(view)
    assert whole != blank
    assert "20 tokens" in answer.locator("small").inner_text()
    assert "with the plan" in answer.locator("small").inner_text()
    skipped = float(view.locator("#skipped").inner_text().split()[0]) / 100
    assert skipped == pytest.approx(planned.stats.sparsity, abs=0.1)
    tokens = answer.locator("span")
    last = view.locator("#which").inner_text()
    tokens.nth(1).hover()
    assert view.locator("#which").inner_text() != last
    view.wait_for_function(f"() => document.getElementById('layers').toDataURL() !== {whole!r}")
    tokens.last.focus()
    view.locator("#which", has_text=last).wait_for()
    view.keyboard.press("ArrowLeft")
    assert tokens.nth(-2).evaluate("token => token === document.activeElement")
    view.uncheck("#with-plan")
    ask(view, "so?")
    assert planned.plan is None
    assert "without the plan" in view.locator(".answer small").last.inner_text()
    assert view.locator("#note").inner_text() == "Without its plan every neuron is computed."
    # Figures and note are those of the answer whose token is shown.
    assert view.locator("#skipped").inner_text() == "0.0 %"
    answer.locator("span").first.hover()
    assert view.locator("#skipped").inner_text() in answer.locator("small").inner_text()
    assert not view.locator("#note").is_visible()
    page = "document.documentElement"
    assert view.evaluate(f"() => {page}.scrollWidth <= innerWidth")
    assert view.evaluate(f"() => {page}.scrollHeight <= innerHeight")
    assert view.locator("header").bounding_box()["height"] < 110
    assert view.locator("#log").bounding_box()["height"] > 200
    assert cut_texts(view) == []
    assert view.locator("#rows").is_visible()
    assert view.locator("#scale").is_visible()
    order = tab_order(view, "#with-plan", 8)
    assert order == ["new", "log", "span", "span", "question", "send", "temperature", "longest"]
    view.click("#new")
    assert view.locator(".answer").count() == 0
    assert view.locator("#log .hint").is_visible()
    assert view.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_for_fingers_and_eyes(browser: Any, planned_address: str, scheme: str) -> None:
    size = {"width": 390, "height": 844}
    context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=True)
    view = context.new_page()
    view.goto(planned_address)
    view.fill("#longest", "9")
    assert small_controls(view) == faint(view) == cut_texts(view) == []
    ask(view, "neuron " * 30)
    assert small_controls(view) == faint(view) == cut_texts(view) == []
    for field in ("#question", "#temperature", "#longest"):  # or phones zoom in
        size = view.locator(field).evaluate("e => getComputedStyle(e).fontSize")
        assert float(size.removesuffix("px")) >= 16
    for width, height, room in ((390, 450, 150), (844, 390, 150), (320, 568, 100)):
        view.set_viewport_size({"width": width, "height": height})
        assert view.locator("#log").bounding_box()["height"] > room
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.locator("#send").bounding_box()["y"] + 44 <= height
    context.close()


def test_a_server_that_is_gone_is_told(browser: Any, engine: Engine) -> None:
    view = browser.new_page()
    with served(engine) as address:
        view.goto(address)
        view.locator("#about", has_text="tiny").wait_for()
    answer = ask(view, "hi")
    assert "is fallow serve still running?" in answer.locator(".error").inner_text()
    view.close()


def test_a_key_a_stop_and_no_plan(
    view: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(engine, api_key="secret") as address:
        view.goto(address)
        view.fill("#key-field", "wrong")
        view.press("#key-field", "Enter")
        view.locator("#about", has_text="missing or wrong").wait_for()
        view.fill("#key-field", "secret")
        view.press("#key-field", "Enter")
        view.locator("#about", has_text="tiny, no plan").wait_for()
        assert not view.locator("#key").is_visible()
        assert not view.locator("#with-plan").is_visible()
        view.fill("#longest", "9")
        ask(view, "hi")
        assert view.locator("#note").inner_text().startswith(NO_PLAN)
        assert view.locator("#skipped").inner_text() == "0.0 %"
        view.fill("#longest", "5000")  # to the end of the context
        read = engine.read

        def slowly(reads: Any) -> None:
            time.sleep(0.05)
            read(reads)

        monkeypatch.setattr(engine, "read", slowly)
        view.fill("#question", "hi")
        view.press("#question", "Control+Enter")
        view.locator(".answer").last.locator("span").nth(20).wait_for()
        view.keyboard.press("Escape")
        view.locator("#send").wait_for()
        assert "stopped" in view.locator(".answer small").last.inner_text()
        kept = "() => sessionStorage.length + localStorage.length + document.cookie.length"
        assert view.evaluate(kept) == 0
        # Refused requests are told in the console, too: of the page itself and of the wrong key.
        assert all("401" in fault for fault in view.faults)
        view.reload()
        view.locator("#key").wait_for()  # the key was kept nowhere


def test_an_error_is_told(view: Any, address: str) -> None:
    view.goto(address)
    view.locator("#about", has_text="tiny").wait_for()
    answer = ask(view, "neuron " * 140)
    assert "fills the context" in answer.locator(".error").inner_text()
    assert view.locator("#question").input_value().startswith("neuron")  # to be changed
