"""Models that are run by name: packed copies, and where prompts come from."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import fallow
from conftest import TALK, Result, make_folder
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.engine.packed import PACKED_VERSION
from fallow.packing import cache
from fallow.packing.packer import pack
from fallow.packing.quantize import FILE_TYPES, quant_type
from test_models import write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of Q8_0."""
    sizes: dict[str, object] = {"hidden_size": 64, "intermediate_size": 96}
    found = make_folder("llama", tmp_path_factory.mktemp("source") / "tiny", **sizes)
    (found / "chat_template.jinja").write_text(TALK)
    return found


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    monkeypatch.setenv("FALLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes copies in this process, which is faster; which models were packed."""
    found: list[str] = []

    def pack_here(model: str, path: Path, quant: str | None) -> None:
        found.append(model)
        pack(model, path, quant=quant)

    monkeypatch.setattr(cache, "_pack", pack_here)
    return found


def test_a_model_is_packed_once(run: Any, folder: Path, kept: Path, monkeypatch: Any) -> None:
    command = ("run", folder, "-p", "hi", "-n", 6, "--temp", 0)
    first = run(*command)
    (path,) = kept.iterdir()
    assert f"note: packing {folder} once into {path}\n" in first.err
    assert first.out == "".join(Engine(path).generate("hi", 6, chat=True)) + "\n"
    assert read_gguf(path).tensors["layers.0.gate_proj.weight"].type == "Q8_0"
    monkeypatch.setattr(cache, "_pack", lambda *_: pytest.fail("packed twice"))
    os.utime(path, (0, 0))
    assert run(*command) == Result(0, first.out, "")
    assert path.stat().st_mtime > 0
    continued = "".join(Engine(path).generate("hi", 6)) + "\n"
    assert run("generate", folder, "hi", "-n", 6).out == continued
    timed = run("bench", folder, "-p", 4, "-n", 2, "--runs", 1, "--threads", 1, "--json")
    assert timed.json["file_mb"] == pytest.approx(path.stat().st_size / 1e6, rel=0.01)


@pytest.mark.parametrize("damage", ["cut", "emptied", "older"])
def test_a_damaged_copy_is_made_anew(
    damage: str, folder: Path, packed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.packed_copy(str(folder))
    whole = path.read_bytes()
    if damage == "older":
        monkeypatch.setattr(cache, "PACKED_VERSION", cache.PACKED_VERSION + 1)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert cache.packed_copy(str(folder)) == path
    assert packed == [str(folder)] * 2
    assert read_gguf(path).metadata["fallow.version"] == PACKED_VERSION


def test_what_is_not_packed_leaves_nothing(
    folders: dict[str, Path], kept: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cache.packed_copy(str(folders["llama"]))
    assert stop.value.code == 1
    assert "are not whole blocks of 32 of Q8_0" in capfd.readouterr().err
    assert list(kept.iterdir()) == []


def test_a_copy_is_of_all_that_it_depends_on(folder: Path, tmp_path: Path) -> None:
    """Weights, tokenizer and template; not the folder that they lie in."""
    copies = [tmp_path / f"{i}" / "tiny" for i in range(4)]
    for copy in copies:
        shutil.copytree(folder, copy)
    (copies[1] / "chat_template.jinja").write_text(TALK + "!")
    weights = bytearray((copies[2] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copies[2] / "model.safetensors").write_bytes(weights)
    (copies[3] / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    same, *others = (cache._entry_name(str(copy), copy, None) for copy in copies)
    assert same == cache._entry_name(str(folder), folder, None)
    names = {same, *others, cache._entry_name(str(folder), folder, "q4_0")}
    assert len(names) == 5
    assert all(name.startswith("tiny-") for name in names)


def test_a_packed_model_is_run_as_it_is(talking: Path, kept: Path) -> None:
    assert cache.packed_copy(str(talking)) == talking
    assert not kept.exists()
    with pytest.raises(FallowError, match="--quant is for models that are not packed"):
        cache.packed_copy(str(talking), "q8_0")


def test_another_engine_is_timed_on_the_models_own_gguf(
    run: Any, folder: Path, packed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_gguf("llama", fallow.load(folder), tmp_path / "own.gguf")
    asked: list[Any] = []

    def time(file: Path, _plan: Any, **options: Any) -> dict[str, Any]:
        asked.extend((cache._is_whole(file), options["source"]))
        return {}

    monkeypatch.setattr("fallow.measure.speed.bench", time)
    for model, source in ((own, own), (folder, None), (cache.packed_copy(str(own)), None)):
        asked.clear()
        assert run("bench", model, "--against", "llama.cpp", "--json").code == 0
        assert asked == [True, source]


def test_cache_list_and_clear(run: Any, folder: Path, packed: list[str], kept: Path) -> None:
    assert run("cache", "list") == Result(0, "", "")
    path = cache.packed_copy(str(folder))
    other = kept / "other.gguf"
    other.write_bytes(b"x" * 3_000_000)
    os.utime(other, (0, 0))
    (kept / ".left-behind.gguf").touch()
    os.utime(kept / ".left-behind.gguf", (0, 0))
    (kept / ".being-written.gguf").touch()
    first, second = run("cache", "list").out.splitlines()
    assert first.startswith(path.stem)
    assert second.split()[:3] == ["other", "3", "MB"]
    assert [e["name"] for e in run("cache", "list", "--json").json] == [path.stem, "other"]
    assert run("cache", "clear", "nothing").err == (
        "error: the cache has no nothing; see: fallow cache list\n"
    )
    assert run("cache", "clear", "tiny").out == "deleted: 1 files, 0 MB\n"
    assert not path.exists()
    assert run("cache", "clear").code == 0
    assert [p.name for p in kept.iterdir()] == [".being-written.gguf"]


def test_file_types_of_llama_cpp(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in FILE_TYPES.items():
        assert f"MOSTLY_{name}" in gguf.LlamaFileType.__members__
        assert kind in gguf.GGMLQuantizationType.__members__
        assert quant_type(name.lower()) == kind
    with pytest.raises(FallowError, match="rows of 64 weights are not whole blocks of 256 of Q5_K"):
        pack(folder, tmp_path / "m.gguf", quant="q5_k_m")
    assert "note: q5_k_m, a mix in llama.cpp, is Q5_K here" in capsys.readouterr().err
    pack(folder, tmp_path / "m.gguf", quant="Q4_1")
    assert read_gguf(tmp_path / "m.gguf").tensors["layers.0.gate_proj.weight"].type == "Q4_1"
    with pytest.raises(UsageError) as refused:
        pack(folder, tmp_path / "m.gguf", quant="iq2_m")
    assert str(refused.value) == (
        "unknown type 'iq2_m'; known: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, bf16, f16, "
        "f32, q4_k_s, q4_k_m, q5_k_s, q5_k_m"
    )


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "generate"])
def test_where_prompts_come_from(
    command: str, run: Any, talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("neuron 3\n")
    short = ("-n", 6, "--temp", 0, "-t", 1, "-c", 64)
    chat = command == "run"
    expected = "".join(Engine(talking).generate("neuron 3", 6, chat=chat)) + "\n"
    for words in (
        (talking, "neuron 3"),
        (talking, "-p", "neuron 3"),
        (talking, "-f", tmp_path / "prompt.txt"),
        (talking, "-f", "-"),
        (talking, "-p", "-"),
        (talking,),
        ("-m", talking, "neuron 3"),
        ("-m", talking, "-p", "neuron 3"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("neuron 3\n"))
        assert run(command, *words, *short).out == expected, words
    for words, message in (
        (("-p", "a"), "give a model: "),
        ((talking, "a", "-p", "b"), "give one model and one prompt"),
        ((talking, "-f", tmp_path / "prompt.txt", "-p", "b"), "give one model and one prompt"),
        ((talking, "-f", tmp_path / "none"), "/none: No such file or directory; check --file"),
    ):
        assert message in run(command, *words).err, words


def test_a_system_message(run: Any, talking: Path) -> None:
    engine = Engine(talking)
    messages = [{"role": "system", "content": "rest"}, {"role": "user", "content": "hi"}]
    expected = "".join(engine.generate(engine.tokenizer.chat(messages), 6)) + "\n"
    command = (talking, "-p", "hi", "--system", "rest", "-n", 6, "--temp", 0)
    assert run("run", *command).out == expected
    assert run("generate", *command, "--chat").out == expected
    assert "--system goes with --chat" in run("generate", *command).err


def test_a_model_without_a_template_continues(
    run: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plain.gguf"
    pack(folders["llama"], path, quant="f32")
    expected = "".join(Engine(path).generate("neuron 3", 6)) + "\n"
    assert run("run", path, "-p", "neuron 3", "-n", 6, "--temp", 0).out == expected
    typed = io.StringIO("hi\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    assert "has no chat template: it continues text; give it some" in run("run", path).err
    assert "there is no prompt; give one" in run("generate", path).err


def test_the_end_of_input_ends_a_conversation(
    run: Any, talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.StringIO("hi\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    result = run("run", talking, "-n", 4, "--temp", 0)
    answer = "".join(Engine(talking).generate("hi", 4, chat=True))
    assert (result.code, result.out) == (0, f"> {answer}\n> \n")


def test_version_and_help(run: Any) -> None:
    assert run("--version") == Result(0, f"fallow {fallow.__version__}\n", "")
    assert fallow.__version__[0].isdigit()
    for words in ((), ("run",), ("plan", "show")):
        assert run(*words, "-h").out == run(*words, "--help").out
