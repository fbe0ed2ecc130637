"""Our plugin in a real llama-cpp-python: `make test-llama`.

Each case is a process of its own, since a plugin stays once it is loaded.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import CONFIGS, SAMPLE, make_folder
from fallow.checkpoints.catalog import ALIASES, find_pieces, resolve
from fallow.checkpoints.weights import fingerprint, read_gguf
from fallow.common.errors import FallowError
from fallow.llama_cpp import plugin
from fallow.measure.llama_cpp import compare, model_logits
from fallow.packing.ffn_file import pack_ffns
from fallow.plan import Cut, Plan
from test_models import write_gguf

pytest.importorskip("llama_cpp", reason="make test-llama installs llama-cpp-python")

START = """
import json, sys
import fallow.llama_cpp
arguments = json.loads(sys.argv[1])
if arguments["plugin"]:
    fallow.llama_cpp.load(arguments.get("plan"), arguments.get("memory"))
from llama_cpp import Llama
def make(path=arguments["model"], **options):
    return Llama(path, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False, seed=1, **options)
def text(model, n=24):
    return model("The capital of France is", max_tokens=n, temperature=0)["choices"][0]["text"]
def logits(model, n=8):
    import numpy as np
    ids = model.tokenize(b"Water boils at a lower temperature on a mountain because")
    model.reset()
    model.eval(ids[:-n])
    found = []
    for token in ids[-n:]:
        model.eval([token])
        found.append(np.array(model.scores[model.n_tokens - 1]))
    return np.array(found)
"""

WATCH = """
import ctypes
import llama_cpp as l
import numpy as np
library = l.llama_cpp._lib
library.ggml_get_name.restype = ctypes.c_char_p
library.ggml_get_name.argtypes = [ctypes.c_void_p]
def watched(model, names, see):
    # A context that calls see(name, tensor) for every node of one of these names.
    global callback
    @l.ggml_backend_sched_eval_callback
    def callback(tensor, ask, user):
        tensor = ctypes.cast(tensor, ctypes.c_void_p)
        name = library.ggml_get_name(tensor).decode()
        if name in names and not ask:
            see(name, tensor)
        return name in names if ask else True
    params = l.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch, params.cb_eval = 64, 2, 2, callback
    return l.llama_init_from_model(model.model, params)
"""


def run(code: str, output: Path | None = None, **arguments: Any) -> Any:
    """What a program prints as its last line, in JSON."""
    arguments = {"plugin": True} | {k: str(v) for k, v in arguments.items() if v is not None}
    if arguments["plugin"] == "False":
        arguments["plugin"] = False
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", START + code, json.dumps(arguments)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """For the llama-cpp-python that is there; FALLOW_LLAMA_SOURCE names its source, if at hand."""
    source = os.environ.get("FALLOW_LLAMA_SOURCE")
    plugin.build(plugin.installed(), Path(source) if source else None)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Path:
    if find_pieces(ALIASES[request.param]) is None:
        pytest.skip(ALIASES[request.param].install_command)
    return resolve(ALIASES[request.param])


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve(ALIASES["smollm2"])


def topk(path: Path, keep: float, tap: str = "inter") -> Plan:
    n = sum(name.endswith("ffn_up.weight") for name in read_gguf(path).tensors)
    return Plan("m", "x", "topk", keep, "k", (Cut(tap, "topk", np.full(n, keep), "column_norm"),))


@pytest.fixture(scope="module")
def half(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "half.gguf"
    pack_ffns(smollm2, path, plan=topk(smollm2, 0.5))
    return path


def test_dense_is_nearer_to_the_model_than_stock_llama_cpp(model: Path, tmp_path: Path) -> None:
    """Which rounds activations to 8 bits: that alone is 0.003 to 0.006 nats from float32."""
    everything = tmp_path / "all.gguf"
    pack_ffns(model, everything, plan=topk(model, 1.0))
    logits = model_logits(model, everything, text=None, tokens=128, threads=2)
    ids = logits["stock"]["ids"]
    with torch.no_grad():
        expected = fallow.load(model).module(torch.tensor(ids)[None]).logits[0].numpy()
    for way in ("prompt", "decode"):
        stock, dense, plan = (compare(expected, found[way], ids) for found in logits.values())
        assert dense["kl"] <= stock["kl"]
        assert plan["kl"] <= 2 * stock["kl"]  # down_proj is rounded again, along other rows
        assert compare(logits["stock"][way], logits["dense"][way], ids)["top1"] > 0.9


def test_a_plan_leaves_out_what_it_says(smollm2: Path, half: Path) -> None:
    code = "m = make(); t = text(m); print(json.dumps({'of': fallow.llama_cpp.statistics()[0]}))"
    found = run(code, model=smollm2, plan=half)["of"]
    assert found["plan"]
    assert found["inactive"] == pytest.approx(0.5)
    assert set(found["inactive_per_layer"]) == {0.5}
    assert found["apart"] == 0
    dense = run(code, model=smollm2)["of"]
    assert dense["inactive"] == 0
    gate = half.with_name("gate.gguf")
    pack_ffns(smollm2, gate, plan=topk(smollm2, 0.5, "gate_act"))
    less = run(code, model=smollm2, plan=gate)["of"]
    assert less["bytes_per_token"] < 0.85 * found["bytes_per_token"]


def test_an_ffn_under_a_plan_is_what_numpy_computes(smollm2: Path, tmp_path: Path) -> None:
    """Of a token: what comes out of the FFN, from what went in, with the kept neurons alone."""
    keep, beside = 0.25, tmp_path / "beside.gguf"
    pack_ffns(smollm2, beside, plan=topk(smollm2, keep))
    code = """
m = make()
data = library.ggml_get_data
data.restype, data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
seen = {}
def see(name, tensor):
    pointer = ctypes.cast(data(tensor), ctypes.POINTER(ctypes.c_float))
    seen[name] = np.ctypeslib.as_array(pointer, (576,)).copy()
context = watched(m, ("ffn_norm-1", "ffn_out-1", "ffn_norm-20", "ffn_out-20"), see)
for token in m.tokenize(b"The capital of France is"):
    assert l.llama_decode(context, l.llama_batch_get_one((l.llama_token * 1)(token), 1)) == 0
np.savez(arguments["out"], **seen)
print(json.dumps({"of": fallow.llama_cpp.statistics()[0]}))
"""
    found = run(WATCH + code, model=smollm2, plan=beside, out=tmp_path / "seen.npz")["of"]
    assert (found["fused"], found["apart"]) == (150, 0)
    seen, tensors = np.load(tmp_path / "seen.npz"), read_gguf(smollm2).tensors
    for layer in (1, 20):
        names = [f"blk.{layer}.ffn_{part}.weight" for part in ("gate", "up", "down")]
        gate, up, down = (tensors[name].dequantize() for name in names)
        x, y = seen[f"ffn_norm-{layer}"], seen[f"ffn_out-{layer}"]
        inter = (gate @ x) / (1 + np.exp(-gate @ x)) * (up @ x)
        score = np.abs(inter) * np.linalg.norm(down, axis=0)
        kept = score >= np.sort(score)[-round(keep * len(score))]
        of_all, of_kept = (np.linalg.norm(v - y) for v in (down @ inter, down @ (inter * kept)))
        # Rounding of x moves some neurons over the threshold.
        assert of_kept < 0.08 * np.linalg.norm(y)
        assert of_kept < 0.4 * of_all


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    p, q = (
        x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (a.astype(float), b.astype(float))
    )
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("part", ["up", "down"])
def test_another_models_file_is_refused_and_it_runs_dense(
    smollm2: Path,
    half: Path,
    tmp_path: Path,
    part: str,
) -> None:
    damaged = tmp_path / "other.gguf"
    content = bytearray(smollm2.read_bytes())
    tensor = read_gguf(smollm2).tensors[f"blk.0.ffn_{part}.weight"]
    content[tensor.offset + 100] ^= 1
    damaged.write_bytes(content)
    code = "m = make(); t = text(m, 4); print(json.dumps({'of': fallow.llama_cpp.statistics()[0]}))"
    found = run(code, model=damaged, plan=half)
    assert not found["of"]["plan"]
    assert found["of"]["inactive"] == 0
    assert "made for another model (29 of 30 FFNs are the same)" in found["stderr"]


def test_models_come_and_go(smollm2: Path, half: Path) -> None:
    code = """
first = make(); a = text(first); first.close(); del first
fallow.llama_cpp.load(arguments["half"])
second = make(); b = text(second)
fallow.llama_cpp.load()
third = make(); c = text(third)
print(json.dumps({"a": a, "c": c, "plans": [s["plan"] for s in fallow.llama_cpp.statistics()]}))
"""
    found = run(code, model=smollm2, half=half)
    assert found["a"] == found["c"]
    assert found["plans"] == [True, False]


def test_sequences_side_by_side(smollm2: Path, half: Path) -> None:
    """Four in one batch, as a server with four slots decodes, are what they are one by one."""
    code = """
import ctypes, numpy as np, llama_cpp as l
m = make(logits_all=True)
prompts = [m.tokenize(p) for p in (b"One day", b"The sun", b"def f(x):", b"Water is")]
alone = []
for ids in prompts:
    m.reset(); m.eval(ids); alone.append(int(np.argmax(m.scores[m.n_tokens - 1])))
params = l.llama_context_default_params()
params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = 256, 4, 2, 2
context = l.llama_init_from_model(m.model, params)
longest = max(map(len, prompts)); together = [None] * 4
for step in range(longest):
    there = [s for s in range(4) if step < len(prompts[s])]
    batch = l.llama_batch_init(4, 0, 1); batch.n_tokens = len(there)
    for i, s in enumerate(there):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = prompts[s][step], step, 1
        batch.seq_id[i][0], batch.logits[i] = s, 1
    assert l.llama_decode(context, batch) == 0
    for i, s in enumerate(there):
        row = l.llama_get_logits_ith(context, i)
        if step + 1 == len(prompts[s]):
            together[s] = int(np.argmax(np.ctypeslib.as_array(row, (m.n_vocab(),))))
print(json.dumps({"alone": alone, "together": together}))
"""
    found = run(code, model=smollm2, plan=half)
    assert found["alone"] == found["together"]


def write_lora(path: Path, model: Path, parts: tuple[str, ...]) -> Path:
    """An adapter of rank 4 that changes one FFN."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for part in parts:
        name = f"blk.2.ffn_{part}.weight"
        out, width = read_gguf(model).tensors[name].shape
        for end, shape in (("a", (4, width)), ("b", (out, 4))):
            values = rng.normal(0, 0.1, shape).astype(np.float32)
            writer.add_tensor(f"{name}.lora_{end}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("down",)], ids=len)
def test_a_lora_adapter_counts(smollm2: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Its products are llama.cpp's and meet ours one by one."""
    path = write_lora(tmp_path / "lora.gguf", smollm2, parts)
    code = """
import numpy as np
m = make(logits_all=True, lora_path=arguments.get("lora"))
np.save(arguments["out"], logits(m))
of = fallow.llama_cpp.statistics()
print(json.dumps({"apart": of[0]["apart"] if of else None}))
"""
    rows = {}
    for name, options in {
        "stock": {"plugin": False, "lora": path},
        "ours": {"lora": path},
        "without": {},
    }.items():
        found = run(code, model=smollm2, out=tmp_path / f"{name}.npy", **options)
        rows[name] = np.load(tmp_path / f"{name}.npy")
        if name == "ours":
            assert found["apart"] > 0
    same = np.mean([divergence(a, b) for a, b in zip(rows["stock"], rows["ours"], strict=True)])
    other = np.mean([divergence(a, b) for a, b in zip(rows["stock"], rows["without"], strict=True)])
    assert same < other / 3  # roundings differ by 0.005


def test_a_callback_sees_what_is_inside(smollm2: Path) -> None:
    code = """
m, seen = make(), []
wanted = ("ffn_gate-0", "ffn_up-0", "ffn_swiglu-0", "ffn_out-0")
context = watched(m, wanted, lambda name, tensor: seen.append(name))
ids = m.tokenize(b"The capital of France is")
array = (l.llama_token * len(ids))(*ids)
assert l.llama_decode(context, l.llama_batch_get_one(array, len(ids))) == 0
row = np.ctypeslib.as_array(l.llama_get_logits_ith(context, -1), (m.n_vocab(),))
m.eval(ids)
print(json.dumps({"seen": seen, "top": int(row.argmax()), "plain": int(m.sample(temp=0))}))
"""
    found = run(WATCH + code, model=smollm2)
    assert {"ffn_gate-0", "ffn_up-0", "ffn_swiglu-0"} <= set(found["seen"])
    assert found["top"] == found["plain"]


# A budget for FFNs that take 13 MB, besides 10 that they are computed with.
LAYERS, HIDDEN, D_FF, BUDGET = 8, 128, 1024, 14_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of random weights, whose FFNs are large enough to be measured in memory."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": D_FF, "num_hidden_layers": LAYERS}
    made = make_folder("llama", folder / "llama", **sizes, initializer_range=0.05)
    return write_gguf("llama", fallow.load(made), folder / "tiny.gguf")


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    """With a plan whose shortlist llama.cpp has no use for, as `fallow optimize` makes it."""
    path, mark = tiny.with_name("packed.gguf"), fingerprint(read_gguf(tiny).tensors)
    cut = Cut("inter", "topk", np.linspace(0.25, 0.5, LAYERS), "column_norm")
    plan = Plan("tiny", mark, "topk", 0.5, "keep", (cut,), head_margin=5.0)
    fallow.pack(tiny, path, plan=plan, down="f32", text=SAMPLE)
    return path


def test_an_embedding_is_that_of_llama_cpp(tiny: Path, tmp_path: Path) -> None:
    """With pooling "mean", as its server gives it."""
    code = """
m = make(embedding=True, pooling_type=1)
text = "The capital of France is"
print(json.dumps({"ids": m.tokenize(text.encode()), "of": m.embed(text, normalize=True)}))
"""
    found = run(code, plugin=False, model=tiny)
    fallow.pack(tiny, tmp_path / "packed.gguf", down="f32", text=SAMPLE)
    ours = fallow.Engine(tmp_path / "packed.gguf").embed(found["ids"])
    assert len(found["of"]) == len(ours)
    np.testing.assert_allclose(ours, found["of"], atol=1e-3)


# Token by token, and with a cache in float32: as exact as llama.cpp computes.
LOGITS = """
import numpy as np
m = make(logits_all=True, type_k=0, type_v=0, lora_path=arguments.get("lora"))
np.save(arguments["out"], logits(m, 0))
anonymous = open("/proc/self/smaps_rollup").read().split("Anonymous:")[1].split()[0]
print(json.dumps({"of": fallow.llama_cpp.statistics(), "anonymous": 1024 * int(anonymous)}))
"""


WATER = "Water boils at a lower temperature on a mountain because"


def assert_same_neurons(
    found: np.ndarray, expected: np.ndarray, dense: np.ndarray, share: float = 0.05
) -> None:
    """Of logits (T, vocabulary) under a plan: a neuron at its threshold may fall on either side.

    How far they are apart, of what the plan changes: with other neurons it would be more than 1.
    """
    assert np.abs(found - expected).mean() < share * np.abs(dense - expected).mean()


def test_a_packed_model_is_taken_as_it_is(tiny: Path, packed: Path, tmp_path: Path) -> None:
    beside, out = tmp_path / "beside.gguf", tmp_path / "logits.npy"
    pack_ffns(tiny, beside, packed=packed)
    found = {}
    for plan in (packed, beside):
        of = run(LOGITS, model=tiny, plan=plan, out=out)
        assert "the plan's shortlist is left out: llama.cpp computes its own head" in of["stderr"]
        assert of["of"][0]["plan"]
        kept = [1 - share for share in of["of"][0]["inactive_per_layer"]]
        assert kept == pytest.approx(np.linspace(0.25, 0.5, LAYERS), abs=1e-3)
        found[plan] = np.load(out)
    np.testing.assert_array_equal(found[packed], found[beside])
    engines = [fallow.Engine(packed, plan=plan) for plan in (None, False)]
    ids = engines[0].tokenizer.encode(WATER)
    expected, dense = (
        np.concatenate([engine.forward(ids[i : i + 1]) for i in range(len(ids))])
        for engine in engines
    )
    # Its cache is rounded, so that more neurons of 8 layers fall on the other side.
    assert_same_neurons(found[packed], expected, dense, share=0.25)


def test_under_a_budget_ffns_come_from_the_disk(tiny: Path, packed: Path, tmp_path: Path) -> None:
    found, rows = {}, {}
    for memory in (None, BUDGET):
        out = tmp_path / f"{memory}.npy"
        found[memory] = run(LOGITS, model=tiny, plan=packed, memory=memory, out=out)
        rows[memory] = np.load(out)
    np.testing.assert_allclose(rows[BUDGET], rows[None], atol=1e-3)
    whole, less = (found[memory]["of"][0] for memory in (None, BUDGET))
    ffns = LAYERS * 3 * HIDDEN * D_FF * 4
    assert whole["held"] > ffns
    assert whole["disk_bytes"] == 0
    assert less["held"] <= BUDGET
    assert less["disk_bytes"] > 8 * ffns / 2  # for every token, of which there are more than 8
    assert less["inactive"] == pytest.approx(whole["inactive"], abs=1e-3)
    saved = found[None]["anonymous"] - found[BUDGET]["anonymous"]
    assert saved > ffns / 2


def test_products_one_by_one_come_from_the_disk_too(
    tiny: Path, packed: Path, tmp_path: Path
) -> None:
    lora, rows = write_lora(tmp_path / "lora.gguf", tiny, ("gate", "up", "down")), {}
    for memory in (None, "13MB"):
        out = tmp_path / f"{memory}.npy"
        found = run(LOGITS, model=tiny, plan=packed, memory=memory, lora=lora, out=out)
        assert found["of"][0]["apart"] > 0
        rows[memory] = np.load(out)
    np.testing.assert_allclose(rows["13MB"], rows[None], atol=1e-3)


def test_a_budget_that_cannot_be_kept_is_refused(tiny: Path, packed: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside.gguf"
    pack_ffns(tiny, beside, packed=packed)
    code = """
try:
    fallow.llama_cpp.load(arguments.get("file"), arguments["size"]); said = ""
except fallow.FallowError as error:
    said = str(error)
print(json.dumps({"said": said}))
"""
    for file, size, expected in (
        (packed, "1MB", "MB is too small for these FFNs on 1 threads; give"),
        (packed, "80", "FALLOW_MEMORY '80' is not a size; give one such as 800MB"),
        (packed, "80ZB", "FALLOW_MEMORY '80ZB' is not a size"),
        (beside, "14MB", "FALLOW_MEMORY needs a packed model as FALLOW_PLAN"),
        (None, "14MB", "FALLOW_MEMORY needs a packed model as FALLOW_PLAN"),
    ):
        assert expected in run(code, model=tiny, file=file, size=size)["said"]


def write_stablelm(folder: Path, path: Path) -> Path:
    """A GGUF of a StableLM folder, as llama.cpp's converter writes it."""
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "stablelm")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(False)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_types([3, 3, *[1] * (len(backend["vocab"]) - 2)])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, config.num_hidden_layers)
    for name, values in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_architecture_that_the_engine_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan made in transformers, on a folder, runs on the GGUF: the same neurons are left out."""
    settings = CONFIGS["llama"][1] | {"hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setitem(CONFIGS, "stablelm", ("StableLmConfig", settings))
    folder = make_folder("stablelm", tmp_path / "stablelm")
    model = fallow.load(folder)
    plan = fallow.calibrate(model, "topk", sparsity=0.5, text=SAMPLE, context=32, windows=2)
    source, beside = write_stablelm(folder, tmp_path / "m.gguf"), tmp_path / "beside.gguf"
    pack_ffns(source, beside, plan=plan, down="f32")
    assert "in another form" in " ".join(capsys.readouterr().err.split())
    ids = model.tokenizer.encode(WATER)
    rows, expected = {}, {}
    for name, file, choice in (("plan", beside, plan), ("dense", None, None)):
        out = tmp_path / f"{name}.npy"
        found = run(LOGITS, model=source, plan=file, out=out)
        assert found["of"][0]["plan"] == (choice is not None)
        assert found["of"][0]["apart"] == 0
        rows[name] = np.load(out)
        with model.sparse(choice):
            expected[name] = model.logits(model.hidden(ids[None]))[0].numpy()
    np.testing.assert_allclose(rows["dense"], expected["dense"], atol=2e-3)
    assert_same_neurons(rows["plan"], expected["plan"], expected["dense"])


def test_files_that_are_none(smollm2: Path, tmp_path: Path) -> None:
    code = """
try:
    fallow.llama_cpp.load(arguments["file"]); said = ""
except fallow.FallowError as error:
    said = str(error)
print(json.dumps({"said": said}))
"""
    plan = topk(smollm2, 0.5).to_bytes()
    for content, said in (
        (smollm2.read_bytes(), "not a file of fallow llama pack, and no packed model"),
        (plan, "is a plan alone; pack the model with it (fallow pack --plan)"),
        (b"GGUF", ""),
    ):
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        found = run(code, model=smollm2, file=path)["said"]
        assert str(path) in found
        assert said in found
    assert "missing.gguf" in run(code, model=smollm2, file=tmp_path / "missing.gguf")["said"]


def test_a_plugin_of_another_version_is_refused(smollm2: Path, tmp_path: Path) -> None:
    path = plugin.built(plugin.installed())
    content = path.read_bytes()
    base = ctypes.CDLL(str(next(plugin.installed().libraries.glob("libggml-base.so*"))))
    base.ggml_version.restype = ctypes.c_char_p
    version = base.ggml_version()
    assert content.count(version + b" ") == 1
    other = tmp_path / plugin.LIBRARY
    other.write_bytes(content.replace(version + b" ", b"9" * len(version) + b" "))
    code = """
import ctypes, llama_cpp
register = llama_cpp.llama_cpp._lib.ggml_backend_load
register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
print(json.dumps({"taken": bool(register(arguments["other"].encode()))}))
"""
    found = run(code, plugin=False, model=smollm2, other=other)
    assert not found["taken"]
    assert "run: fallow llama build" in found["stderr"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="is no folder"):
        plugin.checkout(tmp_path / "missing")
    with pytest.raises(FallowError, match="static builds cannot load plugins"):
        plugin.checkout(tmp_path)
