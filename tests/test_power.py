"""Sudden loss of power; `benchmarks/reliability.py power` does the same with every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.killing import Server
from harness.power import STRACE, Call, Disk, PowerLoss, is_possible, read_trace


@pytest.fixture
def traced() -> None:
    if not is_possible():
        pytest.skip("strace is missing, or may not trace")


@pytest.mark.usefixtures("traced")
def test_whatever_the_disk_kept_is_whole(server: Server, tmp_path: Path) -> None:
    tally = PowerLoss("plan import", tmp_path, server).run_states(again=2)
    assert tally.defects == []
    assert tally.calls >= 4  # creation, writing, renaming and two syncs
    assert (tally.syncs, tally.again) == (2, 2)
    assert tally.states >= 4


CARELESS = """
import os, pathlib
import numpy as np
folder = pathlib.Path({folder!r})
with open(folder / "log", "ab", buffering=0) as file:
    file.write(b"one\\n")
    os.fsync(file.fileno())
    file.write(b"two\\n")
os.fsync(os.open(folder, os.O_RDONLY))
np.save(folder / ".part.npy", np.arange(3))  # by C, through a descriptor of its own
os.replace(folder / ".part.npy", folder / "whole.npy")
(folder / "inner").mkdir()
os.truncate(folder / "log", 2)
"""


@pytest.mark.usefixtures("traced")
def test_what_is_not_synced_is_lost(tmp_path: Path) -> None:
    folder, trace = tmp_path / "out", tmp_path / "trace"
    folder.mkdir()
    script = CARELESS.format(folder=str(folder))
    command = [*STRACE, "-o", str(trace), sys.executable, "-c", script]
    subprocess.run(command, check=True, timeout=120)
    disk = Disk(folder)
    before_cut: dict[str, bytes | None] = {}
    for call in read_trace(trace):
        if call.name == "truncate":
            before_cut = disk.contents("all")
        disk.apply(call)
    saved = (folder / "whole.npy").read_bytes()
    assert before_cut["log"] == b"one\ntwo\n"
    assert disk.contents("all") == {"log": b"on", "whole.npy": saved, "inner": None}
    assert disk.contents("synced data") == {"log": b"one\n", "whole.npy": b"", "inner": None}
    assert disk.contents("blank")["whole.npy"] == bytes(len(saved))
    assert disk.contents("synced names") == {"log": b"one\n"}


def test_threads_that_interrupt_each_other(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(
        '7 write(3<\\x2f\\x61>, "\\x61", 1 <unfinished ...>\n'
        "8 close(4<\\x2f\\x62>) = 0\n"
        "7 <... write resumed>) = 1\n"
        '8 unlink("\\x2f\\x63") = -1 ENOENT (No such file or directory)\n'
    )
    assert list(read_trace(tmp_path / "trace")) == [
        Call("close", ["4<\\x2f\\x62>"], 0),
        Call("write", ["3<\\x2f\\x61>", '"\\x61"', "1"], 1),
    ]
