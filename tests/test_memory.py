"""A memory budget: the same logits to the bit, whatever of the model comes from the disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import (
    EXPERTS,
    PACKED,
    PACKED_DENSE,
    VOCABULARY,
    OnDemand,
    engine_plan,
    make_folder,
)
from fallow.checkpoints.text import load_text
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine import engine as module
from fallow.engine import memory
from fallow.engine.engine import Engine
from fallow.engine.memory import (
    RESERVE,
    SLOTS,
    Residency,
    experts_of,
    head_rows,
    parse_size,
    parts_of,
    residencies,
)
from fallow.engine.packed import packed_windows
from fallow.engine.process import rss_bytes
from fallow.engine.sampling import Sampler
from fallow.measure import quality
from fallow.measure.quality import evaluate_engine
from fallow.packing.packer import pack
from fallow.plan import Cut, Plan

IDS = np.random.default_rng(1).integers(2, VOCABULARY, 120)
LAYERS = 5
Packed = Mapping[str, Path]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Every architecture as F32, and a Llama in Q4_K."""
    root = tmp_path_factory.mktemp("memory")
    experts = {"hidden_size": 256, "moe_intermediate_size": 32, "head_dim": 64}
    experts |= {"num_experts": 24, "num_experts_per_tok": 2}  # a block has few tokens for each
    others: dict[str, tuple[str, str, dict[str, Any]]] = {
        "q4_k": ("llama", "q4_k", {"hidden_size": 256}),
        "q4_k_experts": ("qwen3_moe", "q4_k", experts),
        "untied": ("llama", "f32", {"hidden_size": 32}),
        "tied": ("llama", "f32", {"hidden_size": 32, "tie_word_embeddings": True}),
        "two_widths": ("gemma4", "f32", {"use_double_wide_mlp": True}),
    }

    def make(name: str) -> Path:
        architecture, quant, changes = others.get(name, (name, "f32", {}))
        folder = make_folder(architecture, root / name, num_hidden_layers=LAYERS, **changes)
        path = root / f"{name}.gguf"
        pack(folder, path, quant=quant, shortlist=name in ("untied", "tied"))
        return path

    return OnDemand((*PACKED, *others), make)


def plan_for(engine: Engine, gate_act: float, inter: float) -> Plan:
    return engine_plan(
        engine,
        Cut("gate_act", "threshold", gate_act),
        Cut("inter", "threshold", inter, "column_norm"),
    )


@pytest.fixture
def no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets count weights alone: this process is far larger than these models."""
    monkeypatch.setattr(module, "rss_bytes", lambda: 0)


def options(path: Path) -> list[Residency]:
    file = read_gguf(path)
    return residencies(parts_of(file, False), None, experts_of(file))


def budgets(path: Path) -> list[int]:
    """Five from all weights in memory to none of the FFNs'."""
    sizes = [r.memory for r in options(path)]
    chosen = [sizes[i] for i in np.linspace(0, len(sizes) - 1, 5).astype(int)]
    return [RESERVE + max(size, min(sizes)) for size in chosen]


def logits(engine: Engine) -> list[np.ndarray]:
    """In a block, a few at once, and one by one."""
    engine.reset()
    parts = [(IDS[:20], False), (IDS[20:24], True), (IDS[24:27], False)]
    parts += [(IDS[i : i + 1], False) for i in range(27, 40)]
    found = [engine.forward(part, every=True, dense=dense) for part, dense in parts]
    engine.reset()
    return [*found, engine.forward(IDS, every=True)]


@pytest.mark.usefixtures("no_overhead")
@pytest.mark.parametrize("name", [*PACKED_DENSE, "q4_k", "two_widths"])
def test_logits_do_not_depend_on_the_budget(name: str, packed: Packed) -> None:
    expected = logits(Engine(packed[name]))
    streamed = []
    for budget in budgets(packed[name]):
        engine = Engine(packed[name], memory=budget)
        assert engine.residency is not None
        for found, whole in zip(logits(engine), expected, strict=True):
            np.testing.assert_array_equal(found, whole)
        disk = engine.core_stats()["disk"]
        assert (disk["waits"] > 0) == (engine.residency.pass_bytes > 0)
        streamed.append(engine.residency.pass_bytes)
    assert streamed == sorted(streamed)
    assert streamed[0] == 0
    assert len(set(streamed)) > 2


@pytest.mark.usefixtures("no_overhead")
@pytest.mark.parametrize("name", [*EXPERTS, "q4_k_experts"])
def test_experts_come_from_the_file(name: str, packed: Packed) -> None:
    """As many are kept as there is room for, at least those of a token; logits stay the same."""
    path = packed[name]
    file = read_gguf(path)
    experts = experts_of(file)
    assert experts is not None
    expected = logits(Engine(path))
    (whole, least) = options(path)
    assert least.experts == experts
    found = []
    for budget in (whole.memory, least.memory + 5 * experts.slot, least.memory):
        engine = Engine(path, memory=RESERVE + budget)
        assert engine.residency is not None
        for _ in range(2):
            for some, all_there in zip(logits(engine), expected, strict=True):
                np.testing.assert_array_equal(some, all_there)
        disk = engine.core_stats()["disk"]
        assert disk["missing_experts"] <= disk["experts"]
        found.append((disk["missing_experts"], disk["bytes"]))
    missing, read = np.array(found).T
    assert 0 == missing[0] < missing[1] < missing[2]
    # Beside the embedding; and what was read ahead in vain.
    assert (read - read[0] >= missing * experts.size).all()
    assert engine.residency.experts == experts
    with pytest.raises(FallowError, match=r"is too little for .*; the least is \d+ MB"):
        Engine(path, memory=RESERVE + least.memory - 1)


@pytest.mark.usefixtures("no_overhead")
def test_hot_experts_are_kept(packed: Packed) -> None:
    """Of tokens that come again and again all experts are there at last, whatever came between."""
    path = packed["qwen3_moe"]
    (_, least) = options(path)
    assert least.experts is not None
    engine = Engine(path, memory=RESERVE + least.memory)
    for token in [5] * 60 + [9]:
        engine.reset()
        engine.forward([token])
    engine.reset_stats()
    engine.reset()
    engine.forward([5])
    assert engine.core_stats()["disk"]["missing_experts"] <= least.experts.used // 2


@pytest.mark.usefixtures("no_overhead")
def test_plans_do_not_depend_on_the_budget(packed: Packed) -> None:
    found = []
    for budget in (None, budgets(packed["q4_k"])[2]):
        engine = Engine(packed["q4_k"], memory=budget)
        engine.use_plan(plan_for(engine, gate_act=0.1, inter=0.02))
        found.append(logits(engine))
    for mapped, streamed in zip(*found, strict=True):
        np.testing.assert_array_equal(mapped, streamed)


@pytest.fixture
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head a few rows stay, and it is read in parts of 64."""
    monkeypatch.setattr(memory, "HEAD_ROWS", 40)
    monkeypatch.setattr(memory, "RANGE", 64 * 32 * 4)
    monkeypatch.setattr(module, "RANGE", 64 * 32 * 4)


@pytest.mark.usefixtures("no_overhead", "small_head")
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_rows_of_the_head_come_from_the_file(name: str, packed: Packed) -> None:
    """Those that a shortlist wants, more or fewer than there is room for, or all."""
    path = packed[name]
    file = read_gguf(path)
    choices = residencies(parts_of(file, True), head_rows(file))
    assert [r.head is not None for r in choices[:3]] == [False, True, True]
    assert choices[1].memory < choices[0].memory
    assert choices[0].pass_bytes == choices[1].pass_bytes == 0
    for margin in (0.5, 2.0, 1000.0):
        found = []
        for budget in (None, RESERVE + choices[1].memory, RESERVE + choices[-1].memory):
            plan = engine_plan(Engine(path, plan=False), head_margin=margin)
            engine = Engine(path, plan, memory=budget)
            found.append(logits(engine))
            if budget is None:
                continue
            disk = engine.core_stats()["disk"]
            assert 0 < disk["missing_rows"] < disk["rows"]  # some serve more than once
            engine.use_plan(None)
            found.append(logits(engine))
        plan_mapped, *others = found
        dense = logits(Engine(path, plan=False))
        for expected, some in zip((plan_mapped, dense) * 2, others, strict=True):
            for a, b in zip(some, expected, strict=True):
                np.testing.assert_array_equal(a, b)


class Foresight:
    """In place of Lookup: guesses what comes, but for every third token."""

    def __init__(self, ids: list[int], pass_cost: object) -> None:
        self._at = len(ids)

    def add(self, token: int) -> None:
        self._at += 1

    def propose(self, most: int) -> list[int]:
        return [t if (self._at + i) % 3 else 2 for i, t in enumerate(COMING[self._at :][:most])]

    def learn(self, proposed: int, held: int, seconds: float) -> None:
        assert held <= proposed


COMING: list[int] = []


@pytest.mark.usefixtures("no_overhead")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_guesses_do_not_change_the_text(
    temperature: float, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes from the disk is read for several tokens at once, under a plan too."""
    path, prompt = packed["q4_k"], IDS[:24]
    engine = Engine(path)
    plan = plan_for(engine, gate_act=0.1, inter=0.02)
    engine.use_plan(plan)
    sampler = Sampler(temperature=temperature, seed=3)
    COMING[:] = prompt.tolist()
    logits = engine.forward(prompt)[0]
    for _ in range(60):
        COMING.append(sampler.pick(logits))
        logits = engine.forward(COMING[-1:])[0]
    options: dict[str, Any] = {"max_tokens": 60, "temperature": temperature, "seed": 3}
    expected = "".join(engine.generate(prompt, **options))
    assert engine.stats.drafted == 0

    monkeypatch.setattr("fallow.engine.answer.Lookup", Foresight)
    streamed = Engine(path, memory=budgets(path)[-1])
    streamed.use_plan(plan)
    assert "".join(streamed.generate(prompt, **options)) == expected
    assert 0 < streamed.stats.accepted < streamed.stats.drafted


def test_residencies(packed: Packed) -> None:
    """One part more is read each time, of layers far apart, one matrix after the other."""
    for name in ("llama", "q4_k"):
        parts = parts_of(read_gguf(packed[name]), False)
        found = residencies(parts)
        assert [len(_streamed(r)) for r in found] == list(range(len(found)))
        for r in found:
            names = sorted(p.name for p in [*r.resident, *_streamed(r)])
            assert names == sorted(p.name for p in parts)
            assert list(r.streamed) == sorted(r.streamed)
            largest = max((sum(p.room for p in ps) for ps in r.streamed.values()), default=0)
            assert r.memory == sum(p.room for p in r.resident) + SLOTS * largest
        assert {p.layer for p in _streamed(found[2])} == {0, 4}
        assert {p.matrix for p in _streamed(found[LAYERS])} == {"gate_proj"}


def _streamed(residency: Any) -> list[Any]:
    return [p for parts in residency.streamed.values() for p in parts]


@pytest.mark.usefixtures("no_overhead")
def test_evaluation_does_not_depend_on_the_budget(
    packed: Packed, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose dense logits lie in a file meanwhile, and come in parts of 20 tokens."""
    monkeypatch.setattr(quality, "LOGITS_AT_ONCE", 20 * VOCABULARY)
    monkeypatch.setattr(quality, "LOGITS_AT_ONCE_IN_BUDGET", 20 * VOCABULARY)
    path, found = packed["q4_k"], []
    for budget in (None, budgets(path)[-1]):
        engine = Engine(path, memory=budget)
        plan = plan_for(engine, gate_act=0.1, inter=0.02)
        windows = packed_windows(path, load_text(texts[1], "evaluation"), 50, 3)
        for decode in (False, True):
            given = {"context": 50, "decode": decode}
            cut = evaluate_engine(engine, plan, texts[1], windows=windows, **given)
            found.append(cut.to_json())
            assert found[-1]["kl_to_dense"]["mean"] > 0
        assert found[-1] == evaluate_engine(engine, plan, texts[1], windows=3, **given).to_json()
    assert found[:2] == found[2:]


def test_the_cache_of_keys_and_values_is_there_at_once(tmp_path: Path) -> None:
    """A budget counts what is resident when weights are chosen."""
    context = 1 << 16
    folder = make_folder("llama", tmp_path / "m", max_position_embeddings=context)
    path = tmp_path / "m.gguf"
    pack(folder, path, quant="f32")
    Engine(path, threads=1)  # what the first one takes for good
    before = rss_bytes()
    engine = Engine(path, threads=1, context=context)
    sizes = [engine.file.get(f"fallow.{key}") for key in ("n_layers", "n_kv_heads", "head_dim")]
    cache = context * int(np.prod(sizes)) * 2 * 2  # keys and values, two bytes each
    assert rss_bytes() - before > 0.9 * cache


@pytest.mark.parametrize("memory", [None, "3GB"])
def test_inputs_of_layers_stay_in_the_file(memory: str | None, tmp_path: Path) -> None:
    """A token needs one row of them, so that a model takes no memory for the others."""
    make_folder("gemma4", tmp_path / "m", hidden_size_per_layer_input=8192)
    path = tmp_path / "m.gguf"
    pack(tmp_path / "m", path, quant="f32")
    rows = read_gguf(path).tensors["embed_tokens_per_layer.weight"]
    script = (  # in a process of its own, which holds nothing else
        "from fallow.engine.engine import Engine; from fallow.engine.process import rss_bytes\n"
        f"before = rss_bytes(); engine = Engine({str(path)!r}, memory={memory!r}, context=16)\n"
        "engine.forward(list(range(2, 18))); print(rss_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(done.stdout) < rows.data.nbytes, done.stderr
    assert rows.data.nbytes == 300 * 4 * 8192 * 4


def test_what_the_caller_needs_is_left_to_it(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rss_bytes", lambda: 0)
    path, budget = packed["llama"], budgets(packed["llama"])[2]
    found = [Engine(path, memory=budget + n, reserve=n).residency for n in (0, 1_000_000)]
    assert found[0] == found[1] != Engine(path, memory=budget + 1_000_000).residency


def test_sizes() -> None:
    cases = {"800MB": 800e6, "1.5GB": 1.5e9, " 2 gib ": 2**31, "1000000": 1e6, ".5GB": 5e8}
    for text, size in cases.items():
        assert parse_size(text) == size
    for text in ("200", "999999", " 2.5 "):
        with pytest.raises(UsageError, match=rf"{text.strip()} has no unit; give \S+MB"):
            parse_size(text)
    assert parse_size("200B") == 200
    for text in ("", "MB", "0MB", "-1MB", "8 apples", "nan", "1e400GB", "0.1B"):
        with pytest.raises(UsageError, match="is not a size; give one such as 800MB"):
            parse_size(text)


def test_too_little_memory_names_the_least(packed: Packed) -> None:
    with pytest.raises(
        FallowError, match=r"--memory 20 MB is too little .*; the least is (\d+) MB"
    ):
        Engine(packed["llama"], memory="20MB")


# The disk fails -----------------------------------------------------------------------------------

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
// Every third read fails as FAULT says, from the FROM-th on; others are the system's own.
ssize_t pread(int fd, void* to, size_t n, off_t at) {
  static ssize_t (*real)(int, void*, size_t, off_t);
  static int calls;
  if (!real) real = dlsym(RTLD_NEXT, "pread");
  const char* fault = getenv("FAULT");
  const int call = __sync_add_and_fetch(&calls, 1);
  if (fault && call >= atoi(getenv("FROM")) && call % 3 == 0) {
    if (!strcmp(fault, "short") && n > 4096) n = 4096;
    if (!strcmp(fault, "slow")) usleep(3000);
    if (!strcmp(fault, "interrupted")) return errno = EINTR, -1;
    if (!strcmp(fault, "broken")) return errno = EIO, -1;
    if (!strcmp(fault, "cut")) return 0;
  }
  return real(fd, to, n, at);
}
ssize_t pread64(int fd, void* to, size_t n, off_t at) { return pread(fd, to, n, at); }
"""
CHILD = """
import signal
import sys
import numpy as np
from fallow.engine import engine as module
from fallow.common.errors import FallowError
module.rss_bytes = lambda: 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
try:
    engine = module.Engine(sys.argv[1], threads=2, memory=int(sys.argv[2]))
    try:
        while sys.argv[3] == "until interrupted":
            print("running", flush=True)
            engine.reset()
            engine.forward(np.arange(2, 62))
    except KeyboardInterrupt:
        engine.reset()
    for start in range(0, 60, 6):
        engine.forward(np.arange(2, 62)[start : start + 6], dense=True)
    print(engine.logits_hash())
except FallowError as error:
    print("error:", error)
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


def start_with(
    shim: Path, path: Path, fault: str | None, first: int = 1, how: str = "once"
) -> subprocess.Popen[str]:
    environment = os.environ | {"LD_PRELOAD": str(shim), "FROM": str(first)}
    environment |= {"FAULT": fault} if fault else {}
    arguments = [sys.executable, "-c", CHILD, path, str(budgets(path)[-1]), how]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def ending(child: subprocess.Popen[str]) -> str:
    """The last line that it prints."""
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return out.splitlines()[-1]


def run_with(shim: Path, path: Path, fault: str | None, first: int = 1) -> str:
    return ending(start_with(shim, path, fault, first))


@pytest.mark.skipif(sys.platform != "linux", reason="interposes the reader of Linux")
@pytest.mark.parametrize("name", ["q4_k", "q4_k_experts"])
def test_failing_reads_end_in_an_error_or_change_nothing(
    name: str, packed: Packed, shim: Path
) -> None:
    path = packed[name]
    expected = run_with(shim, path, None)
    assert len(expected) == 16
    assert run_with(shim, path, "short") == expected
    assert run_with(shim, path, "interrupted") == expected
    loading = len(options(path)[-1].resident)
    for first in (1, 3 * loading):  # while loading, and while running
        assert "Input/output error" in run_with(shim, path, "broken", first)
        assert "ends too early; was it cut?" in run_with(shim, path, "cut", first)


@pytest.mark.skipif(sys.platform != "linux", reason="interposes the reader of Linux")
@pytest.mark.parametrize("name", ["q4_k", "q4_k_experts"])
def test_ctrl_c_amid_reads_leaves_an_engine_that_works(
    name: str, packed: Packed, shim: Path
) -> None:
    path = packed[name]
    expected = run_with(shim, path, None)
    child = start_with(shim, path, "slow", how="until interrupted")
    assert child.stdout
    assert child.stdout.readline() == "running\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert ending(child) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="interposes the reader of Linux")
def test_two_processes_on_one_file(packed: Packed, shim: Path) -> None:
    path = packed["q4_k"]
    children = [start_with(shim, path, None) for _ in range(2)]
    assert [ending(child) for child in children] == [run_with(shim, path, None)] * 2


@pytest.mark.usefixtures("no_overhead")
def test_a_file_that_changes_while_it_runs(packed: Packed, tmp_path: Path) -> None:
    def start(name: str) -> tuple[Path, Engine]:
        path = tmp_path / name
        path.write_bytes(packed["llama"].read_bytes())
        return path, Engine(path, memory=budgets(path)[-1])

    path, engine = start("replaced.gguf")
    expected = engine.forward(IDS[:8])
    (tmp_path / "new").write_bytes(b"another file")
    os.replace(tmp_path / "new", path)  # the engine goes on with the one that it opened
    engine.reset()
    np.testing.assert_array_equal(engine.forward(IDS[:8]), expected)

    path, engine = start("cut.gguf")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(FallowError, match=r"was written to while it was running|ends too early"):
        engine.forward(IDS[:8])

    path, engine = start("written.gguf")
    engine.forward(IDS[:8])
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(FallowError, match="was written to while it was running; start again"):
        engine.forward(IDS[:8])


@pytest.mark.usefixtures("no_overhead")
def test_two_engines_on_one_file(packed: Packed) -> None:
    path = packed["llama"]
    engines = [Engine(path, memory=budgets(path)[-1]) for _ in range(2)]
    found = [e.forward(IDS[i : i + 1]) for i in range(8) for e in engines]
    for first, second in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(first, second)
