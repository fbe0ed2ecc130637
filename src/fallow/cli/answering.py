"""Commands that answer a prompt: `fallow run`, which also talks, and `fallow generate`."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    CacheOption,
    FileOption,
    FrequencyPenaltyOption,
    JsonOption,
    KernelsOption,
    LogitBiasOption,
    MaxNewTokensOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    OptionalRunArg,
    PackedPlanOption,
    PresencePenaltyOption,
    PromptArg,
    PromptOption,
    QuantOption,
    RepeatPenaltyOption,
    SeedOption,
    SkipOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    app,
    load_model,
    load_plan,
    open_engine,
    print_json,
    refuse_given,
)
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import read_json

NO_SCHEMA = "give a JSON schema, which is an object"


@app.command()
def run(
    model: OptionalRunArg = None,
    prompt: PromptArg = None,
    model_option: ModelOption = None,
    prompt_option: PromptOption = None,
    file: FileOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    repeat_penalty: RepeatPenaltyOption = 1.0,
    presence_penalty: PresencePenaltyOption = 0.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    logit_bias: LogitBiasOption = None,
    plan: PackedPlanOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show sparsity and speed.")] = False,
    quant: QuantOption = None,
    threads: ThreadsOption = None,
    context: CacheOption = None,
    memory: MemoryOption = None,
) -> None:
    """Talk to a model; with a prompt, or where input is no terminal, answer once."""
    from fallow.engine.sampling import Sampler
    from fallow.serving.chat import Conversation, chat

    name, text = _request(model, prompt, model_option, prompt_option, file)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed,
        "repeat_penalty": repeat_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": _biases(logit_bias),
    }  # fmt: skip
    sampler = Sampler(**sampling)
    engine = open_engine(name, quant, load_plan(plan), threads, context=context, memory=memory)
    has_template = engine.tokenizer.chat_template is not None
    if text is not None:
        ids = _prompt_ids(engine, text, system, chat=has_template)
        pieces = engine.generate(ids, max_new_tokens, **sampling)
        _print_stream(engine, text, pieces, show_figures=stats)
        return
    if not has_template:
        raise FallowError(
            f"{name} has no chat template: it continues text; give it some with --prompt"
        )
    chat(Conversation(engine, sampler, max_new_tokens, system), stats)


@app.command()
def generate(
    model: OptionalRunArg = None,
    prompt: PromptArg = None,
    model_option: ModelOption = None,
    prompt_option: PromptOption = None,
    file: FileOption = None,
    system: SystemOption = None,
    plan: PackedPlanOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repeat_penalty: RepeatPenaltyOption = 1.0,
    presence_penalty: PresencePenaltyOption = 0.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    logit_bias: LogitBiasOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this; repeatable.")] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="A file: the answer is a value of this JSON schema, or is cut short."),
    ] = None,
    parse_special: Annotated[
        bool,
        typer.Option(help="Control tokens in a prompt to continue are tokens, not text."),
    ] = True,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="The dense model's own text, guesses read ahead."),
    ] = False,
    quant: QuantOption = None,
    threads: ThreadsOption = None,
    skip: SkipOption = True,
    kernels: KernelsOption = None,
    context: CacheOption = None,
    memory: MemoryOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Not the engine but transformers, in this type (float32, bfloat16, float16, "
            "auto): what a plan leaves out is set to zero."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, with the plan's neurons skipped."""
    name, text = _request(model, prompt, model_option, prompt_option, file)
    if text is None:
        raise UsageError("there is no prompt; give one with --prompt or --file")
    refuse_given({"--system": system is not None and not chat}, "goes with --chat")
    loaded_plan = load_plan(plan)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed,
        "repeat_penalty": repeat_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": _biases(logit_bias),
        "json_schema": None if json_schema is None else read_json(json_schema, NO_SCHEMA),
    }  # fmt: skip
    if dtype is not None:
        given = {"--system": system is not None, "--lossless": lossless}
        given |= {"--quant": quant is not None, "--threads": threads is not None}
        given |= {"--no-skip": not skip, "--kernels": kernels is not None}
        given |= {"--context": context is not None, "--memory": memory is not None}
        refuse_given(given, "is the engine's; leave out --dtype")
        pieces = load_model(name, dtype).generate(
            text,
            max_new_tokens,
            **sampling,
            stop=stop or (),
            chat=chat,
            parse_special=parse_special,
            plan=loaded_plan,
        )
        answer = "".join(pieces)
        if as_json:
            print_json({"prompt": text, "text": answer})
        else:
            print(answer)
        return
    engine = open_engine(
        name,
        quant,
        loaded_plan,
        threads,
        context=context,
        skip_zeros=skip,
        kernels=kernels or "",
        memory=memory,
    )
    if memory is not None:
        from fallow.common.progress import console

        console.print(engine.describe_memory(), highlight=False)
    ids = _prompt_ids(engine, text, system, chat, parse_special)
    pieces = engine.generate(ids, max_new_tokens, **sampling, stop=stop or (), lossless=lossless)
    _print_stream(engine, text, pieces, as_json)


def _request(
    model: str | None,
    prompt: str | None,
    model_option: str | None,
    prompt_option: str | None,
    file: Path | None,
) -> tuple[str, str | None]:
    """Model and prompt; no prompt is given on a terminal where no option says one.

    Raises:
        UsageError: there is no model, or a thing is given twice.
        FallowError: the prompt's file cannot be read, or is not UTF-8.
    """
    words = [word for word in (model, prompt) if word is not None]
    if model_option is None:
        if not words:
            raise UsageError("give a model: an alias (see: fallow models), a file or a folder")
        model_option = words.pop(0)
    prompts = [*words, *([] if prompt_option is None else [prompt_option])]
    if len(prompts) + (file is not None) > 1:
        raise UsageError("give one model and one prompt: an argument, --prompt or --file")
    if file is not None and str(file) != "-":
        return model_option, _read_prompt(file)
    if file is not None or prompts == ["-"] or not (prompts or sys.stdin.isatty()):
        return model_option, _read_prompt(None)
    return model_option, prompts[0] if prompts else None


def _biases(given: list[str] | None) -> dict[int, float]:
    """What is added to logits, of token ids, as llama.cpp's option has it: "15043+1".

    Raises:
        UsageError: one is written otherwise.
    """
    found = {}
    for each in given or ():
        parts = re.fullmatch(r"(\d{1,9})([+-]\d+(?:\.\d+)?)", each, re.ASCII)
        if parts is None:
            raise UsageError(f"--logit-bias {each} is no token id with a bias such as 15043+1.5")
        found[int(parts[1])] = float(parts[2])
    return found


def _read_prompt(file: Path | None) -> str:
    """A file, or standard input, without a newline at its end, as llama.cpp reads a prompt's file.

    Raises:
        FallowError: it cannot be read, is empty, or is not UTF-8.
    """
    where = "standard input" if file is None else str(file)
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FallowError(
            f"{where} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise FallowError(f"cannot read {where}: {error.strerror}; check --file") from error
    if not text.removesuffix("\n"):
        raise FallowError(f"{where} holds no prompt; give some text")
    return text.removesuffix("\n")


def _prompt_ids(
    engine: Any, text: str, system: str | None, chat: bool, parse_special: bool = True
) -> Any:
    """Token ids (T,) of a text to continue, or with `chat` to answer.

    Raises:
        FallowError: a template is asked for that the model has not, or that refuses the messages.
    """
    if system is None:
        return engine.tokenizer.prompt(text, chat, parse_special)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return engine.tokenizer.chat(messages)


def _print_stream(
    engine: Any, prompt: str, pieces: Any, as_json: bool = False, show_figures: bool = True
) -> None:
    """The answer as it comes, and its figures; of one that Ctrl-C ends, those of what came."""
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # the figures are made
        _print_end(engine.stats, prompt, "".join(said), as_json, show_figures)
        raise
    except FallowError:
        if said and not as_json:
            print(flush=True)
        raise
    _print_end(engine.stats, prompt, "".join(said), as_json, show_figures)


def _print_end(stats: Any, prompt: str, text: str, as_json: bool, show_figures: bool) -> None:
    if as_json:
        print_json({"prompt": prompt, "text": text, "stats": stats.to_json()})
        return
    from fallow.common.progress import console
    from fallow.serving.chat import figures

    print(flush=True)
    if show_figures:
        console.print(figures(stats), highlight=False)
