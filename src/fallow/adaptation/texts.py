"""What an adaptation reads: texts in stated shares, and text that the dense model writes itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer

from fallow.checkpoints.text import Text
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path, read_array
from fallow.common.progress import progress

HELD_OUT = 16  # windows, of all files together: they are judged by, and never trained on
# The dense model continues so many tokens of the text, from anywhere in it.
PREFIX = 16
# How often each sampled window is read, so that sampling costs less: a fifth of the training's time
# on a GPU.
SAMPLED_EPOCHS = 2
# Windows. A step of few is bound by the launching of kernels; SmolLM2 keeps 48 GB of keys and
# values of 4096.
_WRITTEN_AT_ONCE = {"cpu": 64, "cuda": 4096}


@dataclass
class Source:
    """Windows (n, context) of one text, and what share of all tokens they give."""

    name: str
    sha256: str
    windows: np.ndarray = field(repr=False)
    share: float


@dataclass
class Mixture:
    """Several sources, read window by window: the one that is furthest behind its share is next."""

    sources: list[Source]
    held_out: np.ndarray  # (HELD_OUT, context)
    seed: int
    bos: int | None = None  # what every window begins with, if it does
    read: list[int] = field(default_factory=list)  # windows of each source so far

    def __post_init__(self) -> None:
        self.read = self.read or [0] * len(self.sources)

    def batch(self, n: int) -> np.ndarray:
        """The next windows, (n, context): every epoch of a source has its own order."""
        return np.stack([self._next() for _ in range(n)])

    def _next(self) -> np.ndarray:
        total = sum(self.read) + 1
        behind = [s.share * total - n for s, n in zip(self.sources, self.read, strict=True)]
        chosen = int(np.argmax(behind))
        windows, count = self.sources[chosen].windows, self.read[chosen]
        self.read[chosen] += 1
        epoch, place = divmod(count, len(windows))
        return windows[_order(self.seed, chosen, epoch, len(windows))[place]]

    def epochs(self, n: int) -> list[float]:
        """How often each source is read by n windows."""
        return [s.share * n / len(s.windows) for s in self.sources]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return [
            {
                "name": s.name,
                "sha256": s.sha256,
                "share": s.share,
                "tokens": int(s.windows.size),
            }
            for s in self.sources
        ]


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, source, epoch)).permutation(n)


def check_shares(shares: Sequence[float], n_texts: int) -> None:
    """Raises UsageError for shares that are not one positive number for each text."""
    if shares and (len(shares) != n_texts or min(shares) <= 0):
        raise UsageError(
            f"--shares gives {', '.join(f'{s:g}' for s in shares)} for {n_texts} texts; give a "
            "positive number for each --text"
        )


def mix(
    texts: Sequence[Text],
    windows: Sequence[np.ndarray],
    shares: Sequence[float],
    seed: int,
    bos: int | None = None,
) -> Mixture:
    """A mixture of texts as windows (n, context), which begin with `bos`; shares, or by length.

    The last windows of every text are held out.

    Raises:
        FallowError: a text is too short for that.
    """
    held = -(-HELD_OUT // len(texts))
    for text, cut in zip(texts, windows, strict=True):
        if len(cut) < 4 * held:
            raise FallowError(
                f"text {text.name} gives {len(cut)} windows of {cut.shape[1]} tokens, of which "
                f"{held} are held out; give one of {4 * held} windows at least, or a smaller "
                "--context"
            )
    weights = np.array(shares or [len(cut) - held for cut in windows], dtype=float)
    sources = [
        Source(text.name, text.sha256, cut[:-held], float(share))
        for text, cut, share in zip(texts, windows, weights / weights.sum(), strict=True)
    ]
    last = [cut[-held:] for cut in windows]
    held_out = np.concatenate([part[i : i + 1] for i in range(held) for part in last])
    return Mixture(sources, held_out[:HELD_OUT], seed, bos)


def prefixes(mixture: Mixture, n: int, rng: np.random.Generator) -> np.ndarray:
    """Beginnings (n, PREFIX) of text to write, of each source as often as it is read.

    So most is written like texts of which there is little for their share. A beginning may be
    anywhere in a window, since a window begins anywhere in its text; BOS comes before it.
    """
    length = min(PREFIX, mixture.held_out.shape[1] - 1)
    often = np.array([s.share / len(s.windows) for s in mixture.sources])
    bos = int(mixture.bos is not None)  # tokens
    found = np.full((n, length), mixture.bos or 0, dtype=np.int64)
    for i, chosen in enumerate(rng.choice(len(often), size=n, p=often / often.sum())):
        windows = mixture.sources[chosen].windows
        first = rng.integers(bos, windows.shape[1] - length + bos + 1)
        found[i, bos:] = windows[rng.integers(len(windows)), first : first + length - bos]
    return found


def add_sampled(mixture: Mixture, windows: np.ndarray, share: float, name: str, sha: str) -> None:
    """Gives windows that the dense model wrote a share of all tokens."""
    for source in mixture.sources:
        source.share *= 1 - share
    mixture.sources.append(Source(f"sampled from {name}", sha, windows, share))
    mixture.read.append(0)


def sample(module: Any, mixture: Mixture, n: int, folder: Path) -> np.ndarray:
    """Windows (n, context) int64 that a transformers model writes, at temperature 1.

    They continue text of the mixture, are as long as its windows, and are kept in `folder`, part by
    part, so that a stopped run goes on.

    Raises:
        FallowError: a part that was kept is damaged.
    """
    at_once = min(n, _WRITTEN_AT_ONCE[module.device.type])
    context = mixture.held_out.shape[1]
    parts = []
    with progress("sampling text", n) as ticker:
        for number, first in enumerate(range(0, n, at_once)):
            path = folder / f"sampled-{at_once}-{number}.npy"  # a CPU writes fewer at once
            if not path.exists():
                rng = np.random.default_rng((mixture.seed, number))
                begin = prefixes(mixture, min(at_once, n - first), rng)
                torch.manual_seed(int(rng.integers(1 << 31)))
                written = _write_what_fits(module, begin, context)
                with atomic_path(path) as temporary:
                    np.save(temporary, written.astype(np.int32))
            part = read_array(path, f"delete {folder} to begin again")
            parts.append(np.asarray(part, dtype=np.int64))
            ticker.advance(len(parts[-1]))
    return np.concatenate(parts)


def _write_what_fits(module: Any, begin: np.ndarray, context: int) -> np.ndarray:
    """As `_write`, in as many parts as the device's memory asks for."""
    try:
        return _write(module, begin, context)
    except torch.OutOfMemoryError:
        if len(begin) == 1:
            raise
    halves = np.array_split(begin, 2)  # not in the handler, which keeps what was allocated
    return np.concatenate([_write_what_fits(module, half, context) for half in halves])


class _Room(DynamicLayer):
    """A layer's keys and values in memory that is taken once.

    transformers' own cache is copied whole for every token: 24 GB for 2048 windows of SmolLM2.
    """

    is_initialized: bool

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = new[0].dtype, new[0].device, True
            shapes = [(*states.shape[:2], self.length, states.shape[3]) for states in new]
            self.room = [s.new_empty(shape) for s, shape in zip(new, shapes, strict=True)]
            self.keys, self.values = (room[:, :, :0] for room in self.room)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for room, states in zip(self.room, new, strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values


# Not cuDNN's, which makes a plan for every length: on an H200 the first windows of a number took
# 32 s, and others as many 11 s.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@sdpa_kernel(_ATTENTION)
@torch.inference_mode()
def _write(module: Any, begin: np.ndarray, context: int) -> np.ndarray:
    """Windows (n, context) that go on from `begin` (n, PREFIX).

    transformers' `generate` waits for the device several times a token; this waits once.
    """
    given = begin.shape[1]
    ids = torch.zeros(len(begin), context, dtype=torch.long, device=module.device)
    ids[:, :given] = torch.from_numpy(begin)
    last = module.generation_config.eos_token_id
    ends = [] if last is None else np.atleast_1d(last).tolist()
    cache = Cache([_Room(context) for _ in range(module.config.num_hidden_layers)])
    # transformers 5.17 has the old name, and 5.24 warns of it.
    name = "cache" if "cache" in signature(module.forward).parameters else "past_key_values"
    for place in range(1, context):
        read = ids[:, place - 1 : place]
        logits = module(input_ids=read, use_cache=True, **{name: cache}).logits[:, -1]
        if place >= given:
            logits = logits.float()
            logits[:, ends] = -torch.inf  # a window is one text
            # The largest p / e, e drawn from Exp(1), is i with probability p_i.
            chances = logits.softmax(dim=-1)
            chances /= torch.empty_like(chances).exponential_()
            ids[:, place] = chances.argmax(dim=-1)
    found: np.ndarray = ids.cpu().numpy()
    return found
