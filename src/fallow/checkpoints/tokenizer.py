"""Text to token ids, from a GGUF's metadata or a Hugging Face folder. Needs no transformers."""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
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

from fallow.checkpoints import template_process
from fallow.checkpoints.chat_template import Marks, Message
from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError, in_one_line
from fallow.common.files import read_json
from fallow.common.progress import note

Ids = Sequence[int] | np.ndarray  # (T,)

# `tokenizers` holds Python's lock while it encodes one text, for 0.4 s of 500,000 characters, but
# not for a batch, which starts threads.
_LONG = 10_000  # characters

_LONGEST_PIECE = 512  # characters of a token of SentencePiece's
_LONGEST_RUN = 64  # tokens that make no whole character: more are bytes that are no text

# The chat on which templates are tried.
_TRIAL: tuple[Message, ...] = (
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "It is noon."},
    {"role": "user", "content": "Thank you."},
)


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers` tokenizer and what a model's metadata says about using it."""

    backend: Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # by their names in templates
    # Whether control tokens are text is a setting of `backend`, not of its calls.
    _encoding: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what a damaged file may have in place of ids and a template."""
        for token_id in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            if type(token_id) is not int or not 0 <= token_id < 2**31:
                raise ValueError(f"{token_id!r} is no token id")
        if not all(isinstance(text, str) for text in self.special_tokens.values()):
            raise ValueError("a special token is no text")
        if not isinstance(self.chat_template, str | None):
            raise ValueError("the chat template is no text")

    def encode(self, text: str, parse_special: bool = False) -> np.ndarray:
        """Token ids, (T,) int64, without BOS. `parse_special`: control tokens are no text.

        Raises:
            FallowError: the text was made of bytes that are not UTF-8.
        """
        with self._encoding:
            self.backend.encode_special_tokens = not parse_special
            try:
                ids = self._ids(text)
            except TypeError:  # it has surrogates
                ids = self._ids(_without_surrogates(text))
        return np.asarray(ids, dtype=np.int64)

    def _ids(self, text: str) -> list[int]:
        if len(text) < _LONG:
            return self.backend.encode(text, add_special_tokens=False).ids
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Ids, after: Ids = ()) -> str:
        """The text of tokens, as it follows that of others; control tokens have none."""
        if not len(after):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)
        stream = TextStream(self, after)
        for token_id in ids:
            stream.add(int(token_id))
        return stream.text

    def piece(self, token_id: int) -> bytes:
        """What a token adds to a text that it stands in, maybe a part of a character.

        A control token's name; nothing for an id that is no token.
        """
        text = self.backend.id_to_token(token_id) or ""
        if token_id in self._added:
            return text.encode()
        if self._is_byte_level:
            try:
                return bytes(_BYTES[character] for character in text)
            except KeyError:
                return text.encode()
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()

    def is_control(self, token_id: int) -> bool:
        """Whether a token is none of the text."""
        return token_id in self._added and self._added[token_id].special

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def chat(
        self,
        conversation: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> np.ndarray:
        """Ids of a conversation, or of one user message, ready for the answer.

        Control tokens are those of the template: in messages they are text. `tools` are those that
        the model may call, as OpenAI's API has them.

        Raises:
            FallowError: the model has no chat template, or it refuses the conversation, or does
                nothing with tools.
        """
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        marked = self._marks.put(conversation)
        text = self.render(marked, tools=self._marks.put(tools or None))
        if tools and text == self._without_tools(marked):
            raise FallowError("the model's chat template does not tell the model of tools")
        (first, _), *rest = self._marks.split(text)
        pieces = [self.encode(first, parse_special=True)]
        pieces += [self._encode_within(piece, is_text) for piece, is_text in rest if piece]
        return self.with_bos(np.concatenate(pieces))

    def _without_tools(self, conversation: Sequence[Message]) -> str | None:
        """What the chat template writes; None where, as Hermes 2 Pro's, it does not work."""
        try:
            return self.render(conversation)
        except template_process.Excessive:
            raise
        except FallowError:
            return None

    @cached_property
    def _marks(self) -> Marks:
        """Marks of control tokens and of other added ones in the template, white space left out."""
        template = self.chat_template or ""
        found = ((token.content, token.special) for token in self._added.values())
        return Marks([t for t, special in found if special or (t in template and not t.isspace())])

    def _encode_within(self, piece: str, is_text: bool) -> np.ndarray:
        """Ids of a piece of a text, or of a control token that is text.

        Raises:
            FallowError: the control token cannot be told as text.
        """
        encode = self._encode_as_text if is_text else partial(self.encode, parse_special=True)
        # At the beginning of a text SentencePiece would add a space.
        line_break, ids = encode("\n"), encode("\n" + piece)
        within = ids[: len(line_break)].tolist() == line_break.tolist()
        ids = ids[len(line_break) :] if within else encode(piece)
        if is_text and self.backend.token_to_id(piece) in ids:
            raise FallowError(f"a message has {piece!r}, which this model cannot read as text")
        return ids

    def _encode_as_text(self, text: str) -> np.ndarray:
        """Ids of a text without any added tokens, which `backend` always finds but for control."""
        backend = self.backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [(text, None)]
        if backend.pre_tokenizer is not None:
            words = backend.pre_tokenizer.pre_tokenize_str(text)
        tokens = (token for word, _ in words for token in backend.model.tokenize(word))
        return np.asarray([token.id for token in tokens], dtype=np.int64)

    def render(
        self,
        conversation: Sequence[Message],
        answer: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as the model's chat template writes it; `answer`: up to where one begins.

        Raises:
            FallowError: the model has no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise FallowError("this model has no chat template; prompt it with plain text")
        return template_process.render(
            self.chat_template, conversation, self.special_tokens, answer, tools
        )

    def chat_problems(self) -> list[str]:
        """What of a chat the chat template cannot write, if there is one; a line each.

        Raises:
            Excessive: it takes too long, or too much.
        """
        if self.chat_template is None:
            return []
        try:
            self.render(_TRIAL)
        except template_process.Excessive:
            raise
        except FallowError as error:
            return [f"no chat with this model: {error}"]
        try:
            self.render([{"role": "system", "content": "Be brief."}, *_TRIAL])
        except template_process.Excessive:
            raise
        except FallowError as error:
            return [f"no system messages in a chat with this model: {error}"]
        return []

    def endless(self) -> str | None:
        """Why answers do not end by themselves; None if they may."""
        if not self.eos_ids:
            return "has no end token"
        if self.chat_template is None:
            return None
        after = ""  # what follows an answer, the last one or another
        for chat in (_TRIAL[:2], _TRIAL):
            try:
                text = self.render(chat, answer=False)
            except FallowError:
                return None  # of which chat_problems tells
            after += text.rpartition(_TRIAL[1]["content"])[2].partition(_TRIAL[2]["content"])[0]
        found = [int(i) for i in self.encode(after, parse_special=True) if self.is_control(int(i))]
        if not found or any(i in self.eos_ids for i in found):
            return None  # a turn that ends with plain text: the model may know an end token
        token = self.backend.id_to_token(found[0])
        return f"has a chat template that ends a turn with {token}, which is no end token"

    def prompt(self, text: str, chat: bool = False, parse_special: bool = True) -> np.ndarray:
        """Ids of a text to continue, or with `chat` to answer; BOS where the model wants it.

        `parse_special`: control tokens in a text to continue are no text.
        """
        return self.chat(text) if chat else self.with_bos(self.encode(text, parse_special))

    def with_bos(self, ids: np.ndarray) -> np.ndarray:
        """The ids with BOS in front, if the model wants one and it is not there."""
        if not self.add_bos or self.bos_id is None or (len(ids) and ids[0] == self.bos_id):
            return ids
        return np.concatenate([[self.bos_id], ids])


class TextStream:
    """The text of tokens that come one by one after others, decoded with what they follow in view.

    By themselves tokens have another text: decoders drop the space that a text begins with, and
    make characters of bytes. Only the tokens since the last whole character are decoded each time,
    so that a text takes time in proportion to its length, whatever its tokens are.
    """

    def __init__(self, tokenizer: TextTokenizer, after: Ids = ()) -> None:
        self._decode = tokenizer.decode
        self._window = self._last(after)
        self._n_shown = len(self._window)  # tokens of the window whose text is settled
        self._shown = self._decode(self._window).rstrip("\ufffd")
        self._settled: list[str] = []
        self.tail = ""  # what the next tokens may change

    @property
    def text(self) -> str:
        """The whole text; U+FFFD at the end are bytes that the next tokens may complete."""
        return "".join(self._settled) + self.tail

    def _last(self, after: Ids) -> list[int]:
        """As many of the last tokens as have a text, of whole characters."""
        n = 1
        while n < len(after):
            text = self._decode(after[-n:])
            if text and not text.startswith("\ufffd"):
                break
            n *= 2
        return [int(i) for i in after[-n:]]

    def add(self, token_id: int) -> str:
        """What is settled by one more token, after what was before; no later one changes it."""
        self._window.append(token_id)
        self.tail = self._decode(self._window)[len(self._shown) :]
        is_long = len(self._window) - self._n_shown >= _LONGEST_RUN
        if (not self.tail or self.tail.endswith("\ufffd")) and not is_long:
            return ""
        settled, self.tail = self.tail, ""
        if settled:
            self._settled.append(settled)
            del self._window[: self._n_shown]
            self._n_shown = len(self._window)
            self._shown = self._decode(self._window)
        else:  # control tokens
            del self._window[self._n_shown :]
        return settled


def note_endless(tokenizer: TextTokenizer, name: str) -> None:
    """Tells on stderr that answers of a model do not end by themselves, if so."""
    why = tokenizer.endless()
    if why is not None:
        note(f"{name} {why}; its answers may go on to their largest length")


def _without_surrogates(text: str) -> str:
    """The text of a command line that Python could not decode in the locale, if it is UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise FallowError("the text has bytes that are not UTF-8; convert it") from error


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


def tokenizer_from_folder(folder: Path, model: Path | None = None) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and what lies beside it.

    `model`: where config.json and generation_config.json lie, if elsewhere. Tokens are named and
    added as transformers does; a model ends at what any of the files calls its end.

    Raises:
        FallowError: tokenizer.json or another file is missing or damaged.
    """
    with usable(f"{folder}/tokenizer.json"):
        backend = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        backend.no_truncation()  # a fine-tuning script may have left both in the file
        backend.no_padding()
    config, named, added = (
        _read(folder / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    generation, architecture = (
        _read((model or folder) / name) for name in ("generation_config.json", "config.json")
    )
    with usable(f"what {folder} says of its tokenizer"):
        settings = config if "added_tokens_decoder" in config else config | named
        special, extra = _special_tokens(settings)
        _add_tokens(
            backend, [*special.values(), *extra], settings.get("added_tokens_decoder"), added
        )
        bos_id = _token_id(backend, special.get("bos_token"))
        ends = [i for file in (generation, architecture) for i in _end_ids(file)]
        ends += [_token_id(backend, file.get("eos_token")) for file in (config, named)]
        template = folder / "chat_template.jinja"
        return TextTokenizer(
            backend,
            bos_id=bos_id,
            eos_ids=_unique(ends),
            # What the tokenizer itself does, whatever add_bos_token says.
            add_bos=bos_id is not None and backend.encode("a").ids[:1] == [bos_id],
            chat_template=template.read_text(encoding="utf-8")
            if template.exists()
            else _template(config.get("chat_template")),
            special_tokens=special,
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "download it again") if path.exists() else {}


def _template(found: Any) -> str | None:
    """A chat template; of several, which have names, the default one."""
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    return found.get("default") if isinstance(found, dict) else found


def _special_tokens(settings: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Those that have names, bos_token or image_token say, and those that have none."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {
        name: token
        for name, token in settings.items()
        if name.endswith("_token") and token is not None and not isinstance(token, bool)
    }
    if isinstance(extra, dict):
        named, extra = named | extra, []
    texts = {name: _token_text(token) for name, token in named.items()}
    return texts, [_token_text(token) for token in extra]


def _add_tokens(
    backend: Tokenizer,
    controls: list[str],
    listed: dict[str, Any] | None,
    added: dict[str, Any],
) -> None:
    """Adds the tokens that other files have and tokenizer.json has not, as transformers does.

    `listed` is tokenizer_config.json's added_tokens_decoder, `added` an older file of them.
    """
    if listed is None:
        listed = {i: {"content": t, "special": t in controls} for t, i in added.items()}
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted((int(i), token) for i, token in listed.items()):
        if token["content"] in there:
            continue
        backend.add_tokens([AddedToken(**token)])
        there.add(token["content"])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(f"it has no token {i} to be {token['content']!r}")
    # A name for what the vocabulary lacks is a text for chat templates, but no token of the model.
    new = [t for t in controls if t not in there and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])


def _token_text(token: Any) -> str:
    """A token that is named by a string or by {"content": string}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{token!r} is no token")
    return text


def _token_id(backend: Tokenizer, token: Any) -> int | None:
    return None if token is None else backend.token_to_id(_token_text(token))


def _end_ids(config: dict[str, Any]) -> list[Any]:
    """What a config says of them; -1 is how some say that there is none."""
    found = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return [i for i in (found if isinstance(found, list) else [found]) if i != -1]


def _unique(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(i for i in dict.fromkeys(ids) if i is not None)


# How text is cut before BPE merges it, by the name that llama.cpp gives the scheme
# (tokenizer.ggml.pre). The patterns are those of the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# Words end where small letters are followed by a large one.
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    # What llama.cpp's converter called a tokenizer that it did not know, and llama.cpp does then.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "mpt": (_GPT2,),  # and GPT-NeoX, Pythia
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "qwen35": (_QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),),
    "gpt-4o": (_O200K,),
    "tekken": (_O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", ""),),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\x{0800}-\x{9fa5}\x{ac00}-\x{d7ff}]+",
        r"\p{N}",
    ),
}
# A word that is a token is taken as it is, whatever its merges would give, and a text begins with
# BOS where the file does not say.
_WHOLE_WORDS = ("llama-bpe", "falcon3", "tekken")
# The models' own tokenizers, unlike llama.cpp, bring text into Unicode's NFC first.
_NORMALIZED = ("mpt", "olmo", "qwen2", "qwen35")

# Kinds of token in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# The byte that each character of a byte-level vocabulary stands for: GPT-2's encoder.py.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}

# What GGUF calls the tokens that chat templates have names for; the spelling is its own.
_GGUF_NAMES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token",
    "padding": "pad_token", "cls": "cls_token", "mask": "mask_token",
}  # fmt: skip
# Tokens that end a turn, a text or a file in models of many families, whatever else a GGUF says;
# llama.cpp ends at them too (llama-vocab.cpp).
_ENDS = frozenset((
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<EOT>", "_<EOT>", "[EOT]",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|return|>", "<|call|>",
    "<turn|>", "<|tool_response>",
))  # fmt: skip


def tokenizer_from_gguf(file: GgufFile) -> TextTokenizer:
    """The tokenizer stored in a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama",
    or "gemma4", which has its merges).

    Raises:
        FallowError: another kind of tokenizer, an unknown way to cut text before BPE, or damage.
    """
    with usable(f"the tokenizer of GGUF {file.path}"):
        return _from_gguf(file)


def _from_gguf(file: GgufFile) -> TextTokenizer:
    kind = file.get("tokenizer.ggml.model")
    tokens = file.get("tokenizer.ggml.tokens")
    types = file.numbers("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise FallowError(f"GGUF {file.path} has {len(tokens)} tokens but {len(types)} token types")
    if kind == "gpt2":
        backend = _byte_level_bpe(file, tokens)
    elif kind in ("llama", "gemma4"):
        backend = _sentencepiece_bpe(file, tokens)
    else:
        raise FallowError(
            f"GGUF {file.path} has a tokenizer of kind {kind!r}; known kinds: gpt2, llama, gemma4"
        )
    kinds = [_CONTROL if t in _ENDS else kind for t, kind in zip(tokens, types, strict=True)]
    for wanted, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in wanted
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    ids = {
        name: file.get(f"tokenizer.ggml.{name}_token_id", None)
        for name in (*_GGUF_NAMES, "eot", "eom")
    }
    # In GPT-OSS's format <|end|> ends what it thinks, and the answer comes after.
    is_harmony = "<|return|>" in tokens and "<|call|>" in tokens
    ends = [i for i, t in enumerate(tokens) if t in _ENDS and not (is_harmony and t == "<|end|>")]
    return TextTokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=_unique([ids["eos"], ids["eot"], ids["eom"], *ends]),
        add_bos=bool(file.get("tokenizer.ggml.add_bos_token", _adds_bos(file))),
        chat_template=file.get("tokenizer.chat_template", None),
        special_tokens={
            name: tokens[ids[key]]
            for key, name in _GGUF_NAMES.items()
            if ids[key] in range(len(tokens))
        },
    )


def _adds_bos(file: GgufFile) -> bool:
    """What llama.cpp does where the file does not say."""
    scheme = file.get("tokenizer.ggml.pre", "")
    return file.get("tokenizer.ggml.model") == "llama" or scheme in _WHOLE_WORDS


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scheme = file.get("tokenizer.ggml.pre", "missing")  # files from before 2024 have none
    if scheme not in _PATTERNS:
        raise FallowError(
            f"GGUF {file.path} cuts text by the scheme {scheme!r}; known: {', '.join(_PATTERNS)}; "
            "give the model as a Hugging Face folder instead"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, _merges(file), ignore_merges=scheme in _WHOLE_WORDS))
    if scheme in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in _PATTERNS[scheme]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) for merge in file.get("tokenizer.ggml.merges"))
    return [(left, right) for left, right in pairs]


def _sentencepiece_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = file.get("tokenizer.ggml.unknown_token_id", None)
    types = file.numbers("tokenizer.ggml.token_type")
    if file.get("tokenizer.ggml.model") == "gemma4":
        merges = _merges(file)
    else:
        merges = _merges_from_scores(tokens, file.numbers("tokenizer.ggml.scores"), types)
    backend = Tokenizer(
        BPE(
            vocabulary,
            merges,
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

    Raises:
        FallowError: a token is so long that its splits are no matter of a moment.
    """
    longest = max(tokens, key=len, default="")
    if len(longest) > _LONGEST_PIECE:
        raise FallowError(
            f"token {tokens.index(longest)} has {len(longest)} characters; SentencePiece makes "
            f"pieces of 16, and at most {_LONGEST_PIECE} are read; download the file again"
        )
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
