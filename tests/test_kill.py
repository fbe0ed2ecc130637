"""A few kills of a few commands; `benchmarks/reliability.py kill` does hundreds of all of them."""

import zipfile
from pathlib import Path

import pytest

from fallow.common.errors import FallowError
from harness.killing import Killer, Server, check_whole, files_of

KILLS = 3


def test_killed_commands_leave_nothing_half_written(server: Server, tmp_path: Path) -> None:
    continued = 0
    for name in ("tradeoff", "patterns collect", "plan import"):
        tally = Killer(name, tmp_path, server, seed=1).run(KILLS)
        assert (tally.kills, tally.defects) == (KILLS, [])
        continued += tally.continued
    assert continued > 0


def test_no_half_written_file_is_overlooked(server: Server, tmp_path: Path) -> None:
    """Every kind of file that is cut in the middle is told from a whole one."""
    refusals = (FallowError, ValueError, OSError, SyntaxError, zipfile.BadZipFile)
    kinds = set()
    for name in ("profile", "tradeoff", "pack"):
        for path in files_of(Killer(name, tmp_path, server).measure().folder).values():
            if path.suffix not in (".jsonl", ".csv"):
                check_whole(path)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                with pytest.raises(refusals):
                    check_whole(path)
                kinds.add(path.suffix)
    assert kinds == {".json", ".npz", ".plan", ".png", ".svg", ".gguf"}
