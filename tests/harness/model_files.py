"""Targets of damage: packed models, sources, weights, folders and plans."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.seeds import IDS, TEMPLATE, Seeds, Target


def packed(seeds: Seeds) -> Target:
    """Packed models, mapped: a pass, the tokenizer, a short answer."""
    from fallow.engine.engine import Engine
    from fallow.engine.packed import is_packed

    found = _packed_seeds(seeds)

    def use(folder: Path) -> None:
        path = folder / "packed.gguf"
        is_packed(path)
        engine = Engine(path, threads=1)
        engine.forward(IDS, every=True)
        _answer(engine)

    return Target(found, use, names=_OF_AN_ANSWER)


# Refusals of an answer, for which there is one model and one plan.
_OF_AN_ANSWER = ("the model", "the context", "token id", "this plan", "there are no tokens")


def _packed_seeds(seeds: Seeds) -> list[Path]:
    from conftest import TALK

    def talking(folder: Path) -> None:
        shutil.copytree(seeds.model(), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(TALK)

    talks = seeds.made("models/talking", talking)
    wide = seeds.model("llama", hidden_size=64)
    return [
        seeds.packed("talking", talks, quant="f32", plan=seeds.plan("cats")),
        seeds.packed("opt", seeds.model("opt"), quant="bf16"),
        seeds.packed("shortlist", wide, quant="q4_0", shortlist=True),
        seeds.packed("gemma4", seeds.model("gemma4"), quant="f32"),  # per-layer inputs, shared k, v
    ]


def _answer(engine: Any) -> None:
    tokenizer = engine.tokenizer
    ids = tokenizer.prompt("a", chat=tokenizer.chat_template is not None)
    tokenizer.decode(ids)
    "".join(piece for piece in engine.generate(ids[-3:], 2))
    _ = engine.dtype_name


def budget(seeds: Seeds) -> Target:
    """Packed models of which a part is read from the disk for every pass."""
    from fallow.checkpoints.weights import read_gguf
    from fallow.engine import engine as module
    from fallow.engine.memory import RESERVE, parts_of, residencies

    module.rss_bytes = lambda: 0  # this process is far larger than these models
    found = _packed_seeds(seeds)
    all_parts = [parts_of(read_gguf(folder / "packed.gguf"), True) for folder in found]
    rooms = [RESERVE + residencies(parts)[-3].memory for parts in all_parts]

    def use(folder: Path) -> None:
        room = rooms[[f.name for f in found].index(folder.name)]
        engine = module.Engine(folder / "packed.gguf", threads=1, memory=room)
        engine.forward(IDS, every=True)
        _answer(engine)

    return Target(found, use, names=(*_OF_AN_ANSWER, "--memory"))


def source(seeds: Seeds) -> Target:
    """GGUF files of other programs: header, tokenizer, values."""
    from fallow.checkpoints.tokenizer import tokenizer_from_gguf
    from fallow.checkpoints.weights import fingerprint, read_gguf

    def use(folder: Path) -> None:
        file = read_gguf(folder / "m.gguf")
        for tensor in file.tensors.values():
            tensor.dequantize()
        fingerprint(file.tensors)
        tokenizer = tokenizer_from_gguf(file)
        tokenizer.decode(tokenizer.prompt("neuron 5", chat=tokenizer.chat_template is not None))

    return Target(_sources(seeds), use, names=("tensor ", "the model's chat template"))


def _sources(seeds: Seeds) -> list[Path]:
    import gguf

    from test_models import write_gguf

    def quantised(folder: Path) -> None:
        name = "blk.0.ffn_down.weight"
        values = np.zeros((24, 37), dtype=np.float16)
        write_gguf("llama", seeds.loaded(), folder / "m.gguf", **{name: values})

    def sentencepiece(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
        writer.add_tokenizer_model("llama")
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "n", "▁n"]
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1])
        writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        for kind in ("Q4_0", "Q6_K", "IQ4_NL"):
            quantization = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[quantization]
            data = np.arange(2 * size * 256 // block, dtype=np.uint8).reshape(2, -1)
            writer.add_tensor(f"{kind}.weight", data, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def plain(folder: Path) -> None:
        write_gguf("llama", seeds.loaded(), folder / "m.gguf")

    return [
        seeds.made("sources/llama", plain),
        seeds.made("sources/f16", quantised),
        seeds.made("sources/sentencepiece", sentencepiece),
    ]


def loaded_source(seeds: Seeds) -> Target:
    """GGUF files as models: config, weights, a pass."""
    import fallow
    from test_models import write_gguf

    def make(name: str) -> Callable[[Path], Any]:
        return lambda folder: write_gguf(name, seeds.loaded(name), folder / "m.gguf")

    def use(folder: Path) -> None:
        _pass(fallow.load(folder / "m.gguf"))

    names = ("llama", "phi3", "gemma3", "qwen3")
    return Target([seeds.made(f"gguf/{name}", make(name)) for name in names], use)


def _pass(model: Any) -> None:
    model.logits(model.hidden(IDS[None]))
    tokenizer = model.tokenizer
    tokenizer.decode(tokenizer.prompt("neuron 5", chat=tokenizer.chat_template is not None))


def weights(seeds: Seeds) -> Target:
    """safetensors of a folder: header, index, values."""
    from fallow.checkpoints.weights import fingerprint, read_safetensors

    def shards(folder: Path) -> None:
        seeds.loaded().module.save_pretrained(folder, max_shard_size="40KB")

    def single(folder: Path) -> None:
        shutil.copy(seeds.model() / "model.safetensors", folder)

    def use(folder: Path) -> None:
        found = {tensor.name: tensor for tensor in read_safetensors(folder)}
        fingerprint(found)

    whole, parts = seeds.made("weights/whole", single), seeds.made("weights/shards", shards)
    return Target([whole, parts], use, files=("*.safetensors", "*.index.json"))


def folder(seeds: Seeds) -> Target:
    """Hugging Face folders as models: config, tokenizer, weights, a pass."""
    import fallow

    def talking(made: Path) -> None:
        shutil.copytree(seeds.model(), made, dirs_exist_ok=True)
        (made / "chat_template.jinja").write_text(TEMPLATE)
        (made / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')

    def use(folder: Path) -> None:
        _pass(fallow.load(folder))

    found = [seeds.made("models/folder", talking), seeds.model("phi3")]
    return Target(found, use, names=("the model's chat template",))


def plan(seeds: Seeds) -> Target:
    """Plans of all rules, in the engine and in the reference."""
    from conftest import NEURON_RULES, engine_plan
    from fallow.plan import Cut, Plan

    engine, model = seeds.engine(), seeds.loaded()

    def coarse() -> Plan:
        return engine_plan(
            engine,
            Cut("gate_act", "threshold", 0.1, np.ones((2, 37))),
            Cut("inter", "threshold", 0.2, "column_norm"),
            head_margin=1.0,
            head_limit=8,
        )

    def make(name: str) -> Callable[[Path], Any]:
        made = coarse if name == "coarse" else lambda: seeds.plan(name)
        return lambda folder: made().save(folder / "a.plan")

    def use(folder: Path) -> None:
        plan = Plan.load(folder / "a.plan")
        plan.to_bytes()
        try:
            _reference(model, plan)
        finally:
            _engine(engine, plan)

    found = [seeds.made(f"plans/{name}", make(name)) for name in (*NEURON_RULES, "coarse")]
    names = ("this plan", "the plan", "logits")
    return Target(found, use, names=names)


def _reference(model: Any, plan: Any) -> None:
    with model.sparse(plan):
        model.logits(model.hidden(IDS[None]))


def _engine(engine: Any, plan: Any) -> None:
    engine.use_plan(plan)
    engine.logits(IDS)
    engine.forward(IDS[:1])
