"""The routes. Every error has OpenAI's form; a client that goes away frees the engine."""

import asyncio
import base64
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.common.errors import FallowError
from fallow.engine.answer import Piece
from fallow.engine.grammar import FormError, Grammar, Grammars
from fallow.engine.sampling import Sampler, TokenChoice
from fallow.engine.stats import Activity, Stats
from fallow.plan import Plan
from fallow.serving import schemas as api
from fallow.serving.limits import Client, Limits, error_response
from fallow.serving.logprobs import chat_logprobs, completion_logprobs
from fallow.serving.page import add_page
from fallow.serving.responses import Growing
from fallow.serving.telemetry import Telemetry
from fallow.serving.tools import Reader, Style, check_messages, style_of
from fallow.serving.worker import Busy, Closing, Job, Overlong, Worker

CLIENT_GONE = 499  # nobody reads it
KEEP_ALIVE = 15.0  # seconds between comments on a stream that has nothing to say
EVENT_STREAM: Any = {"content": {"text/event-stream": {}}}


def create_app(
    worker: Worker,
    name: str,
    api_key: str | None = None,
    max_body: int = 1 << 20,
    cors: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """The server's application.

    Args:
        name: what the model is called; requests for another one are refused.
        api_key: what clients must send as `Authorization: Bearer KEY`, one of several between
            commas; None: nothing.
        max_body: largest request, bytes.
        cors: origins whose web pages may ask, "http://localhost:3000" say; "*": all.
        hosts: names that requests may be addressed to, without a port; empty: any.
    """
    app = FastAPI(
        title="fallow",
        summary="One packed model behind OpenAI's API.",
        docs_url=None,  # it and /redoc run scripts of another server
        redoc_url=None,
        openapi_url=None,  # ours asks for the key
        redirect_slashes=False,  # Limits takes a slash at the end away
    )
    telemetry = Telemetry(worker)
    api_keys = [] if api_key is None else [key.strip() for key in api_key.split(",")]
    app.add_middleware(
        Limits, max_body=max_body, telemetry=telemetry, api_keys=api_keys, hosts=hosts
    )
    if cors:  # around Limits: a preflight has no key, and a refusal is for the page to read
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    answering = _Answering(worker, name, telemetry)
    errors = (400, 408, 413, 429, 500, 503, *((401,) if api_key is not None else ()))
    responses: Any = {code: {"model": api.ErrorResponse} for code in errors}
    # It tells the schema that there is a key, which Limits checks before a body is read.
    guarded = [Depends(HTTPBearer(auto_error=False))] if api_key is not None else []
    add_page(app)
    _add_health_and_metrics(app, answering, guarded, responses)
    _add_models(app, answering, guarded, responses)
    _add_completions(app, answering, guarded, responses)
    _add_tokens(app, answering, guarded, responses)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(FallowError, _fallow_error)
    app.add_exception_handler(Exception, _defect)
    app.openapi = partial(_openapi, app, name)  # type: ignore[method-assign]
    return app


def _add_health_and_metrics(
    app: FastAPI, answering: "_Answering", guarded: list[Any], responses: Any
) -> None:
    """Routes for those who run the server."""
    worker, telemetry = answering.worker, answering.telemetry

    @app.get("/health")
    async def health() -> api.Health:
        """Whether the server takes requests, and how many wait."""
        return api.Health(model=answering.name, waiting=worker.waiting, running=worker.running)

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get(
        "/metrics",
        dependencies=guarded,
        responses=_only(responses, 401),
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(telemetry.text(), media_type=telemetry.content_type)


def _add_models(app: FastAPI, answering: "_Answering", guarded: list[Any], responses: Any) -> None:
    """Routes that tell which models there are: the one."""

    @app.get("/v1/models", dependencies=guarded, responses=_only(responses, 401))
    async def models() -> api.ModelList:
        return api.ModelList(data=[answering.card])

    @app.get(
        "/v1/models/{model:path}",
        dependencies=guarded,
        responses=_only(responses, 401) | {404: {"model": api.ErrorResponse}},
    )
    async def model(model: str) -> api.ModelCard:
        answering.check_model(model)
        return answering.card


def _add_completions(
    app: FastAPI, answering: "_Answering", guarded: list[Any], responses: Any
) -> None:
    """Routes at which the model answers."""
    answers = responses | {404: {"model": api.ErrorResponse}, 200: EVENT_STREAM}

    @app.post(
        "/v1/chat/completions",
        dependencies=guarded,
        responses=answers,
        response_model=api.ChatResponse,
    )
    async def chat(body: api.ChatRequest, request: Request) -> Any:
        """Answers a conversation by the model's chat template."""
        return await answering.chat(body, request)

    @app.post(
        "/v1/responses",
        dependencies=guarded,
        responses=answers,
        response_model=api.ResponseMade,
    )
    async def create_response(body: api.ResponsesRequest, request: Request) -> Any:
        """Answers a text or a conversation; nothing of it is kept."""
        return await answering.responses(body, request)

    @app.post(
        "/v1/completions",
        dependencies=guarded,
        responses=answers,
        response_model=api.CompletionResponse,
    )
    async def completions(body: api.CompletionRequest, request: Request) -> Any:
        """Continues a text, or each of several."""
        return await answering.completions(body, request)

    @app.post(
        "/v1/embeddings",
        dependencies=guarded,
        responses=responses | {404: {"model": api.ErrorResponse}},
        response_model=api.EmbeddingResponse,
    )
    async def embeddings(body: api.EmbeddingRequest, request: Request) -> Any:
        """The mean of a text's hidden states, of length 1, or that of each of several."""
        return await answering.embeddings(body, request)


def _add_tokens(app: FastAPI, answering: "_Answering", guarded: list[Any], responses: Any) -> None:
    """Routes of texts and their tokens, as llama.cpp's server has them."""

    @app.post("/tokenize", dependencies=guarded, responses=responses)
    async def tokenize(body: api.TokenizeRequest) -> api.TokenList:
        """A text's tokens."""
        return await answering.tokenize(body)

    @app.post("/detokenize", dependencies=guarded, responses=responses)
    async def detokenize(body: api.DetokenizeRequest) -> api.Content:
        """The text of tokens, control tokens by their names."""
        return await answering.detokenize(body)


def _only(responses: dict[Any, Any], code: int) -> dict[Any, Any]:
    return {code: responses[code]} if code in responses else {}


def _openapi(app: FastAPI, name: str) -> dict[str, Any]:
    """FastAPI's schema, with the one model's name and without the 422 that we answer as 400."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", summary=app.summary, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        for request in ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "ResponsesRequest"):
            schema["components"]["schemas"][request]["properties"]["model"]["enum"] = [name]
        app.openapi_schema = schema
    return app.openapi_schema


# Errors ------------------------------------------------------------------------------------------


def _invalid(request: Request, error: Any) -> JSONResponse:
    kind = request.headers.get("content-type", "nothing")
    if "json" not in kind:
        return error_response(
            400, f"the body is said to be {kind}; send Content-Type: application/json"
        )
    first = error.errors()[0]
    where, message = api.refusal(first["loc"][1:], first)
    return error_response(400, message, param=where)


def _http_error(request: Request, error: Any) -> JSONResponse:
    message, param = str(error.detail), getattr(error, "param", None)
    if param is None and error.status_code in (404, 405):  # of a route that there is not
        message = f"{request.method} {request.url.path}: {message.lower()}"
    return error_response(error.status_code, message, param, **(error.headers or {}))


def _fallow_error(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, Busy):
        return error_response(
            429, str(error), None, None, **{"Retry-After": str(error.retry_after)}
        )
    if isinstance(error, Closing | Overlong):
        return error_response(503, str(error))
    if isinstance(error, FormError):
        return error_response(400, str(error))
    return error_response(500, str(error))


def _defect(request: Request, error: Any) -> JSONResponse:
    return error_response(500, _defect_said(error))


def _defect_said(error: Exception) -> str:
    return f"a defect of the server: {type(error).__name__}; see its log"


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, FallowError) else _defect_said(error)


class _BadRequest(HTTPException):
    """What is wrong with a field of the body."""

    def __init__(self, message: str, param: str, code: int = 400) -> None:
        super().__init__(code, message)
        self.param = param


# Answers -----------------------------------------------------------------------------------------

_T = TypeVar("_T")
_Form = tuple[str, Callable[[], Grammar]]  # the field that asks for it, and what makes its grammar


class _Answering:
    """From a request to jobs, and from what they deliver to a response."""

    def __init__(self, worker: Worker, name: str, telemetry: Telemetry) -> None:
        self.worker, self.name, self.telemetry = worker, name, telemetry
        plan = worker.engine.plan
        self.card = api.ModelCard(
            id=name, created=int(time.time()), plan=_plan_named(plan) if plan else None
        )
        self._one_encodes = CapacityLimiter(1)  # so that others have processors left

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.worker.engine.tokenizer

    @property
    def grammars(self) -> Grammars:
        return self.worker.engine.grammars

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise _BadRequest(
                f"there is no model {name!r} here; this is {self.name!r}", "model", 404
            )

    async def chat(self, body: api.ChatRequest, request: Request) -> Any:
        self.check_model(body.model)
        top = (body.top_logprobs or 0) if body.logprobs else None
        run, readers = await self._run_chat(body, request, "messages", top)
        made: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if body.stream:
            made["object"] = "chat.completion.chunk"
            return self._streamed(body, run, made, True, readers)
        answer = await run.collect()
        choices = []
        for i, text in enumerate(answer.texts):
            said = [*readers[i].add(text), *readers[i].rest()] if readers else [text]
            calls = [each for each in said if not isinstance(each, str)]
            content = "".join(each for each in said if isinstance(each, str))
            choices.append(
                api.ChatChoice(
                    index=i,
                    message=api.AnswerMessage(
                        content=None if calls and not content else content,
                        tool_calls=calls or None,
                    ),
                    logprobs=chat_logprobs(self.tokenizer, answer.tokens[i], top),
                    finish_reason=_finish(answer.stats[i].finish, len(calls)),
                )
            )
        return api.ChatResponse(
            **made, model=self.name, choices=choices, usage=_usage(answer.stats, body.n or 1)
        )

    async def _run_chat(
        self, body: api.ChatRequest, request: Request, field: str, top_logprobs: int | None
    ) -> tuple["_Run", list[Reader]]:
        """The answers to a conversation that came in that field, and what tells calls in them."""
        template = self.tokenizer.chat_template or ""
        try:
            check_messages(template, body.messages)
        except FallowError as error:
            raise _BadRequest(f"{field}: {error}", field) from error
        tools = [tool.model_dump(exclude_unset=True) for tool in body.offered]
        readers = self._readers(body)
        messages = [message.passed for message in body.messages]
        wanted = body.max_completion_tokens or body.max_tokens
        encode = [partial(self.tokenizer.chat, messages, tools)]
        form = self._form(body, body.response_format) or self._form_of_calls(body)
        run = await self._run(body, request, field, encode, wanted, top_logprobs, form=form)
        return run, readers

    async def responses(self, body: api.ResponsesRequest, request: Request) -> Any:
        self.check_model(body.model)
        try:
            chat = body.chat()
        except ValidationError as error:
            first = error.errors()[0]
            where, message = api.refusal(first["loc"], first)
            raise _BadRequest(message, where or "tools") from error
        run, readers = await self._run_chat(chat, request, "input", None)
        growing = Growing(body, self.name)
        if body.stream:
            events = self._response_events(run, readers, growing)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = await run.collect()
        for event in (answer.texts[0], answer.stats[0]):
            _ = list(_grown(growing, event, readers))
        return growing.made

    async def _response_events(
        self, run: "_Run", readers: Sequence[Reader], growing: Growing
    ) -> AsyncIterator[str]:
        try:
            for event in growing.begin():
                yield _named_event(event)
            async for _, found in run.events():
                if found is None:
                    yield ": waiting\n\n"
                    continue
                text = found.text if isinstance(found, Piece) else found
                for event in _grown(growing, text, readers):
                    yield _named_event(event)
        except Exception as error:  # the status, 200, was sent already
            yield _named_event(growing.fail(_said(error)))

    async def completions(self, body: api.CompletionRequest, request: Request) -> Any:
        self.check_model(body.model)
        prompts = _listed(body.prompt)
        encode = self._encoders(prompts, body.parse_special is not False)
        echoes = [partial(self._text_of, p) for p in prompts] if body.echo else None
        form = self._form(body)
        run = await self._run(
            body, request, "prompt", encode, body.max_tokens, body.logprobs, echoes, form
        )
        made: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if body.stream:
            return self._streamed(body, run, made | {"object": "text_completion"}, False)
        answer = await run.collect()
        texts = answer.texts
        return api.CompletionResponse(
            **made,
            model=self.name,
            choices=[
                api.CompletionChoice(
                    index=i,
                    text=texts[i],
                    logprobs=completion_logprobs(
                        self.tokenizer, answer.tokens[i], body.logprobs, texts[i], 0
                    ),
                    finish_reason=answer.stats[i].finish,
                )
                for i in range(len(texts))
            ],
            usage=_usage(answer.stats, body.n or 1),
        )

    async def embeddings(self, body: api.EmbeddingRequest, request: Request) -> Response:
        self.check_model(body.model)
        size = self.worker.engine.hidden_size
        if body.dimensions not in (None, size):
            raise _BadRequest(
                f"dimensions: must be {size}, which embeddings of this model have, or left out; it "
                f"is {body.dimensions}",
                "dimensions",
            )
        client: Client = request.state.client
        encode = self._encoders(_listed(body.input), body.parse_special is not False)
        prepare = partial(self._encode, "input", encode, None, 0)
        prompts, _, _ = await self._with_places(client, len(encode), "input", prepare)
        run = _Run(self.worker, request, self.telemetry)
        run.jobs = [
            Job(
                client.turn, ids, 0, None, partial(run.deliver, i),
                cache=object(),  # nobody shares what was read for it
                with_plan=body.fallow_plan is not False,
            )
            for i, ids in enumerate(prompts)
        ]  # fmt: skip
        run.start()
        found = await run.collect()
        made = partial(_embedding_response, body, self.name, found)
        text = await to_thread.run_sync(made, limiter=self._one_encodes)
        return Response(text, media_type="application/json")

    def _encoders(
        self, prompts: Sequence[str | list[int]], parse_special: bool
    ) -> list[Callable[[], np.ndarray]]:
        """What makes the ids of each prompt."""
        return [
            partial(self.tokenizer.prompt, p, parse_special=parse_special)
            if isinstance(p, str)
            else partial(np.asarray, p)
            for p in prompts
        ]

    async def tokenize(self, body: api.TokenizeRequest) -> api.TokenList:
        def found() -> api.TokenList:
            ids = self.tokenizer.encode(body.content, body.parse_special is not False)
            if body.add_special:
                ids = self.tokenizer.with_bos(ids)
            if not body.with_pieces:
                return api.TokenList(tokens=ids.tolist())
            return api.TokenList(tokens=[self._piece(i) for i in ids.tolist()])

        return await to_thread.run_sync(found, limiter=self._one_encodes)

    def _piece(self, token_id: int) -> api.TokenPiece:
        piece = self.tokenizer.piece(token_id)
        try:
            return api.TokenPiece(id=token_id, piece=piece.decode())
        except UnicodeDecodeError:  # a part of a character
            return api.TokenPiece(id=token_id, piece=list(piece))

    async def detokenize(self, body: api.DetokenizeRequest) -> api.Content:
        size = self.worker.engine.vocabulary_size
        largest = max(body.tokens, default=0)
        if largest >= size:
            raise _BadRequest(
                f"tokens: token id {largest} is outside the vocabulary of {size}", "tokens"
            )

        def found() -> api.Content:
            text = b"".join(map(self.tokenizer.piece, body.tokens))
            return api.Content(content=text.decode("utf-8", "replace"))

        return await to_thread.run_sync(found, limiter=self._one_encodes)

    def _readers(self, body: api.ChatRequest) -> list[Reader]:
        """What tells calls from text, for each answer; none where no tools are offered.

        Raises:
            HTTPException: 400, the model calls tools in a way that is not known.
        """
        if not body.offered or self.tokenizer.chat_template is None:  # which chats need
            return []
        names = {tool.function.name for tool in body.callable}
        style, several = self._style(), body.parallel_tool_calls is not False
        return [Reader(style, names, several) for _ in range(body.n or 1)]

    def _style(self) -> Style:
        try:
            return style_of(self.tokenizer.chat_template or "")
        except FallowError as error:
            raise _BadRequest(f"tools: {error}", "tools") from error

    def _form_of_calls(self, body: api.ChatRequest) -> _Form | None:
        """Of answers that must call tools, or whose calls must fit."""
        if not body.must_call and not any(tool.function.strict for tool in body.callable):
            return None
        several = body.parallel_tool_calls is not False

        def make() -> Grammar:
            style = self._style()
            return self.grammars.of_lark(
                style.grammar(body.callable, body.must_call, several, self.tokenizer)
            )

        return "tools", make

    def _form(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        response_format: api.ResponseFormat | None = None,
    ) -> _Form | None:
        """What makes the grammar of the form that is asked for, with the field that asks."""
        if body.json_schema is not None:
            return "json_schema", partial(self.grammars.of_schema, body.json_schema)
        if body.grammar:
            return "grammar", partial(self.grammars.of_text, body.grammar)
        if response_format is None or response_format.type == "text":
            return None
        of = response_format.json_schema
        schema = {"type": "object"} if of is None else of.schema_
        return "response_format", partial(self.grammars.of_schema, schema)

    async def _grammar(self, form: _Form | None) -> Grammar | None:
        if form is None:
            return None
        field, make = form
        try:
            return await to_thread.run_sync(make, limiter=self._one_encodes)
        except FallowError as error:
            raise _BadRequest(f"{field}: {error}", field) from error

    async def _encode(
        self,
        field: str,
        encode: Sequence[Callable[[], np.ndarray]],
        echoes: Sequence[Callable[[], str]] | None,
        least: int = 1,
    ) -> tuple[list[np.ndarray], list[int], list[str] | None]:
        """Of each prompt its ids, tokens that an answer may have, and the text that is echoed.

        There must be room for `least` tokens of an answer.
        """

        def encoded() -> tuple[list[np.ndarray], list[int], list[str] | None]:
            ids, room = [], []
            for each in encode:  # up to the first that is refused
                ids.append(each())
                room.append(self._room(ids[-1], field, least))
            return ids, room, None if echoes is None else [echo() for echo in echoes]

        try:
            return await to_thread.run_sync(encoded, limiter=self._one_encodes)
        except FallowError as error:  # the chat template refuses it
            raise _BadRequest(str(error), field) from error

    def _text_of(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.backend.decode(prompt, skip_special_tokens=False)

    async def _run(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        request: Request,
        field: str,
        encode: Sequence[Callable[[], np.ndarray]],
        max_tokens: int | None,
        top_logprobs: int | None,
        echoes: Sequence[Callable[[], str]] | None = None,
        form: _Form | None = None,
    ) -> "_Run":
        """Takes places in the queue, and then encodes.

        Raises:
            HTTPException: 400 for a prompt, in that field, that the model cannot read, or a form
                that is not taken.
            Busy, Closing: there are no places.
        """
        client: Client = request.state.client
        self._check_biases(body.biases)
        n = body.n or 1

        async def prepare() -> tuple[Grammar | None, Any]:
            return await self._grammar(form), await self._encode(field, encode, echoes)

        what = "n" if n > 1 else field
        grammar, encoded = await self._with_places(client, n * len(encode), what, prepare)
        prompts, room, texts = encoded
        seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
        nucleus = 1.0 if body.top_p is None else body.top_p
        sampler = partial(
            Sampler,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=nucleus or 1.0,
            top_k=(body.top_k or 0) if nucleus else 1,  # the likeliest has a probability above 0
            min_p=body.min_p or 0.0,
            repeat_penalty=body.repeat_penalty or body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.biases,
        )
        run = _Run(self.worker, request, self.telemetry)
        run.jobs = [
            Job(
                client.turn,
                ids,
                room[i] if max_tokens is None else min(max_tokens, room[i]),
                sampler(seed=(seed + j) % (1 << 64), grammar=grammar and grammar.copy()),
                partial(run.deliver, i * n + j),
                body.stops,
                top_logprobs,
                texts[i] if texts else None,
                (client.cache, body.cache_salt),
                isinstance(body, api.ChatRequest) and bool(body.fallow_activity),
                body.fallow_plan is not False,
            )
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        run.start()
        return run

    async def _with_places(
        self, client: Client, places: int, field: str, prepare: Callable[[], Awaitable[_T]]
    ) -> _T:
        """What `prepare` makes, after so many places in the queue are taken, which stay taken.

        Raises:
            HTTPException: 400, there are not so many, whoever waits.
            Busy, Closing: there are no places.
        """
        if places > self.worker.limit:
            raise _BadRequest(
                f"{field}: {places} are more than the {self.worker.limit} that may wait; "
                "send fewer, or serve with a larger --queue",
                field,
            )
        self.worker.reserve(client.turn, places)
        try:
            return await prepare()
        except BaseException:
            self.worker.release(client.turn, places)
            raise

    def _check_biases(self, biases: dict[int, float]) -> None:
        size = self.worker.engine.vocabulary_size
        if biases and max(biases) >= size:
            raise _BadRequest(
                f"logit_bias: token id {max(biases)} is outside the vocabulary of {size}",
                "logit_bias",
            )

    def _room(self, ids: np.ndarray, field: str, least: int) -> int:
        """Tokens that an answer may have."""
        engine = self.worker.engine
        room = engine.context - len(ids)
        if len(ids) == 0:
            raise _BadRequest("there are no tokens to read; give some text", field)
        if room < least:
            fills = "fills" if least else "exceeds"
            raise _BadRequest(
                f"the prompt of {len(ids)} tokens {fills} the context of {engine.context}; "
                "shorten it, or serve with a larger --context",
                field,
            )
        if ids.max() >= engine.vocabulary_size:
            raise _BadRequest(
                f"token id {ids.max()} is outside the vocabulary of {engine.vocabulary_size}",
                field,
            )
        return room

    def _streamed(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        run: "_Run",
        made: dict[str, Any],
        is_chat: bool,
        readers: Sequence[Reader] = (),
    ) -> StreamingResponse:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        asked = (body.n or 1) if wants_usage else None
        events = self._chunks(run, made, is_chat, asked, readers)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _chunks(
        self,
        run: "_Run",
        made: dict[str, Any],
        is_chat: bool,
        usage_of: int | None,
        readers: Sequence[Reader],
    ) -> AsyncIterator[str]:
        """`usage_of`: so many answers to a prompt, whose usage is wanted."""
        made = made | {"model": self.name}
        top = run.jobs[0].top_logprobs
        offsets, stats = [0] * len(run.jobs), [Stats()] * len(run.jobs)

        def chunk(
            index: int,
            piece: Piece,
            finish: str | None,
            first: bool = False,
            calls: Sequence[api.ToolCallMade] = (),
        ) -> str:
            choice: dict[str, Any] = {"index": index, "finish_reason": finish}
            if is_chat:
                role = {"role": "assistant"} if first else {}
                choice["delta"] = role if finish else role | {"content": piece.text}
                if calls:
                    choice["delta"] = {"tool_calls": [call.model_dump() for call in calls]}
                found: Any = chat_logprobs(self.tokenizer, piece.tokens, top)
            else:
                choice["text"] = piece.text
                found = completion_logprobs(
                    self.tokenizer, piece.tokens, top, piece.text, offsets[index]
                )
                offsets[index] += len(piece.text)
            choice["logprobs"] = found.model_dump() if found and piece.tokens else None
            event = made | {"choices": [choice]}
            if told := [_activity(t.activity) for t in piece.tokens if t.activity]:
                event["fallow_activity"] = told
            return _event(event)

        def read(index: int, said: Sequence[Any], tokens: tuple[TokenChoice, ...]) -> Iterator[str]:
            """Chunks of text and calls; tokens are told with the first."""
            for each in said or ([""] if tokens else []):
                if isinstance(each, str):
                    yield chunk(index, Piece(each, tokens), None)
                else:
                    yield chunk(index, Piece("", tokens), None, calls=[each])
                tokens = ()

        try:
            for index in range(len(run.jobs) if is_chat else 0):
                yield chunk(index, Piece(), None, first=True)
            async for index, event in run.events():
                if event is None:
                    yield ": waiting\n\n"
                elif isinstance(event, Stats):
                    stats[index] = event
                    n_calls = 0
                    if readers:
                        for text in read(index, readers[index].rest(), ()):
                            yield text
                        n_calls = readers[index].n_calls
                    yield chunk(index, Piece(), _finish(event.finish, n_calls))
                elif readers:
                    for text in read(index, readers[index].add(event.text), event.tokens):
                        yield text
                else:
                    yield chunk(index, event, None)
            if usage_of is not None:
                usage = _usage(stats, usage_of).model_dump()
                yield _event(made | {"choices": [], "usage": usage})
        except Exception as error:  # the status, 200, was sent already
            yield _event({"error": {"message": _said(error), "type": "server_error"}})
        yield "data: [DONE]\n\n"


class _Collected:
    def __init__(self, n: int) -> None:
        self.pieces: list[list[str]] = [[] for _ in range(n)]
        self.tokens: list[list[TokenChoice]] = [[] for _ in range(n)]
        self.stats = [Stats()] * n
        self.embeddings: list[np.ndarray] = [np.empty(0)] * n

    @property
    def texts(self) -> list[str]:
        return ["".join(pieces) for pieces in self.pieces]


class _Run:
    """The jobs of one request, and what they deliver."""

    def __init__(self, worker: Worker, request: Request, telemetry: Telemetry) -> None:
        self.jobs: list[Job] = []
        self._worker, self._request, self._telemetry = worker, request, telemetry
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | Stats | Exception]] = asyncio.Queue()

    def deliver(self, index: int, event: Piece | Stats | Exception) -> None:
        """Called in the worker's thread."""
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def start(self) -> None:
        """Raises Closing."""
        self._worker.submit(*self.jobs, reserved=True)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Stats | None]]:
        """What comes, None where nothing does for a while; leaving it cancels what is left."""
        left = len(self.jobs)
        try:
            while left:
                try:
                    index, event = await asyncio.wait_for(self._queue.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield 0, None
                    continue
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Stats):
                    left -= 1
                    self._telemetry.answered(event)
                yield index, event
        finally:
            for job in self.jobs:
                self._worker.cancel(job)

    async def collect(self) -> _Collected:
        """All of it. Raises HTTPException 499 when the client goes away."""
        task = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
        if not task.done():
            with suppress(asyncio.CancelledError):
                await task
            raise HTTPException(CLIENT_GONE, "the client has gone")
        return task.result()

    async def _collect(self) -> _Collected:
        found = _Collected(len(self.jobs))
        async for index, event in self.events():
            if isinstance(event, Stats):
                found.stats[index] = event
            elif event is not None:
                found.pieces[index].append(event.text)
                found.tokens[index] += event.tokens
                if event.embedding is not None:
                    found.embeddings[index] = event.embedding
        return found

    async def _gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


def _listed(prompts: Any) -> list[Any]:
    """Texts and lists of ids, of a field that may have one of them alone."""
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


def _embedding_response(body: api.EmbeddingRequest, name: str, found: _Collected) -> str:
    """An `EmbeddingResponse` as JSON, made one by one: others need the interpreter in between."""
    made = []
    for i, vector in enumerate(found.embeddings):
        value: Any = vector.tolist()
        if body.encoding_format == "base64":
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        made.append(api.EmbeddingMade(index=i, embedding=value).model_dump_json())
    tokens = sum(stats.prompt_tokens for stats in found.stats)
    usage = api.EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return (
        f'{{"object":"list","data":[{",".join(made)}],"model":{json.dumps(name)},'
        f'"usage":{usage.model_dump_json()}}}'
    )


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


def _named_event(value: dict[str, Any]) -> str:
    return f"event: {value['type']}\n{_event(value)}"


def _plan_named(plan: Plan) -> str:
    """The rule, and what was asked of it."""
    if plan.target_sparsity is not None:
        return f"{plan.rule}, sparsity {plan.target_sparsity:.0%}"
    if plan.target_ppl_increase is not None:
        return f"{plan.rule}, PPL +{plan.target_ppl_increase:g} %"
    return f"{plan.rule}, {plan.knob_name or 'knob'} {plan.knob:.4g}"


def _activity(found: Activity) -> dict[str, Any]:
    return api.Activity(
        active_per_layer=found.active.round(4).tolist(),
        active_bins=found.bins.round(2).tolist(),
        bytes_read=found.bytes_read,
    ).model_dump()


def _grown(
    growing: Growing, found: str | Stats, readers: Sequence[Reader]
) -> Iterator[dict[str, Any]]:
    """What a piece of an answer's text, or its end, adds to the response to it."""
    if isinstance(found, str):
        said: Sequence[Any] = readers[0].add(found) if readers else [found]
    else:
        said = readers[0].rest() if readers else ()
    for each in said:
        yield from growing.add(each)
    if isinstance(found, Stats):
        yield from growing.end(found.finish, _usage([found], 1))


def _finish(finish: str, n_calls: int) -> str:
    """Why an answer ended, which called so many tools."""
    return "tool_calls" if n_calls and finish == "stop" else finish


def _usage(stats: Sequence[Stats], n: int) -> api.Usage:
    """Tokens add up, those of a prompt once for its n answers; of the figures those of the last."""
    prompt, new = sum(s.prompt_tokens for s in stats[::n]), sum(s.new_tokens for s in stats)
    last = stats[-1]
    return api.Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=api.CachedTokens(
            cached_tokens=sum(s.cached_tokens for s in stats[::n])
        ),
        sparsity=api.Sparsity(
            neurons_idle=last.sparsity,
            neurons_idle_per_layer=[round(v, 4) for v in last.sparsity_per_layer],
            bytes_per_token=last.bytes_per_token,
            decode_tps=last.decode_tps,
        ),
    )
