"""Files that are written whole or not at all, and what is read back of damaged and odd ones."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fallow
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError
from fallow.common.files import (
    JsonLines,
    atomic_folder,
    atomic_path,
    check_writable,
    fits,
    parse_json,
    read_array,
    read_json,
    to_json,
    write_json,
)
from fallow.engine.engine import Engine
from fallow.engine.packed import is_packed
from fallow.packing.packer import pack
from fallow.reference import model as reference
from test_models import IDS, message, write_gguf


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with suppress(KeyError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise KeyError
    with suppress(KeyError), atomic_folder(tmp_path / "folder") as made:
        (made / "b.txt").write_text("new")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_folders_come_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "folder") as made:
        (made / "b.txt").write_text("new")
        assert made.name.startswith(".folder.")
    assert (tmp_path / "deep" / "folder" / "b.txt").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["folder"]
    with (
        pytest.raises(FallowError, match="is there already; choose another name"),
        atomic_folder(tmp_path / "deep" / "folder"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("8 requested and 4 written"), "the disk is full, or fails"),
        (RuntimeError("[enforce fail at inline_container.cc:672] ."), "the disk is full, or fails"),
    ],
)
def test_writers_that_fail(error: Exception, reason: str, tmp_path: Path) -> None:
    with (
        pytest.raises(FallowError, match=f"cannot write .*a.bin: {reason}; choose a folder"),
        atomic_path(tmp_path / "a.bin"),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), atomic_path(tmp_path / "a.bin"):
        raise RuntimeError("another")


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(FallowError, match="it is there and no file; choose another name"):
            check_writable(path)
        with pytest.raises(FallowError, match="it is there and no file"), atomic_path(path):
            pass
    with pytest.raises(FallowError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))
    with atomic_path(tmp_path / ("ö" * 120)) as temporary:  # whose temporary name is short enough
        temporary.write_text("a")


def test_lines_that_were_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    JsonLines(path).add(11, 12)
    path.write_bytes(path.read_bytes()[:-2])  # "1" is no line, though it is JSON
    lines = JsonLines(path)
    assert lines.found == [11]
    assert path.read_bytes() == b"11\n1"  # reading does not write
    lines.add(13)
    lines.add(14)
    assert path.read_bytes() == b"11\n13\n14\n"
    path.write_bytes(b"11\n\0\0\0\n{\n" + b"[" * 100_000 + b"\n\xff\xfe\n12\n")
    assert JsonLines(path).found == [11, 12]
    with pytest.raises(FallowError, match="cannot read"):
        JsonLines(tmp_path)


def test_lines_that_a_full_disk_cut(tmp_path: Path) -> None:
    """What came of them is taken away before the next, whoever writes it."""
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path)
    lines.add("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(FallowError, match=r"cannot write .*a.jsonl: File too large"):
            lines.add("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b'"first"\n"seco'
    lines.add("third")
    assert path.read_bytes() == b'"first"\n"third"\n'


def test_a_file_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def synced(handle: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{old.name} is {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    name = temporary.name
    assert done == [f"sync {name}", f"{name} is a.txt", f"sync {tmp_path.name}"]
    done.clear()
    with atomic_folder(tmp_path / "folder") as made:
        (made / "b.txt").write_text("new")
    assert done == [
        "sync b.txt",
        f"sync {made.name}",
        f"{made.name} is folder",
        f"sync {tmp_path.name}",
    ]


AT_WORK = """
import time
from pathlib import Path
from fallow import cli
from fallow.common.files import atomic_path

@cli.app.command()
def work(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        print("at work", flush=True)
        time.sleep(60)

cli.main()
"""


def test_nothing_is_left_of_work_that_is_terminated(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_WORK, "work", str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"at work\n"
        assert len(list(tmp_path.iterdir())) == 1
        child.terminate()
        assert child.wait(30) == 143
    assert list(tmp_path.iterdir()) == []


def test_damaged_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(FallowError, match=r"a\.json is damaged; delete it"):
            read_json(path, "delete it")
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, "") == {"a": 1}
    with pytest.raises(FallowError, match="cannot read"):
        read_json(tmp_path / "none", "")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_numbers_without_a_word_in_json(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": -float("inf")}), "d": None}
    expected = '{"a": [1.5, null], "b": [null, {"c": null}], "d": null}'
    assert to_json(value) == expected
    write_json(tmp_path / "x.json", value)
    JsonLines(tmp_path / "x.jsonl").add(value)
    for path in ("x.json", "x.jsonl"):
        assert json.loads((tmp_path / path).read_text()) == json.loads(expected)


def test_json_with_a_key_twice(tmp_path: Path) -> None:
    """RFC 8259, 4: names should be unique; of two that are the same readers take either."""
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(FallowError, match=r"a\.json is damaged: 'b' appears twice; delete it"):
        read_json(path, "delete it")


# GGUF in parts -----------------------------------------------------------------------------------


def parts_of(model: fallow.Model, folder: Path) -> list[Path]:
    """A GGUF in three parts, as the gguf package and llama.cpp's tools split and name them."""
    write_gguf("llama", model, folder / "m.gguf", part=8)
    parts = sorted(folder.glob("m-*.gguf"))
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


def test_gguf_in_parts(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    whole = fallow.load(write_gguf("llama", tiny["llama"], tmp_path / "whole.gguf"))
    first, *_ = parts_of(tiny["llama"], tmp_path)
    model = fallow.load(first)
    assert model.fingerprint == whole.fingerprint
    assert torch.equal(model.hidden(IDS), whole.hidden(IDS))
    pack(first, tmp_path / "packed.gguf")
    pack(tmp_path / "whole.gguf", tmp_path / "other.gguf")
    found, expected = (read_gguf(tmp_path / name) for name in ("packed.gguf", "other.gguf"))
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].data, tensor.data)


def test_parts_that_are_not_all_there(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    first, second, third = parts_of(tiny["llama"], tmp_path)
    assert message(second) == f"GGUF M is part 2 of 3; give part 1, {first.name}"
    kept = third.read_bytes()
    third.unlink()
    assert message(first) == f"GGUF M is part 1 of 3; part 3, {third}, is missing; add it"
    shutil.copy(second, third)
    assert message(first, third) == "GGUF M is not part 3 of 3; download it again"
    third.write_bytes(kept)
    renamed = first.rename(tmp_path / "model.gguf")
    assert message(renamed) == (
        "GGUF M is part 1 of 3, but its name does not end in -00001-of-00003.gguf, by which the "
        "others are found; rename it"
    )


def test_parts_that_do_not_fit(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    first, _, third = parts_of(tiny["llama"], tmp_path)
    kept = third.read_bytes()
    name = next(t.name for t in gguf.GGUFReader(third).tensors if t.name.startswith("blk.1"))
    again = name.replace("blk.1", "blk.0")
    third.write_bytes(kept.replace(name.encode(), again.encode()))
    assert message(first, third) == f"GGUF M has the tensor {again}, as a part before it does"
    third.write_bytes(kept)
    data, key = first.read_bytes(), b"split.tensors.count"
    at = data.index(key) + len(key) + 4
    count = int.from_bytes(data[at : at + 4], "little")
    first.write_bytes(data[:at] + (count + 1).to_bytes(4, "little") + data[at + 4 :])
    assert message(first) == (
        f"GGUF M is part 1 of 3, which have {count} tensors, expected {count + 1}; "
        "download them again"
    )


def test_packed_model_in_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    """What llama-gguf-split makes of one: the engine maps one file."""
    pack(folders["llama"], tmp_path / "packed.gguf", quant="f32")
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "fallow", split_max_tensors=20)
    writer.add_uint32("fallow.version", 2)
    for name, tensor in read_gguf(tmp_path / "packed.gguf").tensors.items():
        writer.add_tensor(name, tensor.data.view(np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(tmp_path.glob("p-*.gguf"))
    with pytest.raises(FallowError, match=r"is part 1 of \d of a packed model; pack it again"):
        is_packed(first)


def test_a_version_that_is_no_number(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "fallow")
    writer.add_array("fallow.version", [5] * 100)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FallowError, match=r"was packed in format \[5 5 .*pack it again") as caught:
        Engine(tmp_path / "p.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_changes_while_it_is_loaded(
    cut: bool, tiny: dict[str, fallow.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a page that is gone would end the process with SIGBUS; what is left is told."""
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")

    def load(module: Any, *rest: Any) -> None:
        if cut:
            os.truncate(path, 4096)
        else:
            os.utime(path)
        fill(module, *rest)

    fill = reference._fill
    monkeypatch.setattr(reference, "_fill", load)
    with pytest.raises(FallowError, match=r"m\.gguf was written to while it was running"):
        fallow.load(path)


# safetensors -------------------------------------------------------------------------------------


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors", metadata={"format": "pt"})


def test_stale_index_beside_a_whole_file(
    copy: Path, tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    """transformers takes model.safetensors; a re-saved folder keeps the index of before."""
    (copy / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    )
    model = fallow.load(copy)
    assert torch.equal(model.hidden(IDS), tiny["llama"].hidden(IDS))
    assert model.fingerprint == tiny["llama"].fingerprint


def test_tensors_that_nobody_uses(copy: Path, tiny: dict[str, fallow.Model]) -> None:
    """Buffers that older versions of transformers saved, of any type of the format."""
    kinds = (
        *(torch.bool, torch.int8, torch.int16, torch.int64, torch.uint8, torch.uint16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex64),
    )
    unused = {f"model.layers.0.self_attn.{i}": torch.ones(3, dtype=k) for i, k in enumerate(kinds)}
    unused["model.layers.0.self_attn.bias"] = torch.ones(3, 3, dtype=torch.bool)
    unused["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    unused["vision_tower.weight"] = torch.ones(3)
    change_tensors(copy, **unused)
    assert torch.equal(fallow.load(copy).hidden(IDS), tiny["llama"].hidden(IDS))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("I8", torch.int8), ("I64", torch.int64), ("F8_E4M3", torch.float8_e4m3fn)]
)
def test_weights_that_are_no_floats(kind: str, dtype: torch.dtype, copy: Path) -> None:
    """transformers makes floats of the codes of a quantised matrix, without its scales."""
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy, **{name: load_file(copy / "model.safetensors")[name].to(dtype)})
    assert message(copy) == (
        f"M: tensor {name} has the type {kind}; give a folder with weights in F32, F16 or BF16"
    )


@pytest.mark.parametrize(
    "name", ["0.self_attn.q_proj.bias", "0.self_attn.q_norm.weight", "2.x.weight"]
)
def test_weights_that_the_model_has_no_place_for(name: str, copy: Path) -> None:
    """transformers would run without them: biases, norms, layers beyond num_hidden_layers."""
    change_tensors(copy, **{f"model.layers.{name}": torch.ones(24)})
    assert message(copy) == (
        f"M has a tensor model.layers.{name} that llama models of its config.json do not have"
    )


def test_header_with_a_tensor_twice(copy: Path) -> None:
    """The format forbids it: https://github.com/huggingface/safetensors#format."""
    path = copy / "model.safetensors"
    data = path.read_bytes()
    one, other = b"layers.0.mlp.up_proj.weight", b"layers.1.mlp.up_proj.weight"
    assert data.count(one) == 1
    path.write_bytes(data.replace(one, other))
    assert message(copy) == (
        "the header of safetensors file M/model.safetensors: 'model.layers.1.mlp.up_proj.weight' "
        "appears twice; download it again"
    )


def test_config_with_a_key_twice(copy: Path) -> None:
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", '{"rms_norm_eps": 1e-5,', 1))
    assert (
        message(copy) == "M/config.json is damaged: 'rms_norm_eps' appears twice; download it again"
    )


def test_folder_with_an_adapter(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert message(copy) == "M has an adapter; give its model, and the adapter to pack --lora"


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    np.testing.assert_array_equal(read_array(path, ""), np.arange(5))
    data = path.read_bytes()
    for damaged in (b"", data[:20], data[:-1], data.replace(b"(5,)", b"(5, "), b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(FallowError, match=r"cannot read .*a\.npy; make it again"):
            read_array(path, "make it again")
    np.save(path, np.array(["a"]))
    with pytest.raises(FallowError, match="holds no array of numbers"):
        read_array(path, "")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, bool, True),
        (None, float | None, True),
        (None, float, False),
        (float("nan"), float, False),
        (float("-inf"), float | None, False),
        (10**400, int, False),
        ("1", float, False),
        ("a", str, True),
        ([], list, True),
        ({}, dict[str, int], True),
    ],
)
def test_fits(value: Any, kind: Any, expected: bool) -> None:
    assert fits(value, kind) == expected
