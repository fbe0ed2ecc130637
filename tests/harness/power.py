"""Sudden loss of power: what a command told the kernel, cut off after every call, and read back.

strace records the calls of a command that change its output folder: C++, Rust and Python alike.
After each of them the machine could lose power; which four disks are then looked at, `DISKS` says.
One is a defect if a file that has its final name is not whole, or the same command, run again, does
not end with an undisturbed run's files.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fallow.common.files import JsonLines
from harness.killing import Killer, Server, Usual, files_of

DISKS = {
    "all": "everything that was written",
    "synced data": "all names, and of files what was there when they were synced last",
    "blank": "all names and sizes, and zeros where data was not synced",
    "synced names": "of folders the names that they had when they were synced last",
}
CALLS = (
    "openat,open,creat,close,dup,dup2,dup3,fcntl,lseek,write,writev,pwrite64,pwritev,pwritev2,fsync,"
    "fdatasync,sync_file_range,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,truncate,"
    "ftruncate,fallocate,link,linkat,symlink,symlinkat,mmap,copy_file_range,sendfile,splice"
)
STRACE = ("strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "1000000000", "-e", f"trace={CALLS}")


# What was recorded -------------------------------------------------------------------------------


@dataclass
class Call:
    """A system call that succeeded: its arguments, texts decoded."""

    name: str
    arguments: list[str]
    result: int


_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_HEX = re.compile(r"\\x([0-9a-f]{2})")


def read_trace(path: Path) -> Iterator[Call]:
    """The calls of a trace in their order; those of several threads may interrupt each other."""
    begun: dict[str, str] = {}
    for line in path.read_text().splitlines():
        process = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"^\d+ +<\.\.\. \w+ resumed>(.*)", line):
            line = begun.pop(process, "") + resumed[1]
        found = _LINE.match(line)
        if found and int(found[4]) >= 0:
            yield Call(found[2], _split(found[3]), int(found[4]))


def _split(text: str) -> list[str]:
    """Arguments; with -xx no text has a comma or bracket of its own."""
    return [part.strip() for part in re.split(r", (?![^\[{]*[\]}])", text)]


def _bytes(argument: str) -> bytes:
    return bytes.fromhex("".join(_HEX.findall(argument)))


def _path_of(argument: str) -> str:
    """Of a descriptor, as in 3<path>."""
    return os.fsdecode(_bytes(argument[argument.index("<") :])) if "<" in argument else ""


# Disks -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    blank: bytearray = field(default_factory=bytearray)  # `data`, zeros for what is not synced

    def write(self, at: int, data: bytes) -> None:
        for kept, new in ((self.data, data), (self.blank, bytes(len(data)))):
            kept.extend(bytes(max(0, at + len(data) - len(kept))))
            kept[at : at + len(data)] = new

    def truncate(self, size: int) -> None:
        for kept in (self.data, self.blank):
            kept.extend(bytes(max(0, size - len(kept))))
            del kept[size:]

    def sync(self) -> None:
        self.synced, self.blank = bytes(self.data), bytearray(self.data)


@dataclass(eq=False)
class Folder:
    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)

    def sync(self) -> None:
        self.synced = dict(self.names)


@dataclass(eq=False)
class Open:
    """A file that is open: descriptors that were duplicated share it."""

    file: File | Folder
    at: int = 0
    appends: bool = False


class Disk:
    """The folder `root` as calls change it."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = str(root), Folder()
        self.open: dict[int, Open] = {}

    def apply(self, call: Call) -> bool:
        """Whether the call changed the folder, or what of it is safe."""
        name, words = call.name, call.arguments
        if name in ("openat", "open", "creat"):
            return self._opened(call)
        if name in ("dup", "dup2", "dup3") or (name == "fcntl" and "F_DUPFD" in words[1]):
            if (found := self._descriptor(words[0])) is not None:
                self.open[call.result] = found
            return False
        if name == "close":
            self.open.pop(int(words[0].split("<")[0]), None)
            return False
        if name == "mmap":
            if (
                self._inside(_path_of(words[4]))
                and "MAP_SHARED" in words[3]
                and "PROT_WRITE" in words[2]
            ):
                raise NotImplementedError("writes to mapped files are not recorded")
            return False
        if name in (
            "rename",
            "renameat",
            "renameat2",
            "unlink",
            "unlinkat",
            "mkdir",
            "mkdirat",
            "rmdir",
        ):
            return self._named(
                name, [self._full(words, i) for i, w in enumerate(words) if w[:1] == '"']
            )
        if name == "truncate":
            path = os.fsdecode(_bytes(words[0]))
            if self._inside(path):
                self._at(path).truncate(int(words[1]))
            return self._inside(path)
        if name in ("link", "linkat", "symlink", "symlinkat"):
            if any(self._inside(os.fsdecode(_bytes(w))) for w in words if w[:1] == '"'):
                raise NotImplementedError("links are not recorded")
            return False
        return self._written(call)

    def _opened(self, call: Call) -> bool:
        words = call.arguments[1:] if call.name == "openat" else call.arguments
        path = self._full(call.arguments, len(call.arguments) - len(words))
        self.open.pop(call.result, None)
        if not self._inside(path):
            return False
        flags = words[1] if call.name != "creat" else "O_CREAT|O_TRUNC"
        folder, last = self._parent(path)
        is_new = last and last not in folder.names
        if is_new:
            folder.names[last] = File()
        found = folder.names[last] if last else folder
        self.open[call.result] = Open(found, appends="O_APPEND" in flags)
        if isinstance(found, File) and "O_TRUNC" in flags and found.data:
            found.truncate(0)
            return True
        return bool(is_new)

    def _written(self, call: Call) -> bool:
        name, words = call.name, call.arguments
        found = self._descriptor(words[0])
        if found is None:
            return False
        if name in ("fsync", "fdatasync"):
            found.file.sync()
            return True
        if name == "lseek":
            found.at = call.result
            return False
        if name == "fcntl":
            return False
        assert isinstance(found.file, File)
        if name == "ftruncate":
            found.file.truncate(int(words[1]))
        elif name == "write":
            at = len(found.file.data) if found.appends else found.at
            found.file.write(at, _bytes(words[1])[: call.result])
            found.at = at + call.result
        elif name == "writev":
            at = len(found.file.data) if found.appends else found.at
            parts = re.findall(r'iov_base="([^"]*)"', ", ".join(words[1:]))
            found.file.write(at, b"".join(map(_bytes, parts))[: call.result])
            found.at = at + call.result
        elif name == "sendfile":  # as shutil copies, from a file outside
            begin = int(words[2].split("]")[0].strip("["))
            data = Path(_path_of(words[1])).read_bytes()[begin : begin + call.result]
            found.file.write(found.at, data)
            found.at += call.result
        elif name == "pwrite64":
            found.file.write(int(words[3]), _bytes(words[1])[: call.result])
        else:
            raise NotImplementedError(f"{name} is not recorded")
        return True

    def _named(self, name: str, paths: list[str]) -> bool:
        if not any(map(self._inside, paths)):
            return False
        folder, last = self._parent(paths[0])
        if name.startswith("mkdir"):
            folder.names[last] = Folder()
        elif name.startswith("rename"):
            other, to = self._parent(paths[1])
            other.names[to] = folder.names.pop(last)
        else:
            del folder.names[last]
        return True

    def _descriptor(self, word: str) -> Open | None:
        return self.open.get(int(word.split("<")[0])) if self._inside(_path_of(word)) else None

    def _full(self, words: list[str], i: int) -> str:
        path = os.fsdecode(_bytes(words[i]))
        start = _path_of(words[i - 1]) if i and "<" in words[i - 1] else ""
        return os.path.normpath(os.path.join(start, path))

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def _parent(self, path: str) -> tuple[Folder, str]:
        *folders, last = os.path.relpath(path, self.root).split("/")
        found: Any = self.top
        for name in folders:
            found = found.names[name]
        return found, "" if last == "." else last

    def _at(self, path: str) -> File:
        folder, last = self._parent(path)
        found = folder.names[last]
        assert isinstance(found, File)
        return found

    def contents(self, disk: str) -> dict[str, bytes | None]:
        """By path: a file's bytes, None of a folder."""
        return dict(_contents(self.top, "", disk))


def _contents(folder: Folder, prefix: str, disk: str) -> Iterator[tuple[str, bytes | None]]:
    for name, item in (folder.synced if disk == "synced names" else folder.names).items():
        if isinstance(item, Folder):
            yield prefix + name, None
            yield from _contents(item, f"{prefix}{name}/", disk)
        elif disk in ("synced data", "synced names"):
            yield prefix + name, item.synced
        else:
            yield prefix + name, bytes(item.blank if disk == "blank" else item.data)


# Trials ------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of a command's states."""

    command: str
    calls: int = 0  # that changed the folder
    syncs: int = 0
    states: int = 0  # that differ
    again: int = 0  # from which the command was run again
    defects: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PowerLoss(Killer):
    """Cuts a command off after every call, and looks at what is left."""

    def run_states(self, again: int) -> Tally:
        """Looks at every state; from `again` of them, evenly spread, runs the command again."""
        usual = self.measure()
        tally = Tally(self.name)
        states = dict(self._states(tally))
        tally.states = len(states)
        chosen = {i * len(states) // again for i in range(again)}
        for i, (state, when) in enumerate(states.items()):
            self._write(dict(state))
            problems = list(self._problems(files_of(self.out), usual))
            if i in chosen:
                tally.again += 1
                problems += self._again(usual)
            tally.defects += [f"{when}: {problem}" for problem in problems]
        return tally

    def _states(self, tally: Tally) -> Iterator[tuple[tuple[tuple[str, bytes | None], ...], str]]:
        disk = Disk(self.out)
        for call in self._trace():
            if not disk.apply(call):
                continue
            tally.calls += 1
            tally.syncs += "sync" in call.name
            for kind in DISKS:
                found = tuple(sorted(disk.contents(kind).items()))
                yield found, f"after call {tally.calls}, {call.name}, with {DISKS[kind]}"
        there = {
            str(path.relative_to(self.out)): None if path.is_dir() else path.read_bytes()
            for path in self.out.rglob("*")
        }
        if disk.contents("all") != there:
            raise RuntimeError(f"{self.name}: what strace recorded is not what is there")

    def _trace(self) -> list[Call]:
        trace = self.root / "trace"
        trace.unlink(missing_ok=True)
        self._clear()
        server = self.server
        with Server(before=(*STRACE, "-o", str(trace))) as self.server:
            self._check_end(self.start())
        self.server = server
        return list(read_trace(trace))

    def _write(self, state: dict[str, bytes | None]) -> None:
        self._clear()
        for name, data in state.items():
            path = self.out / name
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)

    @staticmethod
    def _lost_lines(name: str, path: Path, usual: Usual) -> Iterator[str]:
        """What is read of the lines must be some of the undisturbed run's."""
        whole = usual.folder / name
        known = JsonLines(whole).found if whole.exists() else None
        for line in JsonLines(path).found:
            if known is not None and line not in known:
                yield f"{name} has a line that the undisturbed run's has not"


def is_possible() -> bool:
    """Whether strace is there, and allowed."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*STRACE, "true"], capture_output=True).returncode == 0
