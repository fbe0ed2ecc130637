"""Logits of every architecture, three ways: transformers, llama.cpp, and the engine; and tokens.

Of each architecture a small random model is saved as a Hugging Face folder and turned into a GGUF
by llama.cpp's own converter. Both are packed in float32. Needs llama-cpp-python==0.3.36, the folder
vendor/llama.cpp of its source distribution, and sentencepiece, for the converter:

    python benchmarks/conformance.py --llama-cpp path/to/vendor/llama.cpp
    python benchmarks/conformance.py --llama-cpp path/to/vendor/llama.cpp vocabularies  # a part
    python benchmarks/conformance.py --report       # writes docs/results/conformance.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "conformance"
TOKENS, LONG_TOKENS, LAST = 200, 8192, 64
# The converter knows tokenizers by what they make of a text, and the small one's is no known one's;
# of some architectures it expects another kind.
CONVERT = """
import json, pathlib, runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
base.TextModel._set_vocab_sentencepiece = base.TextModel._set_vocab_gpt2
import conversion.phi as phi
phi.Phi3MiniModel.set_vocab = base.TextModel._set_vocab_gpt2
import conversion.gemma as gemma
gemma.Gemma4Model.set_vocab = base.TextModel._set_vocab_gpt2
load = base.ModelBase.load_hparams
def hparams(folder, *rest, **named):
    own = json.loads(pathlib.Path(folder, "config.json").read_text())
    return own | load(folder, *rest, **named)
base.ModelBase.load_hparams = staticmethod(hparams)
sys.argv[:] = ["convert", sys.argv[2], "--outtype", sys.argv[4], "--outfile", sys.argv[3]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
SIZES = {
    "vocab_size": 320,  # transformers adds tokens to some tokenizers
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 64}
KINDS = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
GEMMA4 = WINDOW | {
    "vocab_size": 302,
    "vocab_size_per_layer_input": 302,
    "hidden_size_per_layer_input": 32,
    "head_dim": 16,
    "global_head_dim": 32,
}
# Beside each architecture's own, further settings of some.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, linear": {"rope_parameters": {**YARN, "rope_type": "linear"}},
    "llama, llama3": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    "qwen2, yarn": {"rope_parameters": YARN},
    "mistral": WINDOW,
    "ministral": WINDOW | KINDS | {"head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
    },
    "gemma2": WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3": WINDOW
    | {"vocab_size": 302, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": None},
    "gemma4": GEMMA4 | {"num_kv_shared_layers": 2},
    "gemma4, two widths": GEMMA4 | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4, values from keys": GEMMA4
    | {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "olmo3": WINDOW | KINDS,
    "olmo3, yarn": WINDOW | KINDS | {"rope_scaling": YARN},
    "phi": {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256},
    "phi3, longrope": {
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + 0.1 * i for i in range(8)],
            "long_factor": [1 + 0.5 * i for i in range(8)],
            "original_max_position_embeddings": 256,
        },
    },
    "olmoe": {"num_key_value_heads": 4},  # others llama.cpp does not load
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "nemotron": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "relu2"},
    "gpt_neox": {"num_attention_heads": 4, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "gpt_oss": WINDOW
    | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt_oss, yarn": WINDOW | {"head_dim": 16, "rope_parameters": YARN | {"truncate": False}},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96},
}


def names() -> list[str]:
    return sorted({*conftest().PACKED, *VARIANTS})


def conftest() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    return conftest


def make_folder(name: str, folder: Path, **changes: Any) -> None:
    conftest().make_folder(name, folder, **changes)


def make(name: str, folder: Path) -> None:
    changes = VARIANTS.get(name, {})
    sizes = {
        k: v for k, v in SIZES.items() if name != "opt" or k.startswith(("num", "max", "vocab"))
    }
    make_folder(name.partition(",")[0], folder, **(sizes | changes))
    if "rotary_pct" in changes:  # the converter looks for it, and transformers writes it elsewhere
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"rotary_pct": changes["rotary_pct"]}
        path.write_text(json.dumps(config))


def convert(llama_cpp: Path, folder: Path, gguf: Path, kind: str = "f32") -> str | None:
    """Writes the GGUF, or says why the converter does not."""
    command = [sys.executable, "-c", CONVERT, llama_cpp, folder, gguf, kind]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]


def of_transformers(folder: Path, ids: np.ndarray) -> np.ndarray:
    import fallow

    model = fallow.load(folder, "float32")
    import torch

    with torch.inference_mode():
        return model.module(torch.from_numpy(ids)[None]).logits[0].float().numpy()


@contextmanager
def rounded_cache() -> Iterator[None]:
    """transformers' keys and values are rounded to float16."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gpt_oss import modeling_gpt_oss

    # GPT-OSS, which has sinks, has no other than its own.
    functions = {
        "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"],
        "eager": modeling_gpt_oss.eager_attention_forward,
    }
    for name, exact in functions.items():

        def rounded(
            module: Any, q: Any, k: Any, v: Any, *rest: Any, exact: Any = exact, **options: Any
        ) -> Any:
            return exact(module, q, k.half().float(), v.half().float(), *rest, **options)

        ALL_ATTENTION_FUNCTIONS[name] = rounded
    try:
        yield
    finally:
        for name in functions:
            del ALL_ATTENTION_FUNCTIONS[name]


def of_llama_cpp(gguf: Path, ids: np.ndarray, last: int) -> np.ndarray:
    from llama_cpp import Llama

    model = Llama(
        str(gguf), n_ctx=len(ids), n_batch=512, logits_all=True, verbose=False, flash_attn=False
    )
    model.eval(ids.tolist())
    return np.array(model.scores[len(ids) - last : len(ids)])


def of_engine(source: Path, ids: np.ndarray, quant: str | None, down: str) -> np.ndarray:
    from fallow import Engine
    from fallow.packing.packer import pack

    packed = source.with_suffix(".packed.gguf")
    pack(source, packed, quant=quant, down=down)
    return Engine(packed, context=len(ids)).logits(ids)


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Difference over the spread (largest less smallest) of the logits; agreement; nats."""
    from scipy.special import log_softmax

    p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in (expected, found))
    spread = (expected.max(axis=-1) - expected.min(axis=-1)).mean()
    return {
        "difference": float(np.abs(found - expected).max() / spread),
        "top1": float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
        "kl": float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
    }


def one(name: str, llama_cpp: Path) -> dict[str, Any]:
    """`folder`: the engine on the packed folder, `gguf`: on the packed GGUF; to transformers."""
    ids = np.random.default_rng(0).integers(2, 300, TOKENS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = Path(scratch) / "model", Path(scratch) / "m.gguf"
        make(name, folder)
        expected = of_transformers(folder, ids)
        packed = of_engine(folder, ids, "f32", "f32")
        result["folder"] = compare(packed, expected)
        if name.partition(",")[0] in conftest().EXPERTS or result["folder"]["top1"] < 0.995:
            with rounded_cache():
                result["rounded"] = compare(packed, of_transformers(folder, ids))
        if name == "bitnet":  # llama.cpp's has SiLU
            return result | {"converter": "no GGUF form that is read"}
        if name in conftest().OWN_CONFIGS:  # the converter would take it for a LLaMA with SiLU
            return result | {"converter": "no GGUF says its activation"}
        if reason := convert(llama_cpp, folder, gguf):
            return result | {"converter": reason}
        for key, run in {
            "llama.cpp": lambda: of_llama_cpp(gguf, ids, TOKENS),
            "gguf": lambda: of_engine(gguf, ids, None, "f32"),
        }.items():
            try:
                result[key] = compare(run(), expected)
            except Exception as error:  # of a foreign engine, or a refusal: a line of the table
                result[key] = str(error).strip().splitlines()[-1][:200]
    return result


def long(llama_cpp: Path) -> dict[str, Any]:
    """Llama 3.2's shape, of 4 layers and a small vocabulary, at 8192 positions, in bfloat16."""
    changes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    ids = np.random.default_rng(0).integers(2, 300, LONG_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = Path(scratch) / "model", Path(scratch) / "m.gguf"
        make_folder("llama", folder, **changes)
        if reason := convert(llama_cpp, folder, gguf, "bf16"):
            return {"converter": reason}
        expected = of_llama_cpp(gguf, ids, LAST)
        found = of_engine(gguf, ids, None, "bf16")[-LAST:]
        return compare(found, expected) | {"tokens": LONG_TOKENS, "last": LAST}


def vocabularies(folder: Path) -> dict[str, dict[str, Any]]:
    """Every vocabulary of llama.cpp's models folder: how many of its texts have its tokens."""
    from fallow.checkpoints.tokenizer import tokenizer_from_gguf
    from fallow.checkpoints.weights import read_gguf
    from fallow.common.errors import FallowError

    found = {}
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        file = read_gguf(path)
        kind, scheme = (file.get(f"tokenizer.ggml.{key}", None) for key in ("model", "pre"))
        row = found[path.stem] = {"kind": kind if scheme is None else f"{kind}, {scheme}"}
        try:
            tokenizer = tokenizer_from_gguf(file)
        except FallowError as error:
            row["refused"] = str(error).partition(f"GGUF {path} ")[2].partition(";")[0]
            continue
        source, tokens = (path.with_name(f"{path.name}.{end}") for end in ("inp", "out"))
        if not source.exists():
            continue
        texts = source.read_bytes().decode().split("\n__ggml_vocab_test__\n")
        if not texts[-1]:  # after the last separator
            texts.pop()
        pairs = zip(texts, tokens.read_text().splitlines(), strict=True)
        alike = [tokenizer.encode(t).tolist() == [int(i) for i in ids.split()] for t, ids in pairs]
        row |= {"texts": len(alike), "alike": sum(alike)}
    return found


NOTES = """
- mistral: a GGUF of it calls itself llama and has no sliding window; llama.cpp and the engine then
  look back on all tokens alike, transformers on 64.
- olmo3, yarn: from the GGUF too the engine agrees with transformers; llama.cpp does not.
- gpt_oss, yarn: its bounds are no whole dimensions (truncate is false); llama.cpp rounds them.
- Where there is a line in place of figures, the converter has no such architecture, or a GGUF
  has no word for what it computes."""


def report() -> str:
    where = json.loads((RESULTS / "machine.json").read_text())
    result = json.loads((RESULTS / "result.json").read_text())
    lines = [
        "# Conformance",
        "",
        f"`benchmarks/conformance.py`: {machine_line(where)}; llama-cpp-python 0.3.36. A small",
        f"random model of each architecture, {TOKENS} tokens, float32 everywhere but in caches of",
        "keys and values, which are float16. Against transformers in float32 on the",
        "folder: the largest difference of a logit as a share of the logits' spread, and how often",
        "the most likely token is the same. GGUF files are made by llama.cpp's own converter.",
        "",
        "| model | engine, from the folder | engine, from the GGUF | llama.cpp |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(result["architectures"].items()):
        cells = [
            _cell(row.get(key, row.get("converter"))) for key in ("folder", "gguf", "llama.cpp")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(NOTES)
    rounded = {n: r["rounded"] for n, r in result["architectures"].items() if "rounded" in r}
    if rounded:
        found = "; ".join(f"{name} {_cell(row)}" for name, row in sorted(rounded.items()))
        lines.append(
            "- Where two experts or tokens are nearly as likely, rounding keys and values to\n"
            "  float16 decides who is chosen, here as in llama.cpp. Against transformers with\n"
            f"  keys and values rounded likewise, from the folder: {found}."
        )
    lines += _long(result.get("long"))
    lines += _vocabularies(result.get("vocabularies"))
    return "\n".join(lines) + "\n"


def _long(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    return [
        "",
        "Llama 3.2's shape (4 of its layers, rope_type llama3 as `rope_freqs.weight`,",
        f"bfloat16) at {found['tokens']} positions: the last {found['last']} are",
        f"{found['kl']:.5f} nats per token from llama.cpp's, top-1 {found['top1']:.1%}.",
    ]


def _vocabularies(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        "## Tokens",
        "",
        "The vocabulary files that llama.cpp is tested with: of their texts, how many have the",
        "tokens that are listed beside them, or what of the file is refused.",
        "",
        "| file | kind (`tokenizer.ggml.model`, `.pre`) | texts with the same tokens |",
        "|---|---|---|",
    ]
    for name, row in found.items():
        cell = f"{row['alike']} of {row['texts']}" if "texts" in row else "no texts"
        if "refused" in row:
            cell = f"refused: {row['refused']}"
        lines.append(f"| {name} | {row['kind']} | {cell} |")
    return [*lines, VOCABULARY_NOTES]


VOCABULARY_NOTES = """
- qwen35: the other three are not in Unicode's NFC, into which the model's own tokenizer brings text
  first, as here; llama.cpp does not.
- A file that does not say how text is cut (`.pre`) is refused: its model's way is not known."""


def _cell(found: Any) -> str:
    if isinstance(found, dict):
        return f"{found['difference']:.4f}, {found['top1']:.1%}"
    return str(found or "none").replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"architectures": {}}
    if arguments.llama_cpp:
        record_machine(RESULTS / "machine.json")
        parts = {"long": long, "vocabularies": lambda folder: vocabularies(folder / "models")}
        for name in arguments.names or [*names(), *parts]:
            part = parts.get(name)
            found = part(arguments.llama_cpp) if part else one(name, arguments.llama_cpp)
            (result if part else result["architectures"])[name] = found
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(name, json.dumps(found), flush=True)
    if arguments.report:
        (ROOT / "docs" / "results" / "conformance.md").write_text(report())


if __name__ == "__main__":
    main()
