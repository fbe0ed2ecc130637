"""Which weights stay in memory under a budget, and which come from the disk for every pass.

A pass over a dense model needs every weight once, always in the same order. Of such a cycle a cache
that takes in what was just read keeps nothing until it is needed again, and no policy hits more
often than keeping a fixed part (Belady's rule, on a cycle). So a part of the FFN's matrices stays,
and the others pass through two slots, read ahead while earlier layers compute. Layers that are read
are spread evenly, so that the disk always has work.

Experts are another matter: tokens need few of them, and some more often than others. Where not all
fit into memory, as many as fit are kept of those that were chosen before, and the others are read
when they are chosen (csrc/engine/disk.h, ExpertCache).

The head is another matter where a plan has a shortlist: of its rows a token needs some hundreds,
which are mostly those that earlier tokens needed. So it goes first, but for a cache of rows.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import UsageError

SLOTS = 2
SECTOR = 4096  # as csrc/platform/file.h has it
HEAD_ROWS = 16384  # of the head, in memory
EMBEDDING_ROWS = 64  # of an embedding that is not the head: a block of prefill
LOADED_AT_ONCE = 32_000_000  # bytes
RANGE = 4_000_000  # bytes at once where all of such a matrix is read
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PER_LAYER = "embed_tokens_per_layer.weight"
COARSE_HEAD = ("lm_head_coarse.codes", "lm_head_coarse.bias")
FOR_PLUGIN = "cuts."  # tensors that llama.cpp's plugin reads
_EXPERT = ".experts."
STREAMED = ("gate_proj", "up_proj", "down_proj_t")
# What the process takes after the engine is ready: logits, the sampler's and Python's arrays.
RESERVE = 24_000_000
SMALLEST_BARE = 1_000_000  # a number without a unit is bytes from here on
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, option: str = "--memory") -> int:
    """Bytes of a size such as 800MB (of 1e6 bytes) or 1.5GiB; of a number alone, if it is large.

    Raises:
        UsageError: anything else, or a small number alone, which hardly means bytes.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or not float(found[1]) * unit >= 1:
        raise UsageError(f"{option} {text!r} is not a size; give one such as 800MB or 1.5GB")
    if not found[2] and float(found[1]) < SMALLEST_BARE:
        number = text.strip()
        raise UsageError(f"{option} {number} has no unit; give {number}MB, or {number}B for bytes")
    return int(float(found[1]) * unit)


@dataclass(frozen=True)
class Part:
    """A tensor: its place in the file, bytes."""

    name: str
    offset: int
    size: int

    @property
    def room(self) -> int:
        """Bytes of memory: whole sectors."""
        return -(-self.size // SECTOR) * SECTOR

    @property
    def matrix(self) -> str:
        return self.name.split(".")[-2:][0]

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])


@dataclass(frozen=True)
class Rows:
    """A matrix that stays in the file, but for some of its rows."""

    part: Part
    n_rows: int
    room: int  # rows

    @property
    def memory(self) -> int:
        """Bytes of these rows, and of what csrc/engine/disk.h, FileRows, keeps about each."""
        return self.room * (self.part.size // self.n_rows + 16) + 4 * self.n_rows + RANGE


@dataclass(frozen=True)
class Experts:
    """Experts that stay in the file, but for some of them."""

    count: int  # of all layers
    used: int  # by a token, in all layers
    size: int  # bytes of the largest
    slot: int  # bytes of memory for one
    room: int  # experts

    @property
    def memory(self) -> int:
        return self.room * self.slot


@dataclass(frozen=True)
class Residency:
    """What stays in memory, and what of each layer is read for every pass."""

    resident: list[Part]
    streamed: dict[int, list[Part]]  # by layer, ascending
    head: Rows | None = None  # if it is not resident
    experts: Experts | None = None  # if they are not resident

    @property
    def slot(self) -> int:
        """Bytes of the largest layer's streamed parts."""
        return max((sum(p.room for p in parts) for parts in self.streamed.values()), default=0)

    @property
    def memory(self) -> int:
        """Bytes of weights in memory at most."""
        head = self.head.memory if self.head else 0
        experts = self.experts.memory if self.experts else 0
        return sum(p.room for p in self.resident) + SLOTS * self.slot + head + experts

    @property
    def pass_bytes(self) -> int:
        """Read from the disk for a pass over the model."""
        return sum(p.size for parts in self.streamed.values() for p in parts)


def parts_of(file: GgufFile, coarse_head: bool) -> list[Part]:
    """The tensors that the engine computes with, in the file's order.

    An embedding that is not the head too is left out, and one of inputs of each layer: of them a
    token needs one row, from the file.
    """
    unused = {"plan", PER_LAYER} if coarse_head else {"plan", PER_LAYER, *COARSE_HEAD}
    if HEAD in file.tensors:
        unused.add(EMBEDDING)
    return [
        Part(name, tensor.offset, tensor.data.nbytes)
        for name, tensor in file.tensors.items()
        if name not in unused and not name.startswith(FOR_PLUGIN)
    ]


def cache_bytes(file: GgufFile, context: int) -> int:
    """Of the keys and values of a text of `context` tokens, two bytes each."""
    # Every layer has tensors: a damaged count, which the core refuses, takes no memory here.
    n = min(file.get("fallow.n_layers"), len(file.tensors))
    heads = file.numbers("fallow.layer_n_kv_heads", [file.get("fallow.n_kv_heads")] * n)
    dims = file.numbers("fallow.layer_head_dim", [file.get("fallow.head_dim")] * n)
    kept_by = file.numbers("fallow.kv_layer", range(n))
    layers = enumerate(zip(heads, dims, kept_by, strict=False))
    return 2 * 2 * context * sum(h * d for i, (h, d, layer) in layers if layer == i)


def in_batches(parts: list[Part], size: int = LOADED_AT_ONCE) -> Iterator[list[Part]]:
    """Of little more than `size` bytes each; experts alone would be too small to be read fast."""
    batch: list[Part] = []
    for part in parts:
        batch.append(part)
        if sum(p.size for p in batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def head_rows(file: GgufFile) -> Rows:
    """The head as a matrix that stays in the file."""
    name = HEAD if HEAD in file.tensors else EMBEDDING
    tensor = file.tensors[name]
    part = Part(name, tensor.offset, tensor.data.nbytes)
    return Rows(part, tensor.shape[0], min(HEAD_ROWS, tensor.shape[0]))


def experts_of(file: GgufFile) -> Experts | None:
    """A mixture's experts, with room for those of a token; None: it has none."""
    n_layers, used = file.get("fallow.n_layers"), file.get("fallow.n_experts_used", 0)
    if not used:
        return None
    size: Counter[str] = Counter()
    slot: Counter[str] = Counter()
    for part in parts_of(file, False):
        if _EXPERT in part.name:
            expert = part.name.rpartition(f".{part.matrix}.")[0]
            size[expert] += part.size
            slot[expert] += part.room
    largest, used = max(slot.values()), n_layers * used
    return Experts(len(slot), used, max(size.values()), largest, room=used)


def residencies(
    parts: list[Part], head: Rows | None = None, experts: Experts | None = None, budget: int = 0
) -> list[Residency]:
    """From all parts in memory to all of the FFNs read for every pass, one part more each time.

    First of all goes the `head`, if it may, and memory is won by that. One matrix of all layers
    goes before the next: so slots are small. Of a mixture of experts these go after the head, but
    for as many as the budget has room for.
    """
    found = [Residency(parts, {})]
    if head and head.memory < head.part.room:
        parts = [p for p in parts if p.name != head.part.name]
        found.append(Residency(parts, {}, head))
    else:
        head = None
    if experts:
        others = [p for p in parts if _EXPERT not in p.name]
        taken = Residency(others, {}, head, replace(experts, room=0)).memory
        room = min(max((budget - taken) // experts.slot, experts.used), experts.count)
        return [*found, Residency(others, {}, head, replace(experts, room=room))]
    movable = [p for p in parts if p.matrix in STREAMED and not p.name.endswith(".bias")]
    movable.sort(key=lambda p: (STREAMED.index(p.matrix), _spread(p.layer)))
    for count in range(1, len(movable) + 1):
        gone = set(movable[:count])
        streamed: dict[int, list[Part]] = {}
        for part in sorted(gone, key=lambda p: (p.layer, p.offset)):
            streamed.setdefault(part.layer, []).append(part)
        found.append(Residency([p for p in parts if p not in gone], streamed, head))
    return found


def _spread(i: int) -> int:
    """The bits of i in reverse: of numbers in this order the first few are far apart."""
    return int(f"{i:016b}"[::-1], 2)
