"""What an adaptation reads: texts in stated shares, and text that the dense model writes itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.checkpoints.text import Text
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path, read_array
from fallow.common.progress import progress

HELD_OUT = 16  # windows, of all files together: they are judged by, and never trained on
# The dense model continues the first tokens of windows of the text.
PREFIX = 8
SAMPLED_EPOCHS = 4  # how often each sampled window is read, so that sampling costs less
_WRITTEN_AT_ONCE = {"cpu": 64, "cuda": 2048}  # windows


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
    texts: Sequence[Text], windows: Sequence[np.ndarray], shares: Sequence[float], seed: int
) -> Mixture:
    """A mixture of texts as windows (n, context); shares, by default by length.

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
    return Mixture(sources, held_out[:HELD_OUT], seed)


def add_sampled(mixture: Mixture, windows: np.ndarray, share: float, name: str, sha: str) -> None:
    """Gives windows that the dense model wrote a share of all tokens."""
    for source in mixture.sources:
        source.share *= 1 - share
    mixture.sources.append(Source(f"sampled from {name}", sha, windows, share))
    mixture.read.append(0)


def sample(
    module: Any, prefixes: np.ndarray, n: int, context: int, folder: Path, seed: int
) -> np.ndarray:
    """Windows (n, context) int64 that a transformers model writes, at temperature 1.

    Each begins with a row of `prefixes` (m, PREFIX). They are kept in `folder`, part by part, so
    that a stopped run goes on.

    Raises:
        FallowError: a part that was kept is damaged.
    """
    device = module.device.type
    at_once = min(n, _WRITTEN_AT_ONCE[device])
    parts = []
    with progress("sampling text", n) as ticker:
        for number, first in enumerate(range(0, n, at_once)):
            path = folder / f"sampled-{number}.npy"
            if not path.exists():
                rng = np.random.default_rng((seed, number))
                begin = prefixes[rng.integers(len(prefixes), size=min(at_once, n - first))]
                torch.manual_seed(int(rng.integers(1 << 31)))
                written = _write(module, begin, context)
                with atomic_path(path) as temporary:
                    np.save(temporary, written.astype(np.int32))
            part = read_array(path, f"delete {folder} to begin again")
            parts.append(np.asarray(part, dtype=np.int64))
            ticker.advance(len(parts[-1]))
    return np.concatenate(parts)


def _write(module: Any, begin: np.ndarray, context: int) -> np.ndarray:
    ids = torch.from_numpy(begin).to(module.device)
    with torch.inference_mode():
        written = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=context - ids.shape[1],
            max_new_tokens=context - ids.shape[1],
            pad_token_id=0,
        )
    found: np.ndarray = written.cpu().numpy()
    return found
