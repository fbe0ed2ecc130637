"""Text to token ids, from a GGUF's metadata or a Hugging Face folder. Needs no transformers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE

from fallow.errors import FallowError, in_one_line
from fallow.files import read_json
from fallow.weights import GgufFile

Message = Mapping[str, str]
"""One of a conversation: {"role": "system", "user" or "assistant", "content": text}."""


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers` tokenizer and what a model's metadata says about using it."""

    backend: Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what a damaged file may have in place of ids and a template."""
        for token_id in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            if type(token_id) is not int or not 0 <= token_id < 2**31:
                raise ValueError(f"{token_id!r} is no token id")
        if not isinstance(self.chat_template, str | None):
            raise ValueError("the chat template is no text")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids, (T,) int64, without BOS. `special` allows control tokens in the text.

        Raises:
            FallowError: the text was made of bytes that are not UTF-8.
        """
        self.backend.encode_special_tokens = not special
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # it has surrogates
            ids = self.backend.encode(_without_surrogates(text), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: Any) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(self, conversation: str | Sequence[Message]) -> np.ndarray:
        """Ids of a conversation, or of one user message, ready for the answer.

        Raises:
            FallowError: the model has no chat template, or it refuses the conversation.
        """
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        return self.with_bos(self.encode(self.render(conversation), special=True))

    def render(self, conversation: Sequence[Message], answer: bool = True) -> str:
        """A conversation as the model's chat template writes it; `answer`: up to where one begins.

        Raises:
            FallowError: the model has no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise FallowError("this model has no chat template; prompt it with plain text")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in conversation],
                add_generation_prompt=answer,
                bos_token=self._token(self.bos_id),
                eos_token=self._token(self.eos_ids[0] if self.eos_ids else None),
            )
        except FallowError:
            raise
        except Exception as error:  # a template is a program: it may divide by zero
            raise FallowError(
                f"the model's chat template does not work: {in_one_line(error)}"
            ) from error

    def prompt(self, text: str, chat: bool = False) -> np.ndarray:
        """Ids of a text to continue, or with `chat` to answer; BOS where the model wants it."""
        return self.chat(text) if chat else self.with_bos(self.encode(text))

    def with_bos(self, ids: np.ndarray) -> np.ndarray:
        """The ids with BOS in front, if the model wants one and it is not there."""
        if not self.add_bos or self.bos_id is None or (len(ids) and ids[0] == self.bos_id):
            return ids
        return np.concatenate([[self.bos_id], ids])

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def _without_surrogates(text: str) -> str:
    """The text of a command line that Python could not decode in the locale, if it is UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise FallowError("the text has bytes that are not UTF-8; convert it") from error


def _raise_exception(message: str) -> None:
    """What chat templates call for a conversation that they cannot express."""
    raise FallowError(f"the model's chat template refuses the prompt: {message}")


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Makes of whatever a damaged tokenizer raises one line that names it."""
    try:
        yield
    except FallowError:
        raise
    except BaseException as error:  # tokenizers raises nothing more specific, and panics, too
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FallowError(f"{what} is not usable: {in_one_line(error)}") from error


def tokenizer_from_json(text: str) -> Tokenizer:
    """What `Tokenizer.from_str` makes of a tokenizer.json, in less memory.

    The vocabulary is handed over apart from the rest: parsed all at once, what is freed lies in
    pieces between what stays, 11 MB of Qwen2.5's 39.

    Raises:
        Exception: as `Tokenizer.from_str` does, or as a dict does that lacks a key.
    """
    content = json.loads(text)
    model, added = content["model"], content["added_tokens"]
    if model.get("type") != "BPE":
        return Tokenizer.from_str(text)
    empty = {"added_tokens": [], "model": model | {"vocab": {}, "merges": []}}
    backend = Tokenizer.from_str(json.dumps(content | empty))
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.pop("merges")]
    vocabulary = model.pop("vocab")
    options = {k: v for k, v in model.items() if k != "type" and v is not None}
    backend.model = BPE(vocabulary, merges, **options)
    backend.add_tokens([AddedToken(**{k: v for k, v in t.items() if k != "id"}) for t in added])
    if any(backend.token_to_id(token["content"]) != token["id"] for token in added):
        return Tokenizer.from_str(text)  # ids with gaps
    return backend


def tokenizer_from_folder(folder: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and what lies beside it.

    Raises:
        FallowError: tokenizer.json or another file is missing or damaged.
    """
    with usable(f"{folder}/tokenizer.json"):
        backend = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        backend.no_truncation()  # a fine-tuning script may have left both in the file
        backend.no_padding()
    config, generation = (
        read_json(path, "download it again") if path.exists() else {}
        for path in (folder / "tokenizer_config.json", folder / "generation_config.json")
    )
    with usable(f"what {folder} says of its tokenizer"):
        bos_id = _special_id(backend, config.get("bos_token"))
        eos = generation.get("eos_token_id")
        if eos is None:
            eos = _special_id(backend, config.get("eos_token"))
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        template = folder / "chat_template.jinja"
        return TextTokenizer(
            backend,
            bos_id=bos_id,
            eos_ids=tuple(eos_ids),
            # What the tokenizer itself does, whatever add_bos_token says.
            add_bos=bos_id is not None and backend.encode("a").ids[:1] == [bos_id],
            chat_template=template.read_text(encoding="utf-8")
            if template.exists()
            else _template(config.get("chat_template")),
        )


def _template(found: Any) -> str | None:
    """A chat template; of several, which have names, the default one."""
    if isinstance(found, list):
        return next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def _special_id(backend: Tokenizer, token: Any) -> int | None:
    """The id of a special token, named by a string or by {"content": string}."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else backend.token_to_id(token)


# How text is cut before BPE merges it, by the name that llama.cpp gives the scheme
# (tokenizer.ggml.pre). The patterns are those of the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
}

# Kinds of token in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def tokenizer_from_gguf(file: GgufFile) -> TextTokenizer:
    """The tokenizer stored in a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        FallowError: another kind of tokenizer, an unknown way to cut text before BPE, or damage.
    """
    with usable(f"the tokenizer of GGUF {file.path}"):
        return _from_gguf(file)


def _from_gguf(file: GgufFile) -> TextTokenizer:
    kind = file.get("tokenizer.ggml.model")
    tokens = file.get("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise FallowError(f"GGUF {file.path} has {len(tokens)} tokens but {len(types)} token types")
    if kind == "gpt2":
        backend = _byte_level_bpe(file, tokens)
    elif kind == "llama":
        backend = _sentencepiece_bpe(file, tokens)
    else:
        raise FallowError(
            f"GGUF {file.path} has a tokenizer of kind {kind!r}; known kinds: gpt2, llama"
        )
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == wanted
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    eos = {file.get(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot")}
    return TextTokenizer(
        backend,
        bos_id=file.get("tokenizer.ggml.bos_token_id", None),
        eos_ids=tuple(sorted(i for i in eos if i is not None)),
        add_bos=bool(file.get("tokenizer.ggml.add_bos_token", _adds_bos(file))),
        chat_template=file.get("tokenizer.chat_template", None),
    )


def _adds_bos(file: GgufFile) -> bool:
    """What llama.cpp does where the file does not say."""
    scheme = file.get("tokenizer.ggml.pre", "")
    return file.get("tokenizer.ggml.model") == "llama" or scheme == "llama-bpe"


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scheme = file.get("tokenizer.ggml.pre", "missing")  # files from before 2024 have none
    if scheme not in _PATTERNS:
        raise FallowError(
            f"GGUF {file.path} cuts text by the scheme {scheme!r}; known: {', '.join(_PATTERNS)}; "
            "give the model as a Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a whole word that is a token as it is, whatever its merges would give.
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=scheme == "llama-bpe"))
    if scheme == "qwen2":
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in _PATTERNS[scheme]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = file.get("tokenizer.ggml.unknown_token_id", None)
    types = file.get("tokenizer.ggml.token_type")
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges_from_scores(tokens, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=any(t == _BYTE for t in types),
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """BPE merges of a SentencePiece vocabulary: every split of a token into two others.

    SentencePiece merges the pair whose result scores best, so merges are ranked by the result's
    score; of one result's splits the first by the parts' own ids comes first.
    """
    rank = {
        token: (-score, i)
        for i, (token, score, type_) in enumerate(zip(tokens, scores, types, strict=True))
        if type_ not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = []
    for token, order in rank.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                merges.append((order, rank[left][1], rank[right][1], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in merges]
