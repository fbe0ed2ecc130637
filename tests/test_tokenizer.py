"""Tokenizers from GGUF metadata; what the real ones give for text with traps."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import fallow
from fallow.errors import FallowError
from fallow.tokenizer import (
    TextTokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
    tokenizer_from_json,
)
from fallow.weights import GgufFile


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


def test_unknown_kinds() -> None:
    with pytest.raises(FallowError, match="a tokenizer of kind 'bert'; known kinds: gpt2, llama"):
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
