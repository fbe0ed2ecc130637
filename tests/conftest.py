"""Tiny random models of every architecture, saved as Hugging Face folders. No downloads."""

import json
import os
import shutil
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before torch or transformers import Triton

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import fallow
from fallow import cli
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints import text as text_module
from fallow.engine import engine as engine_module
from fallow.engine.engine import Engine, thread_count
from fallow.models import ARCHITECTURES
from fallow.packing import source as source_module
from fallow.plan import Cut, Plan
from fallow.rules import RULES, teal_relative
from fallow.rules._greedy import Greedy
from harness.killing import Server

pytest.register_assert_rewrite("engines", "selecting")

# Engines have one thread where a test asks for no number. Two that share two cores with other
# processes wait, spinning, for what does not run: of 100 tokens one by one, 20 ms become 2.5 s.
engine_module.thread_count = lambda threads: thread_count(1 if threads is None else threads)

# Of the default text its beginning, unless a test asks for `whole_default_text`: a tokenizer of 300
# tokens takes half a second for all of it, every time that something is packed.
whole_default_text = text_module._default_text


@cache
def _beginning(half: text_module.Half) -> text_module.Text:
    found = whole_default_text(half)
    return text_module.Text(found.name, found.content[:60_000])


text_module._default_text = _beginning

# A shortlist's inputs are looked at in fewer windows: a second of every packing with one.
source_module.HEAD_WINDOWS, source_module.HEAD_DEFAULT_WINDOWS = 8, 4

# Every client of HTTP would read 140 certificates, 65 ms, to talk to a server of these tests.
ssl.create_default_context = cache(ssl.create_default_context)

DATA = Path(os.environ.get("FALLOW_DATA", Path(__file__).parent.parent / "../shared/data"))

# A page of real text that every clone has.
SAMPLE = Path(__file__).parent / "data" / "text.txt"

VOCABULARY = 300
# Odd widths wherever the architecture allows them.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Large enough for activations to differ from token to token.
    "initializer_range": 0.3,
}
_EXPERTS = {"moe_intermediate_size": 19, "num_experts": 7, "num_experts_per_tok": 3}
_SHARING = {  # the last two layers have the keys and values of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 6,
    "final_logit_softcapping": 3.0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        _COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "gemma2": (
        "Gemma2Config",
        _COMMON
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "arcee": ("ArceeConfig", _COMMON),
    "gpt_neox": (
        "GPTNeoXConfig",
        _COMMON | {"num_attention_heads": 3, "num_key_value_heads": 3, "rotary_pct": 0.5},
    ),
    "granite": (
        "GraniteConfig",
        _COMMON
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        _COMMON
        | _SHARING
        | {
            "laurel_rank": 5,
            "activation_sparsity_pattern": [0.7, 0.7, 0.0, 0.0],
        },
    ),
    "gemma4": ("Gemma4TextConfig", _COMMON | _SHARING | {"global_head_dim": 12}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        _COMMON
        | {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 5,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "ministral": ("MinistralConfig", _COMMON | {"head_dim": 6, "sliding_window": 16}),
    "ministral3": (
        "Ministral3Config",
        _COMMON
        | {
            "head_dim": 8,
            # As published, but for a short original context, beyond which queries grow.
            "rope_parameters": {
                "rope_type": "yarn",
                "type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "nemotron": (
        "NemotronConfig",
        _COMMON | {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "relu2"},
    ),
    "olmo2": ("Olmo2Config", _COMMON),
    "olmo3": (
        "Olmo3Config",
        _COMMON | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "smollm3": ("SmolLM3Config", _COMMON),
    "mixtral": ("MixtralConfig", _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _COMMON | _EXPERTS | {"shared_expert_intermediate_size": 41, "norm_topk_prob": False},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _COMMON | _EXPERTS | {"head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", _COMMON | {"num_experts": 7, "num_experts_per_tok": 3}),
    "granitemoe": (
        "GraniteMoeConfig",
        _COMMON
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        _COMMON
        | {
            "head_dim": 8,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,  # with which truncation would show
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
        },
    ),
    "starcoder2": ("Starcoder2Config", _COMMON),
    "phi": ("PhiConfig", _COMMON | {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "phi3": ("Phi3Config", _COMMON),
    "bitnet": ("BitNetConfig", _COMMON),
    "llama_sparse_relu": ("LlamaConfig", _COMMON),
    "sparsellama": ("LlamaConfig", _COMMON),
    "bamboo": ("MistralConfig", _COMMON | {"sliding_window": None}),
    "minicpm": ("LlamaConfig", _COMMON | {"tie_word_embeddings": True}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "init_std": 0.3,
        },
    ),
}
assert set(CONFIGS) == set(ARCHITECTURES)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
UNPACKED = ("gemma3n", "qwen3_5")  # which the engine does not run
PACKED = tuple(name for name in ARCHITECTURES if name not in UNPACKED)
NEURON_RULES = tuple(rule for rule in RULES if not rule.startswith("expert_"))
# Steps of greedy allocation: the defaults, 5 % and these by five, take some five to eight times as
# many runs of a block, most of what a fitted rule costs.
Greedy.options = {"step": 40}
teal_relative.ALPHA, teal_relative.LARGEST_STEP = 0.1, 0.5
DENSE = tuple(name for name in ARCHITECTURES if name not in EXPERTS)
PACKED_DENSE = tuple(name for name in DENSE if name in PACKED)
# What transformers has no class of: the config.json says this besides. FATReLU jumps at its limit,
# which is as small as ProSparse's, so that rounding a value across it changes little.
OWN_CONFIGS: dict[str, dict[str, Any]] = {
    "llama_sparse_relu": {"hidden_act": "silu"},
    "sparsellama": {"hidden_act": "fatrelu", "hidden_act_param": 0.02},
    "bamboo": {"hidden_act": "relu"},
    "minicpm": {
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.02,
        "scale_emb": 0.5,
        "scale_depth": 2.0,
        "dim_model_base": 16,
    },
}
# Neurons are exactly zero.
WITH_RELU = ("opt", "arcee", "nemotron", "bitnet", *OWN_CONFIGS)
WITH_ZEROS = (*WITH_RELU, "gemma3n")


def make_folder(name: str, folder: Path, **changes: object) -> Path:
    """Saves a tiny random model and its tokenizer."""
    config_class, settings = CONFIGS[name]
    settings = settings | changes
    if kinds := settings.get("layer_types"):  # in turn, of however many layers
        n_layers = int(str(settings["num_hidden_layers"]))
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(n_layers)]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with (
        torch.no_grad()
    ):  # biases and norms start at 0 and 1, where an error in them would not show
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        stored = module.state_dict()
        for key, buffer in module.named_buffers():  # Gemma 4's factors of layers
            if key in stored:
                buffer.add_(0.1 * torch.randn_like(buffer))
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if name in OWN_CONFIGS:
        path = folder / "config.json"
        told = {"model_type": name} | OWN_CONFIGS[name]
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
    return folder


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


# Beside bytes and single letters, what the small vocabulary of `make_sentencepiece` has.
WORDS = ("▁n", "eu", "▁neu", "ro", "▁neuro", "▁neuron", "▁r", "▁re", "st", "▁rest", "▁rests")


def make_sentencepiece() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: spaces are ▁, unknown characters bytes, one space in front.

    The steps are those of its tokenizer.json.
    """
    letters = "▁neurostil.<|>_md"
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_parrot(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, *said: list[int]
) -> Path:
    """A model whose next token depends on the last one alone: it goes on with texts that it knows.

    Hidden states are embeddings, a unit for each token that has a next one, and the head has at
    each token's row the units of those before it.
    """
    config = transformers.LlamaConfig(**(_COMMON | {"vocab_size": VOCABULARY}))
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.lm_head.weight.zero_()
        units = iter(torch.eye(config.hidden_size))
        for before, after in (pair for ids in said for pair in pairwise(ids)):
            unit = next(units)
            module.model.embed_tokens.weight[before] = unit
            module.lm_head.weight[after] += unit
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def engine_plan(engine: Engine, *cuts: Cut, **others: Any) -> Plan:
    """A plan that no calibration made, for the model of an engine."""
    n = engine._core.n_layers
    return Plan(
        model=engine.name,
        fingerprint=engine.fingerprint,
        rule="by hand",
        knob=0.0,
        knob_name="",
        cuts=tuple(cut.of_layers(n) for cut in cuts),
        **others,
    )


T = TypeVar("T")

TEXT = " ".join(f"neuron {i} rests while neuron {i * 7 % 31} works." for i in range(200))
OTHER_TEXT = " ".join(f"the {i * 3 % 17}th gate lets {i} of them through;" for i in range(200))


class OnDemand(Mapping[str, T]):
    """What each of some names stands for, made when it is first asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names, self._make = tuple(names), make
        self._made: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return OnDemand(CONFIGS, lambda name: make_folder(name, root / name))


@pytest.fixture(scope="session")
def packed(
    folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Every tiny model as a packed file of F32 weights."""
    from fallow.packing.packer import pack

    root = tmp_path_factory.mktemp("packed")

    def make(name: str) -> Path:
        pack(folders[name], root / f"{name}.gguf", quant="f32")
        return root / f"{name}.gguf"

    return OnDemand(PACKED, make)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of a tiny llama, to be changed."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny(folders: Mapping[str, Path]) -> Mapping[str, "fallow.Model"]:
    """Loaded models, by architecture; not to be changed."""
    return OnDemand(CONFIGS, lambda name: fallow.load(folders[name]))


TALK = """{% for m in messages %}
{%- if m.content == "refuse" %}{{ raise_exception("no such talk") }}{% endif -%}
{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"""


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed model with a chat template."""
    from fallow.packing.packer import pack

    root = tmp_path_factory.mktemp("talking")
    folder = make_folder("llama", root / "model")
    (folder / "chat_template.jinja").write_text(TALK)
    pack(folder, root / "talking.gguf", quant="f32")
    return root / "talking.gguf"


@pytest.fixture(scope="module")
def engine(talking: Path) -> Engine:
    """One that talks, for each file of tests."""
    return Engine(talking, threads=1)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """Where a server of `engine` listens."""
    from served import served

    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    """OpenAI's own, of that server."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tokenizer of Llama 2's kind: a folder, and packed.

    It goes on with " rests🙂 re" after "neuron", and with "." after the token <s>.
    """
    from fallow.packing.packer import pack

    root, tokenizer = tmp_path_factory.mktemp("parrot"), make_sentencepiece()

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    said = ids("neuron rests🙂"), [ids("🙂")[-1], *ids("re"), 1], [0, ids(".")[-1], 1]
    make_parrot(root / "model", tokenizer, *said)
    pack(root / "model", root / "packed.gguf", quant="f32")
    return root / "model", root / "packed.gguf"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibration and evaluation text."""
    root = tmp_path_factory.mktemp("texts")
    (root / "calibration.txt").write_text(TEXT)
    (root / "evaluation.txt").write_text(OTHER_TEXT)
    return root / "calibration.txt", root / "evaluation.txt"


@pytest.fixture(scope="session")
def calibrators(
    tiny: Mapping[str, fallow.Model], texts: tuple[Path, Path]
) -> Mapping[str, Calibrator]:
    """A calibrator of every tiny model."""
    return OnDemand(
        CONFIGS,
        lambda name: Calibrator(tiny[name], texts[0], context=32, windows=4, validation_windows=2),
    )


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval does not look through its own ten thousand tasks, which takes it 15 s every time."""
    from lm_eval import tasks

    ours = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", ours)


@pytest.fixture(scope="session")
def smollm2() -> "fallow.Model":
    """The real SmolLM2-135M; `make test` installs its package."""
    from fallow.checkpoints.catalog import ALIASES, find_pieces

    alias = ALIASES["smollm2"]
    if find_pieces(alias) is None:
        pytest.skip(f"smollm2 is not installed: {alias.install_command}")
    return fallow.load("smollm2")


@pytest.fixture(scope="session")
def wikitext() -> tuple[Path, Path]:
    """WikiText-2 validation (calibration) and raw test (evaluation) text."""
    paths = DATA / "wikitext2" / "wiki.valid.detok.txt", DATA / "wikitext2" / "wiki.test.raw"
    for path in paths:
        if not path.exists():
            pytest.skip(f"{path} is missing; set FALLOW_DATA")
    return paths


class Result(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fallow", *map(str, arguments)])
        capsys.readouterr()  # what making a model said is not the command's
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts commands as processes of their own; it begins with ten seconds of imports."""
    with Server() as made:
        yield made


def make_packed(root: Path) -> Plan:
    """A model's folder in root/model, and root/packed.gguf, under a plan of top-k, which it is."""
    from fallow.packing.packer import pack

    model = fallow.load(make_folder("llama", root / "model"))
    plan = fallow.calibrate(
        model, "topk", sparsity=0.5, text=fallow.Text("text", TEXT), context=16, windows=2,
        measure=False,
    )  # fmt: skip
    pack(root / "model", root / "packed.gguf", quant="f32", plan=plan)
    return plan


def find_browser() -> str | None:
    named = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    return (
        named if Path(named).exists() else shutil.which("chromium") or shutil.which("google-chrome")
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = find_browser() or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: playwright install chromium, or name one in CHROMIUM")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
