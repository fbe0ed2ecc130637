"""Answers that have a form, a JSON schema's or a grammar's: llguidance tells which tokens may come.

What is asked for comes from strangers. llguidance counts its work and gives up at bounds
(https://github.com/guidance-ai/llguidance); the text that it reads is bounded here.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.common.errors import FallowError, in_one_line

# Characters of a schema or grammar. Hostile ones of that length took up to 0.7 s to prepare, while
# other threads of Python ran.
LONGEST_FORM = 1 << 15
# White space where JSON may have it: by itself a model may go on with it to its largest length.
_WHITE_SPACE = r"( |\n{1,2}[ \t]{0,20})?"
_JSON: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITE_SPACE,
    "lenient": False,  # a keyword that it does not know is an error
    "coerce_one_of": False,
}


def json_rule(schema: Mapping[str, Any]) -> str:
    """What stands in a Lark grammar for the values of a JSON schema.

    Raises:
        FormError: it sets options of llguidance's.
    """
    _check_options(schema)
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"


class FormError(FallowError):
    """A schema or grammar that is not understood, or takes too much to follow."""


class Grammar:
    """Which tokens may come next in an answer. The end token may where the form is complete."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """One for another answer."""
        return Grammar(self._matcher.deep_copy())

    def begin(self) -> None:
        """An answer begins."""
        self._matcher.reset()

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """Logits (vocabulary,) with minus infinity for what may not come.

        Raises:
            FormError: what may come takes too much to find out, or nothing may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(bool)
        if not allowed.any():
            raise FormError("the form that is asked for leaves no token to go on with")
        return np.where(allowed, logits, np.float32(-np.inf))

    def add(self, token: int) -> None:
        """The answer goes on with a token that may come."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(
                f"the form that is asked for cannot be followed: {_reason(self._matcher)}"
            )


class Grammars:
    """Makes them for a model's tokens.

    Raises:
        FallowError: llguidance is not there, or the model has no end token.
    """

    def __init__(self, tokenizer: TextTokenizer, vocabulary_size: int) -> None:
        self._tokenizer, self._vocabulary_size = tokenizer, vocabulary_size

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Of a JSON schema's values.

        Raises:
            FormError: it is too large or too complex, or has a keyword that llguidance has not.
        """
        _check_options(schema)
        text = json.dumps(schema)
        _check_length(text)
        make = _llguidance().LLMatcher.grammar_from_json_schema
        return self._made(make(text, overrides=_JSON))

    def of_text(self, text: str) -> Grammar:
        """Of a grammar in llama.cpp's GBNF, or in Lark as llguidance has it.

        Raises:
            FormError: it is too large or too complex, or is neither.
        """
        _check_length(text)
        _llguidance()
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            lark = any_to_lark(text)
        except Exception as error:  # its own errors, or Python's at the end of a text
            raise FormError(f"the grammar is not understood: {in_one_line(error)}") from error
        return self.of_lark(lark)

    def of_lark(self, text: str) -> Grammar:
        """As `of_text`, of one in Lark alone."""
        _check_length(text)
        return self._made(_llguidance().LLMatcher.grammar_from_lark(text))

    def _made(self, grammar: str) -> Grammar:
        library = _llguidance()
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise FormError(f"the form that is asked for is not understood: {_reason(matcher)}")
        return Grammar(matcher)

    @cached_property
    def _tokens(self) -> Any:
        tokens = _Tokens(self._tokenizer, self._vocabulary_size)
        return _llguidance().LLTokenizer(tokens, eos_token=tokens.ends)


class _Tokens:
    """A tokenizer as llguidance's LLTokenizer takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, vocabulary_size: int) -> None:
        self.ends = [i for i in tokenizer.eos_ids if i < vocabulary_size]
        if not self.ends:
            raise FallowError("this model has no end token, without which no form is complete")
        self.eos_token_id = self.ends[0]
        self.tokens = [tokenizer.piece(i) for i in range(vocabulary_size)]
        self.special_token_ids = [i for i in range(vocabulary_size) if tokenizer.is_control(i)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        # At the beginning of a text SentencePiece would add a space.
        line_break, ids = self._encode("\n").tolist(), self._encode("\n" + text).tolist()
        n = len(line_break)
        return ids[n:] if ids[:n] == line_break else self._encode(text).tolist()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise FallowError(
            "answers of a given form need llguidance; install it with: pip install 'fallow[server]'"
        ) from error
    return llguidance


def _check_options(schema: Mapping[str, Any]) -> None:
    if "x-guidance" in schema:
        raise FormError("x-guidance sets options of llguidance's; leave it out")


def _check_length(text: str) -> None:
    if len(text) > LONGEST_FORM:
        raise FormError(
            f"the form that is asked for has {len(text)} characters; at most {LONGEST_FORM} are "
            "taken"
        )


def _reason(matcher: Any) -> str:
    return in_one_line(matcher.get_error())
