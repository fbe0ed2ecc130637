"""Conversations: history, the cache between turns, commands, and Ctrl-C."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import engine_plan
from fallow import cli
from fallow.chat import Conversation, _Screen
from fallow.engine import Engine, Sampler
from fallow.errors import FallowError


@pytest.fixture
def engine(talking: Path) -> Engine:
    return Engine(talking, threads=1)


def talk(engine: Engine, **options: Any) -> Conversation:
    return Conversation(engine, Sampler(), **({"max_tokens": 6} | options))


def test_an_answer_is_that_of_the_whole_history(engine: Engine) -> None:
    conversation = talk(engine, system="rest")
    answers = ["".join(conversation.answer(text)) for text in ("hi", "more")]
    assert engine.stats.cached_tokens > 10  # the first exchange
    roles = [m["role"] for m in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in conversation.messages[2::2]] == answers
    ids = engine.tokenizer.chat(conversation.messages[:-1])
    assert "".join(engine.generate(ids, 6)) == answers[1]


def test_a_reset_forgets(engine: Engine) -> None:
    conversation = talk(engine)
    first = "".join(conversation.answer("hi"))
    conversation.reset()
    assert "".join(conversation.answer("hi")) == first
    assert len(conversation.messages) == 2


def test_the_oldest_exchange_goes_first(talking: Path) -> None:
    conversation = talk(Engine(talking, threads=1, context=60), system="rest")
    for i in range(6):
        list(conversation.answer(f"{i}?"))
    assert conversation.forgotten > 0
    assert conversation.messages[0] == {"role": "system", "content": "rest"}
    assert conversation.messages[1]["role"] == "user"
    assert conversation.messages[-2]["content"] == "5?"
    with pytest.raises(FallowError, match="exceed the context of 60"):
        list(conversation.answer("neuron " * 60))
    assert conversation.messages[-1]["role"] == "assistant"


def test_an_answer_that_is_broken_off_was_said(engine: Engine) -> None:
    conversation = talk(engine, max_tokens=30)
    pieces = conversation.answer("hi")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": first}


def test_commands(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    n_layers = 2
    import numpy as np

    plan = engine_plan(engine, "fat", {"threshold.gate_act": np.full(n_layers, 0.5, np.float32)})
    engine.use_plan(plan)
    screen = _Screen(talk(engine), show_stats=False)
    screen.do("/dense")
    assert engine.plan is None
    screen.do("/dense")
    assert engine.plan is plan
    screen.do("/stats")
    screen.do("hi")
    printed = capsys.readouterr()
    assert printed.out.strip() == screen.conversation.messages[-1]["content"].strip()
    assert "of neurons idle" in printed.err
    assert not printed.err.strip().endswith(" 0% of neurons idle")
    screen.do("/system be brief")
    assert screen.conversation.messages == [{"role": "system", "content": "be brief"}]
    with pytest.raises(FallowError, match="unknown command /sing"):
        screen.do("/sing")
    with pytest.raises(FallowError, match="no plan to leave"):
        talk(Engine(engine.path, plan=False)).toggle_dense()


def test_live_figures(engine: Engine) -> None:
    from rich.console import Console

    screen = _Screen(talk(engine, max_tokens=12), show_stats=True)
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    screen.answer("hi")
    shown = screen.console.file.getvalue()  # type: ignore[attr-defined]
    assert "tok/s" in shown
    for line in screen.conversation.messages[-1]["content"].split("\n"):
        assert line.strip() in shown


def shown_until(screen: _Screen, pieces: list[str], width: int = 200) -> str:
    """What a terminal is given of an answer that Ctrl-C ends after these pieces."""
    from rich.console import Console

    def interrupted() -> Iterator[str]:
        yield from pieces
        raise KeyboardInterrupt

    screen.console = Console(file=io.StringIO(), force_terminal=True, width=width)
    screen.conversation.answer = lambda _: interrupted()  # type: ignore[method-assign]
    screen.answer("hi")
    return screen.console.file.getvalue()  # type: ignore[attr-defined]


def test_ctrl_c_leaves_the_last_line(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    screen = _Screen(talk(engine), show_stats=True)
    list(screen.conversation.answer("hi"))
    shown = shown_until(screen, ["one\ntw", "o"])
    # Behind the last erased line (ECMA-48: EL, CSI 2 K) is what stays.
    assert shown.rpartition("\x1b[2K")[2].split() == ["two"]
    err = capsys.readouterr().err
    assert "ended\n" in err
    assert "6 tokens, " in err


def test_live_figures_begin_with_the_second_token(engine: Engine) -> None:
    from rich.console import Console

    screen = _Screen(talk(engine, max_tokens=1), show_stats=True)
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    screen.answer("hi")
    assert "idle" not in screen.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/sing\n\nhi again\n/quit\nnever\n"))
    monkeypatch.setattr(
        "sys.argv",
        ["fallow", "chat", str(talking), "--max-new-tokens", "4", "--temperature", "0", "--stats"],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert "unknown command /sing" in printed.err
    assert printed.err.count("tok/s") == 2
    engine = Engine(talking)
    assert printed.out.startswith("".join(engine.generate("hi", 4, chat=True)))
