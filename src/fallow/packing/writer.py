"""The packed file, as docs/packed.md describes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fallow.common.progress import progress
from fallow.engine.packed import PACKED_VERSION
from fallow.packing.ffn_file import add_to_packed
from fallow.packing.quantize import Matrix, add_matrix
from fallow.packing.source import Source
from fallow.plan import Plan


def write_packed(
    path: Path,
    source: Source,
    matrices: dict[str, Matrix],
    down: str,
    plan: Plan | None,
) -> None:
    import gguf

    model, tokenizer = source.model, source.model.tokenizer
    writer = gguf.GGUFWriter(path, "fallow")
    writer.add_custom_alignment(4096)
    writer.add_uint32("fallow.version", PACKED_VERSION)
    writer.add_string("fallow.model", Path(model.name).name)
    writer.add_string("fallow.model_type", model.architecture.model_type)
    writer.add_string("fallow.fingerprint", model.fingerprint)
    for key, value in source.metadata().items():
        _add(writer, f"fallow.{key}", value)
    writer.add_string("tokenizer.huggingface.json", tokenizer.backend.to_str())
    writer.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
    if tokenizer.bos_id is not None:
        writer.add_uint32("tokenizer.ggml.bos_token_id", tokenizer.bos_id)
    if tokenizer.eos_ids:
        _add(writer, "fallow.eos_token_ids", list(tokenizer.eos_ids))
    writer.add_string("fallow.special_tokens", json.dumps(dict(tokenizer.special_tokens)))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    if plan is not None:
        writer.add_tensor("plan", np.frombuffer(plan.to_bytes(), dtype=np.int8))
    with progress(f"pack, down_proj_t {down}", len(model.layers)) as ticker:
        for name, values in source.vectors():
            writer.add_tensor(name, values)
        inputs = ("gate_proj", "up_proj") if model.layers[0].gated else ("up_proj",)
        for name, matrix in matrices.items():
            if not name.endswith(tuple(f".{part}.weight" for part in inputs)):
                add_matrix(writer, name, matrix)
        outliers: list[int] = []
        for i in range(len(model.layers)):
            for ffn, matrix, neurons, rows in source.down_proj_ts(i, down):
                for part in inputs:
                    name = f"{ffn}.{part}.weight"
                    add_matrix(writer, name, matrices[name])
                add_matrix(writer, f"{ffn}.down_proj_t.weight", matrix)
                if rows is not None:
                    add_matrix(writer, f"{ffn}.outliers.weight", rows)
                outliers += neurons.tolist()
            ticker.advance()
        writer.add_uint32("fallow.n_outliers", source.n_outliers(down))
        if outliers:
            _add(writer, "fallow.outliers", outliers)
        add_to_packed(writer, source, matrices, plan)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        from gguf import GGUFValueType

        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    else:
        writer.add_string(key, value)
