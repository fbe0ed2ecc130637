"""Log-probabilities of tokens in the forms that OpenAI's API gives them."""

import codecs
from collections.abc import Sequence
from typing import Any

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.engine.sampling import TokenChoice
from fallow.serving import schemas as api


def chat_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[TokenChoice], top: int | None
) -> api.ChatLogprobs | None:
    """Of tokens of a chat, with so many of the likeliest; None: none were asked for."""
    if top is None:
        return None
    return api.ChatLogprobs(
        content=[
            api.TokenLogprob(
                **_top(tokenizer, t.id, t.logprob),
                top_logprobs=[api.TopToken(**_top(tokenizer, *each)) for each in t.top],
            )
            for t in tokens
        ]
    )


def completion_logprobs(
    tokenizer: TextTokenizer,
    tokens: Sequence[TokenChoice],
    top: int | None,
    text: str,
    offset: int,
) -> api.CompletionLogprobs | None:
    """The older form, of /v1/completions, of a text that `offset` characters went before."""
    if top is None:
        return None
    texts = [_top(tokenizer, t.id, 0)["token"] for t in tokens]
    return api.CompletionLogprobs(
        tokens=texts,
        token_logprobs=[t.logprob for t in tokens],
        top_logprobs=[
            {each["token"]: each["logprob"] for each in (_top(tokenizer, *x) for x in t.top)}
            if t.logprob is not None
            else None
            for t in tokens
        ]
        if top
        else None,
        text_offset=[offset + i for i in _begins(tokenizer, tokens, text)],
    )


def _top(tokenizer: TextTokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    piece = tokenizer.piece(token)
    text = piece.decode("utf-8", "replace")  # a token may be a part of a character
    return {"token": text, "logprob": logprob, "bytes": list(piece)}


def _begins(tokenizer: TextTokenizer, tokens: Sequence[TokenChoice], text: str) -> list[int]:
    """Where in their text tokens begin; one that goes on with a character, where that does."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, at = [], 0
    for token in tokens:
        piece = tokenizer.piece(token.id)
        if not (piece and 0x80 <= piece[0] < 0xC0):
            at += len(decoder.decode(b"", final=True))  # of a character that broke off
        found.append(at)
        said = decoder.decode(piece)
        if tokenizer.is_control(token.id):
            said = said if text.startswith(said, at) else ""  # a prompt has it, an answer not
        elif at == 0 and said.startswith(" ") and not text.startswith(" "):
            said = said[1:]  # SentencePiece puts one before a text
        at += len(said)
    return found
