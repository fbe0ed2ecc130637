"""Tokenizers from GGUF metadata; what the real ones give for text with traps."""

import dataclasses
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, normalizers

import fallow
from conftest import make_sentencepiece
from fallow.checkpoints.catalog import find_model
from fallow.checkpoints.tokenizer import (
    _PATTERNS,
    TextStream,
    TextTokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
    tokenizer_from_json,
)
from fallow.checkpoints.weights import GgufFile, read_gguf
from fallow.common.errors import FallowError


def gguf_file(**changes: object) -> GgufFile:
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            "<unk>",
            "<s>",
            "</s>",
            "<0x41>",
            "▁",
            "a",
            "b",
            "ab",
            "▁a",
            "▁ab",
            "<sep>",
        ],
        "tokenizer.ggml.scores": [0, 0, 0, 0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, 0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return GgufFile(Path("m.gguf"), metadata | changes, {})


def test_sentencepiece_merges_by_score() -> None:
    tokenizer = tokenizer_from_gguf(gguf_file())
    # "ab" scores better than "▁a", so that a and b are merged first.
    assert tokenizer.encode("ab ab").tolist() == [7, 9]
    assert tokenizer.encode("A").tolist() == [3]  # a byte
    assert tokenizer.decode([9, 3]) == " abA"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)


def test_gemma4_merges_by_rank() -> None:
    """Its files have the merges of tokenizer.json, and scores that say nothing."""
    expected = make_sentencepiece().backend_tokenizer
    expected.normalizer = normalizers.Replace(" ", "▁")  # without one in front
    model = json.loads(expected.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [3, 3, 2, *[6] * 256, *[1] * (len(tokens) - 259)]
    changes = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*tokens, "<turn|>"],
        "tokenizer.ggml.scores": [-1000.0] * (len(tokens) + 1),
        "tokenizer.ggml.token_type": [*kinds, 3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = tokenizer_from_gguf(gguf_file(**changes))
    for text in ("neuron rests", " neuron  neurons\n\nrest", "é🙂 euro"):
        assert tokenizer.encode(text).tolist() == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.add_bos
    assert tokenizer.eos_ids == (1, len(tokens))  # and the end of a turn


def test_json_in_less_memory_is_the_same_tokenizer() -> None:
    gguf = json.loads(tokenizer_from_gguf(gguf_file()).backend.to_str())
    old = gguf | {"model": gguf["model"] | {"merges": ["a b", "▁ a", "▁ ab"]}}
    gap = gguf | {"added_tokens": [gguf["added_tokens"][0] | {"id": 99, "content": "<new>"}]}
    word = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    for content in (gguf, old, gap, gguf | {"model": word, "added_tokens": []}):
        text = json.dumps(content)
        assert tokenizer_from_json(text).to_str() == Tokenizer.from_str(text).to_str()
    with pytest.raises(Exception, match="line 1"):
        tokenizer_from_json("{")


def test_space_prefix() -> None:
    tokenizer = tokenizer_from_gguf(gguf_file(**{"tokenizer.ggml.add_space_prefix": True}))
    assert tokenizer.encode("ab").tolist() == [9]


def test_control_tokens_in_text_are_text_unless_asked_for() -> None:
    tokenizer = tokenizer_from_gguf(gguf_file())
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.encode("<s>", parse_special=True).tolist() == [1]
    assert tokenizer.encode("a<sep>a").tolist() == [5, 10, 5]  # user-defined: always one token


TYPED = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_control_tokens_typed_in_a_prompt_are_tokens(smollm2: fallow.Model) -> None:
    """As in transformers and llama.cpp, which give 16 tokens; 33 are those of plain text."""
    tokenizer = smollm2.tokenizer
    ids = tokenizer.prompt(TYPED).tolist()
    assert len(ids) == 16
    assert ids == transformers_of(tokenizer)(TYPED)["input_ids"]
    assert len(tokenizer.prompt(TYPED, parse_special=False)) == 33
    assert len(tokenizer.encode(TYPED)) == 33  # windows of text for perplexity


@pytest.mark.parametrize("kind", [3, 4])  # control, user-defined: GGUFs of Qwen2.5-Coder have both
def test_fill_in_the_middle(kind: int) -> None:
    """https://arxiv.org/abs/2409.12186, section 3.2.1: the order of the parts."""
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    tokenizer = tokenizer_from_gguf(with_tokens(*names, kind=kind))
    ids = tokenizer.prompt("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>").tolist()
    assert ids == [1, 11, 5, 12, 6, 13]


def test_the_unknown_token_is_one_too() -> None:
    """llama.cpp finds unknown tokens where it finds control tokens."""
    assert tokenizer_from_gguf(gguf_file()).encode("a<unk>", parse_special=True).tolist() == [5, 0]


def with_tokens(*names: str, kind: int = 3, **changes: Any) -> GgufFile:
    """The GGUF with more tokens, from 11 on."""
    metadata = gguf_file().metadata
    more = {
        "tokenizer.ggml.tokens": list(names),
        "tokenizer.ggml.scores": [0.0] * len(names),
        "tokenizer.ggml.token_type": [kind] * len(names),
    }
    return gguf_file(**{key: metadata[key] + value for key, value in more.items()} | changes)


def transformers_of(tokenizer: TextTokenizer) -> transformers.PreTrainedTokenizerFast:
    """The same tokenizer in transformers."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, **tokenizer.special_tokens
    )
    made.chat_template = tokenizer.chat_template
    return made


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<EOT>"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_a_gguf_ends_at_what_ends_turns(end: str, kind: int) -> None:
    """Whatever the file says beside it, and of whatever type, as llama.cpp (llama-vocab.cpp)."""
    tokenizer = tokenizer_from_gguf(with_tokens("<|x|>", end, kind=kind))
    assert tokenizer.eos_ids == (2, 12)
    assert tokenizer.encode(end, parse_special=True).tolist() == [12]
    assert tokenizer.decode([5, 12]) == "a"


def test_a_gguf_ends_at_eos_eot_and_eom() -> None:
    ids = {"eot": 13, "eom": 11}
    changes = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    assert tokenizer_from_gguf(with_tokens("x", "y", "z", **changes)).eos_ids == (2, 13, 11)


def test_smollm2_whose_eos_is_another_ends_its_turns(smollm2: fallow.Model) -> None:
    """llama.cpp ends at <|im_end|>, 2, though tokenizer.ggml.eos_token_id says <|endoftext|>, 0."""
    file = read_gguf(find_model("smollm2"))
    changed = {**file.metadata, "tokenizer.ggml.eos_token_id": 0}
    tokenizer = tokenizer_from_gguf(dataclasses.replace(file, metadata=changed))
    assert tokenizer.eos_ids == (0, 2)
    assert tokenizer.endless() is None


Change = Callable[[Path], None]


def write(name: str, content: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def set_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy without its weights."""
    for path in folders["llama"].glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ([drop("generation_config.json"), set_config(eos_token_id=[2, 4])], (2, 4, 1)),
        (
            [
                drop("generation_config.json"),
                write("tokenizer_config.json", {}),
                set_config(eos_token_id=[2, 4]),
            ],
            (2, 4),
        ),
        (
            [write("generation_config.json", {"eos_token_id": 7}), set_config(eos_token_id=9)],
            (7, 9, 1),
        ),
        ([write("special_tokens_map.json", {"eos_token": {"content": "neuron"}})], (1, "neuron")),
        ([set_config(eos_token_id=-1)], (1,)),
        (
            [
                drop("generation_config.json"),
                drop("tokenizer_config.json"),
                set_config(eos_token_id=None),
            ],
            (),
        ),
    ],
)
def test_a_folder_ends_at_what_any_file_says(
    folder: Path, changes: list[Change], ends: tuple[int | str, ...]
) -> None:
    for change in changes:
        change(folder)
    tokenizer = tokenizer_from_folder(folder)
    ids = (tokenizer.backend.token_to_id(i) if isinstance(i, str) else i for i in ends)
    assert tokenizer.eos_ids == tuple(ids)
    assert (tokenizer.endless() is None) == bool(ends)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"bos_token": "neuron", "pad_token": "</s>"},
        {"added_tokens_decoder": {}, "bos_token": "neuron"},
        {
            "added_tokens_decoder": {"270": {"content": None, "special": True}},
            "mask_token": "<mask>",
            "extra_special_tokens": ["0"],
        },
    ],
)
def test_special_tokens_are_those_of_transformers(
    folder: Path, config: dict[str, Any] | None
) -> None:
    """Names in tokenizer_config.json and special_tokens_map.json, tokens in others."""
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        for i, token in config.get("added_tokens_decoder", {}).items():
            token["content"] = tokenizer_from_folder(folder).backend.id_to_token(int(i))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "cls_token": "<c>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = tokenizer_from_folder(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.special_tokens == expected.special_tokens_map
    assert tokenizer.bos_id == expected.bos_token_id
    for text in ("<s>neuron</s>", "0 neuron 1", "a"):
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, parse_special=True).tolist() == ids


def test_added_tokens_beside_tokenizer_json(folder: Path) -> None:
    """What older folders have; transformers' tokenizer gives the ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 300, "<s>": 0}))
    tokenizer = tokenizer_from_folder(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("a<new>b<s>", parse_special=True).tolist()
    assert ids == expected("a<new>b<s>", add_special_tokens=False)["input_ids"]
    assert 300 in ids
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 400}))
    with pytest.raises(FallowError, match="it has no token 400 to be '<new>'"):
        tokenizer_from_folder(folder)


def test_a_folder_that_was_converted_keeps_its_ends(folder: Path, tmp_path_factory: Any) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(scratch / name)
    set_config(eos_token_id=[1, 5])(folder)
    assert tokenizer_from_folder(scratch, folder).eos_ids == (1, 5)


def test_a_model_that_would_not_end_is_told(
    folder: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    fallow.load(folder)
    assert capsys.readouterr().err == ""
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}<s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    fallow.load(folder)
    said = "ends a turn with <s>, which is no end token; its answers may go on to their largest"
    assert said in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text(template.replace("<s>{% end", "</s>{% end"))
    fallow.load(folder)
    assert capsys.readouterr().err == ""
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    set_config(eos_token_id=None)(folder)
    fallow.load(folder)
    printed = capsys.readouterr().err
    assert (
        printed
        == f"note: {folder} has no end token; its answers may go on to their largest length\n"
    )


# Context -----------------------------------------------------------------------------------------


@pytest.fixture
def sentencepiece(tmp_path: Path) -> TextTokenizer:
    make_sentencepiece().save_pretrained(tmp_path)
    return tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_tokens_are_decoded_after_others(
    kind: str, sentencepiece: TextTokenizer, tiny: dict[str, fallow.Model]
) -> None:
    """The text of all tokens less that of those before; transformers decodes both."""
    tokenizer = sentencepiece if kind == "sentencepiece" else tiny["llama"].tokenizer
    reference = transformers_of(tokenizer)
    ids = tokenizer.encode("neuron  rests é🙂🙂\n re<s> st", parse_special=True).tolist()
    for cut in range(len(ids) + 1):
        before, whole = (
            reference.decode(part, skip_special_tokens=True) for part in (ids[:cut], ids)
        )
        stream = TextStream(tokenizer, ids[:cut])
        settled, said = "", []
        for i in ids[cut:]:
            settled += stream.add(i)
            said.append(settled + stream.tail)
        assert stream.text == (said[-1] if said else "")
        if not before.endswith("\ufffd"):
            assert tokenizer.decode(ids[cut:], after=ids[:cut]) == whole[len(before) :]
            assert (said[-1] if said else "") == whole[len(before) :]
        for shorter, longer in pairwise(said):
            assert longer.startswith(shorter.rstrip("\ufffd"))


def test_half_a_character_before(sentencepiece: TextTokenizer) -> None:
    ids = sentencepiece.encode("e🙂").tolist()
    assert sentencepiece.decode(ids[-2:], after=ids[:-2]) == "🙂"


def test_few_tokens_are_decoded_at_a_time(sentencepiece: TextTokenizer) -> None:
    ids = sentencepiece.encode("neuron rests 🙂 " * 40).tolist()
    stream, lengths = TextStream(sentencepiece, ids), []

    def decode(some: list[int]) -> str:
        lengths.append(len(some))
        return sentencepiece.decode(some)

    stream._decode = decode  # type: ignore[assignment]
    for i in ids:
        stream.add(i)
    assert stream.text == sentencepiece.decode(ids + ids)[len(sentencepiece.decode(ids)) :]
    assert max(lengths) < 20


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "GGUF"])
def test_pieces_are_the_bytes_of_the_text(
    kind: str, sentencepiece: TextTokenizer, tiny: dict[str, fallow.Model], smollm2: fallow.Model
) -> None:
    tokenizers = {
        "sentencepiece": sentencepiece,
        "byte level": tiny["llama"].tokenizer,
        "GGUF": smollm2.tokenizer,
    }
    tokenizer, text = tokenizers[kind], "neuron  rests\té🙂 \x00\x7f"
    pieces = [tokenizer.piece(int(i)) for i in tokenizer.encode(text)]
    prefix = " " if kind == "sentencepiece" else ""
    assert b"".join(pieces) == (prefix + text).encode()
    assert tokenizer.piece(0) in (b"<s>", b"<|endoftext|>")
    assert tokenizer.piece(10**6) == b""
    assert (tokenizer.is_control(0), tokenizer.is_control(100)) == (True, False)


# -------------------------------------------------------------------------------------------------


def test_unknown_kinds() -> None:
    with pytest.raises(
        FallowError, match="a tokenizer of kind 'bert'; known kinds: gpt2, llama, gemma4"
    ):
        tokenizer_from_gguf(gguf_file(**{"tokenizer.ggml.model": "bert"}))
    changes = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}
    with pytest.raises(FallowError, match="cuts text by the scheme 'odd'; known: default, gpt-2"):
        tokenizer_from_gguf(gguf_file(**changes))
    with pytest.raises(FallowError, match="by the scheme 'missing'"):
        tokenizer_from_gguf(gguf_file(**{"tokenizer.ggml.model": "gpt2"}))
    with pytest.raises(FallowError, match="has 11 tokens but 1 token types"):
        tokenizer_from_gguf(gguf_file(**{"tokenizer.ggml.token_type": [1]}))


def test_chat(tmp_path: Path) -> None:
    plain = tokenizer_from_gguf(gguf_file())
    with pytest.raises(FallowError, match="no chat template"):
        plain.chat("a")
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ 'b' if add_generation_prompt }}"
    tokenizer = TextTokenizer(plain.backend, 1, (2,), True, template)
    assert tokenizer.chat("a").tolist() == [1, 7]
    refusing = TextTokenizer(plain.backend, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(FallowError, match="chat template refuses the prompt: no"):
        refusing.chat("a")
    with pytest.raises(FallowError, match="chat template does not work: "):
        TextTokenizer(plain.backend, chat_template="{% if %}").chat("a")


def test_llama3_keeps_whole_words(tiny: dict[str, fallow.Model]) -> None:
    """A token that no merge reaches is taken whole, and BOS is added though the file is silent."""
    vocabulary = tiny["llama"].tokenizer.backend.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "zebra"]
    file = gguf_file(
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(tokens),
            "tokenizer.ggml.merges": [],
        }
    )
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.encode("zebra").tolist() == [len(tokens) - 1]
    assert tokenizer.add_bos


# One text as it is cut before merging, by the names that llama.cpp has for the ways; its own
# tokenizer cuts it so, but for the word with É.
CUT = "It's 12345, ABcDef élÉv\n\n  x_y=f(1)//"
GPT2 = ["It", "'s", " 12345", ",", " ABcDef", " élÉv", "\n\n ", " x", "_", "y", "=", "f", "("]
DIGITS = [*"12345"]
WORDS_AND_SIGNS = ["\n\n", " ", " x", "_y", "=f", "(", "1", ")//"]  # those of Llama 3 and since
O200K = [" ABc", "Def", " él", "Év", *WORDS_AND_SIGNS]
CUTS = {
    "gpt-2": [*GPT2, "1", ")//"],
    "mpt": [*GPT2, "1", ")//"],
    "olmo": [*GPT2, "1", ")//"],
    "default": ["It", "'", "s", " ", "123", "45", ",", *GPT2[4:], "1", ")//"],
    "smollm": [*GPT2[:2], " ", *DIGITS, *GPT2[3:], "1", ")//"],
    "starcoder": [*GPT2[:2], " ", *DIGITS, *GPT2[3:], "1", ")//"],
    "refact": [*GPT2[:2], " ", *DIGITS, *GPT2[3:], "1", ")//"],
    "dbrx": [
        *GPT2[:2],
        " ",
        "123",
        "45",
        *GPT2[3:6],
        *WORDS_AND_SIGNS,
    ],
    "qwen2": [*GPT2[:2], " ", *DIGITS, *GPT2[3:6], *WORDS_AND_SIGNS],
    "tekken": [
        "It",
        "'s",
        " ",
        *DIGITS,
        ",",
        *O200K,
    ],
    "gpt-4o": [
        "It's",
        " ",
        "123",
        "45",
        ",",
        *O200K,
    ],
    "deepseek-coder": [
        "It",
        "'",
        "s",
        " ",
        *DIGITS,
        ",",
        " ABcDef",
        " élÉv",
        "\n",
        "\n",
        " ",
        " x",
        "_",
        "y",
        "=",
        "f",
        "(",
        "1",
        ")//",
    ],
}
SAME = {"phi-2": "gpt-2", "llama-bpe": "dbrx", "falcon3": "dbrx", "smaug-bpe": "dbrx"}
SAME |= {"deepseek-r1-qwen": "qwen2", "qwen35": "qwen2"}


def byte_level(scheme: str, tiny: dict[str, fallow.Model]) -> TextTokenizer:
    vocabulary = tiny["llama"].tokenizer.backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return tokenizer_from_gguf(
        gguf_file(
            **{
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": scheme,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [1] * len(tokens),
                "tokenizer.ggml.merges": [],
            }
        )
    )


@pytest.mark.parametrize("scheme", _PATTERNS)
def test_ways_to_cut_text(scheme: str, tiny: dict[str, fallow.Model]) -> None:
    pre_tokenizer = byte_level(scheme, tiny).backend.pre_tokenizer
    assert pre_tokenizer is not None
    cut = [CUT[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(CUT)]
    assert cut == CUTS[SAME.get(scheme, scheme)]


@pytest.mark.parametrize("scheme", _PATTERNS)
def test_text_in_the_models_normal_form(scheme: str, tiny: dict[str, fallow.Model]) -> None:
    """As the models' own tokenizers have it; qwen35 besides keeps marks with their letters."""
    tokenizer, decomposed = byte_level(scheme, tiny), "re\u0301sume\u0301"
    normal = scheme in ("mpt", "olmo", "qwen2", "qwen35")
    expected = "résumé" if normal else decomposed
    assert tokenizer.decode(tokenizer.encode(decomposed)) == expected
    if scheme == "qwen35":
        pre_tokenizer: Any = tokenizer.backend.pre_tokenizer
        assert len(pre_tokenizer.pre_tokenize_str("e\u0301e ि")) == 2


def test_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tokenizer_from_folder(folders["llama"])
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (0, (1,), False)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FallowError, match=r"tokenizer.json is not usable"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folders["llama"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(FallowError, match=r"tokenizer_config.json is damaged; download it again"):
        tokenizer_from_folder(tmp_path)
    settings = {"eos_token": {"content": "</s>"}, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.chat_template) == ((1,), "x")


def test_smollm2_cuts_digits_and_keeps_spaces(smollm2: fallow.Model) -> None:
    tokenizer = smollm2.tokenizer
    ids = tokenizer.encode("In 2024,  it's\n\n naïve.")
    pieces = " ".join(tokenizer.backend.id_to_token(i) for i in ids)
    assert pieces == "In Ġ 2 0 2 4 , Ġ Ġit 's ĊĊ Ġna Ã¯ve ."
    prompt = tokenizer.decode(tokenizer.chat("Hi")) if tokenizer.chat_template else ""
    assert prompt.endswith("assistant\n")
    text = "def f(x):\n    return x ** 2  # 日本語 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).dtype == np.int64


# Hostile vocabularies and texts -------------------------------------------------------------------


def test_a_token_that_is_too_long_to_split(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "a" * 1_000_000],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 1, 1],
    }
    start = time.process_time()
    with pytest.raises(FallowError, match="token 2 has 1000000 characters"):
        tokenizer_from_gguf(GgufFile(tmp_path / "x.gguf", metadata, {}))
    assert time.process_time() - start < 1


def test_one_word_takes_time_in_proportion_to_its_length(sentencepiece: TextTokenizer) -> None:
    """SentencePiece knows no words: its merges are found by a queue, not by looking again."""

    def seconds(n: int) -> float:
        start = time.process_time()
        sentencepiece.encode("neuron" * n)
        return time.process_time() - start

    seconds(1000)
    assert seconds(80_000) < 10 * seconds(20_000)  # 16 times, if pairs were sought again and again
