"""From a store to codebooks of its layers, and what they tell of held-out windows."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.text import LARGEST_OVERLAP, overlap, sketch_of
from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.files import atomic_path, check_writable, fits, parse_json, write_json
from fallow.common.metrics import energy_recall
from fallow.common.progress import console
from fallow.patterns import published
from fallow.patterns.clustering import (
    LARGEST_WEIGHT,
    Codebook,
    budget_size,
    check_clusters,
    energy_weights,
    fit,
    largest,
)
from fallow.patterns.store import (
    Header,
    MappedRows,
    PatternStore,
    chunks,
    n_words,
    pack_bits,
    row_sizes,
    unpack_bits,
)

ALGORITHMS = ("lloyd", "published", "binary")
ROWS_AT_ONCE = 4096
TOKEN_RUN = 16  # tokens in a row that two texts can hardly both have by chance
_MADE_OF = ("model", "fingerprint", "rule", "knob")  # what codebooks and a store share


@dataclass
class Coverage:
    """How masks cover the truth, over all rows (docs/methods.md, "Recall")."""

    overlap: int = 0  # neurons in both
    active: int = 0
    chosen: int = 0
    energies: list[np.ndarray] = field(default_factory=list)  # energy recall of rows

    @property
    def recall(self) -> float:
        return self.overlap / max(1, self.active)

    @property
    def precision(self) -> float:
        return self.overlap / max(1, self.chosen)

    def add(self, rows: np.ndarray, masks: np.ndarray, magnitudes: np.ndarray | None) -> None:
        """Rows (n, words) against masks alike, or one for all; magnitudes (n, width)."""
        masks = np.broadcast_to(masks, rows.shape)
        self.overlap += int(row_sizes(rows & masks).sum())
        self.active += int(row_sizes(rows).sum())
        self.chosen += int(row_sizes(masks).sum())
        if magnitudes is not None:
            energy = np.square(magnitudes.astype(np.float32))
            active, chosen = (unpack_bits(bits, energy.shape[1]) for bits in (rows, masks))
            self.energies.append(energy_recall(energy, active, chosen))

    def to_json(self) -> dict[str, float]:
        found = {
            "recall": self.recall,
            "precision": self.precision,
            "f1": 2 * self.overlap / max(1, self.active + self.chosen),
        }
        if self.energies:
            energies = np.concatenate(self.energies)
            found["energy_recall"] = float(energies.sum() / max(1, len(energies)))
        return found


@dataclass
class LayerResult:
    """One layer: scores of the held-out rows by what chose the mask."""

    layer: int
    scores: dict[str, dict[str, float]]  # "cluster" is the oracle's choice; and the baselines
    train_recall: float | None
    passes: int
    density: float  # of the centroids
    active: float  # of the rows


class Scored:
    """A report with a result per layer."""

    layers: list[LayerResult]

    def mean(self, name: str, score: str = "recall") -> float:
        """A score's mean over layers."""
        return float(np.mean([layer.scores[name][score] for layer in self.layers]))

    def to_json(self) -> dict[str, Any]:
        names = self.layers[0].scores
        means = {n: {s: self.mean(n, s) for s in names[n]} for n in names}
        return vars(self) | {"layers": [asdict(layer) for layer in self.layers], "mean": means}


@dataclass
class ClusterReport(Scored):
    """Codebooks of a store's layers."""

    path: str
    model: str
    rule: str
    tap: str
    algorithm: str
    n_clusters: int
    budget: float
    codebook_bytes: int
    train_rows: int
    test_rows: int
    test_text: str
    layers: list[LayerResult]


def cluster_store(
    store: PatternStore,
    output: str | Path,
    n_clusters: int,
    budget: float = 0.5,
    *,
    algorithm: str = "lloyd",
    tap: str = "inter",
    layers: Sequence[int] | None = None,
    test: PatternStore | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    restarts: int = 1,
    energy: bool = False,
    batch: int | None = None,
    workers: int = 1,
    n_threads: int = 1,
) -> ClusterReport:
    """Fits a codebook per layer, writes them, and scores them on windows they were not fitted on.

    Finished layers and passes are kept beside the output until it is written, so that a stopped run
    goes on there.

    Args:
        algorithm: "lloyd"; "published": arXiv:2507.14179, one codebook for all layers, whose
            centroids have a share of `budget` neurons; or "binary", its baseline, on one chunk.
        test: what to score on; default: the last `held_out` of the store's windows.
        energy: of Lloyd: neurons count with their mean share of the energy, in 15 steps.
        batch, workers: of Lloyd, as for `fit`.

    Raises:
        UsageError: an unknown algorithm, a budget outside (0, 1), more clusters than rows, a test
            store of the same text, or `energy` of a store without magnitudes.
        FallowError: the test store is of another model or rule.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    header = store.header
    wanted = list(range(header.n_layers)) if layers is None else list(layers)
    for layer in wanted:
        store.rows(layer, tap)  # or it says what is wrong
    size = budget_size(budget, header.widths[tap])
    train, held = split(store, tap, test, held_out)
    check_clusters(n_clusters, train.n_rows, batch)
    if energy and not (header.magnitudes and tap == "inter"):
        raise UsageError("energy weights need magnitudes; collect the store with --magnitudes")
    check_writable(output)
    asked = _Asked(n_clusters, budget, algorithm, tap, train.n_rows, seed, restarts, energy, batch)
    settings = asdict(header) | asdict(asked)
    state = _State(Path(f"{output}.parts"), settings)
    codebooks, results = {}, []
    for layer, codebook in _fitted(train, wanted, asked, state, workers, n_threads):
        codebooks[layer] = codebook
        results.append(score_layer(codebook, train, held, layer, seed, n_threads, size))
        _tell(results[-1])
    save_codebooks(output, codebooks, {k: json.dumps(v) for k, v in settings.items()})
    state.remove()
    return _report(output, header, asked, codebooks, held, results)


@dataclass(frozen=True)
class _Asked:
    """How codebooks are fitted, as their file says."""

    n_clusters: int
    budget: float
    algorithm: str
    tap: str
    train_rows: int
    seed: int
    restarts: int
    energy: bool
    batch: int | None


def _fitted(
    train: "Part",
    layers: list[int],
    asked: _Asked,
    state: "_State",
    workers: int,
    n_threads: int,
) -> Iterator[tuple[int, Codebook]]:
    """Each layer's codebook: Lloyd's of its own, kept in `state`, or the one that all share."""
    if asked.algorithm != "lloyd":
        pooled = _pooled(train, layers, asked.algorithm, asked.n_clusters, asked.budget, n_threads)
        yield from ((layer, pooled) for layer in layers)
        return
    for layer in layers:
        codebook = state.finished(layer)
        if codebook is None:
            codebook = fit(
                train.mapped(layer),
                train.store.header.widths[asked.tap],
                asked.n_clusters,
                asked.budget,
                seed=asked.seed,
                restarts=asked.restarts,
                weights=_energy_weights(train, layer) if asked.energy else None,
                n_threads=n_threads,
                workers=workers,
                batch=asked.batch,
                start=state.begun(layer) if asked.restarts == 1 else None,
                after_pass=partial(state.keep, layer, finished=False),
            )
            state.keep(layer, codebook, finished=True)
        yield layer, codebook


def _tell(result: LayerResult) -> None:
    """What a layer came to, while others are still fitted."""
    recalls = {name: score["recall"] for name, score in result.scores.items()}
    console.print(
        f"layer {result.layer}: recall {recalls['cluster']:.4f}, static {recalls['static']:.4f}, "
        f"{result.passes} passes",
        highlight=False,
    )


def _report(
    path: str | Path,
    header: Header,
    asked: _Asked,
    codebooks: dict[int, Codebook],
    held: "Part",
    results: list[LayerResult],
) -> ClusterReport:
    """What was fitted, with the size of the centroids, which layers may share."""
    distinct = {id(c.centroids): c.centroids.nbytes for c in codebooks.values()}
    return ClusterReport(
        path=str(path),
        model=header.model,
        rule=header.rule,
        tap=asked.tap,
        algorithm=asked.algorithm,
        n_clusters=asked.n_clusters,
        budget=asked.budget,
        codebook_bytes=sum(distinct.values()),
        train_rows=asked.train_rows,
        test_rows=held.n_rows,
        test_text=held.store.header.text,
        layers=results,
    )


def split(
    store: PatternStore, tap: str, test: PatternStore | None, held_out: float
) -> tuple["Part", "Part"]:
    """What to fit on and what to score on.

    Raises:
        UsageError: too few windows, or a test store of the text that is fitted on.
        FallowError: a test store of another model or rule.
    """
    header = store.header
    if not 0 <= held_out < 1:
        raise UsageError(f"--held-out {held_out:g} is outside [0, 1); give a share such as 0.25")
    if test is None:
        n_train = header.n_windows - round(held_out * header.n_windows)
        if not 0 < n_train < header.n_windows:
            raise UsageError(
                f"{header.n_windows} windows cannot be split at {held_out:g}; collect more of them"
            )
        return Part(store, tap, 0, n_train), Part(store, tap, n_train, header.n_windows)
    test.check_model(header.fingerprint, header.model)
    if test.header.text_sha256 == header.text_sha256:
        raise UsageError(f"--test {test.folder} is of the text that is fitted on; give another")
    if (test.header.rule, test.header.knob) != (header.rule, header.knob):
        raise FallowError(
            f"pattern store {test.folder} is of rule {test.header.rule} at {test.header.knob:g}, "
            f"not of {header.rule} at {header.knob:g}"
        )
    share = overlap(sketch_of(store.tokens.ravel(), TOKEN_RUN), test.tokens.ravel(), TOKEN_RUN)
    if share > LARGEST_OVERLAP:
        raise UsageError(
            f"pattern store {test.folder} has {share:.0%} of its text in common with "
            f"{store.folder}, which is fitted on; give one of another text"
        )
    return Part(store, tap), Part(test, tap)


class Part:
    """Some windows of a store, one after the other."""

    def __init__(self, store: PatternStore, tap: str, first: int = 0, end: int | None = None):
        self.store, self.tap = store, tap
        context = store.header.context
        self._first, self._end = first, store.header.n_windows if end is None else end
        self._rows = slice(first * context, self._end * context)
        self.context, self.n_windows = context, self._end - first
        self.n_rows = self.n_windows * context

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, (n_rows,)."""
        return np.array(self.store.tokens[self._first : self._end]).ravel()

    def mapped(self, layer: int) -> MappedRows:
        return self.store.mapped(layer, self.tap, self._first, self._end)

    def rows(self, layer: int) -> np.ndarray:
        return self.mapped(layer).open()

    def magnitudes(self, layer: int) -> np.ndarray | None:
        """None where the store has none."""
        if not self.store.header.magnitudes or self.tap != "inter":
            return None
        return self.store.magnitudes(layer)[self._rows]


def _energy_weights(part: Part, layer: int) -> np.ndarray:
    """Raises UsageError if the store has no magnitudes."""
    magnitudes = part.magnitudes(layer)
    if magnitudes is None:
        raise UsageError("energy weights need magnitudes; collect the store with --magnitudes")
    width = magnitudes.shape[1]
    energy = np.zeros(width)
    for rows in chunks(len(magnitudes), ROWS_AT_ONCE):
        energy += np.square(magnitudes[rows].astype(np.float32)).sum(axis=0)
    return energy_weights(energy, frequencies(part.rows(layer), width))


def _pooled(
    train: Part,
    layers: list[int],
    algorithm: str,
    n_clusters: int,
    budget: float,
    n_threads: int,
) -> Codebook:
    """One codebook for all layers. A chunk is one window of each."""
    context, width = train.store.header.context, train.store.header.widths[train.tap]

    def chunk(window: int) -> np.ndarray:
        part = slice(window * context, (window + 1) * context)
        return np.concatenate([train.rows(layer)[part] for layer in layers])

    readers: list[published.Chunk] = [
        partial(chunk, window) for window in range(train.n_rows // context)
    ]
    if algorithm == "binary":
        centroids = published.binary_k_means(readers[0](), width, n_clusters, n_threads=n_threads)
        return Codebook(centroids, width)
    found = published.cluster(
        readers, width, n_clusters, zero_fraction=1 - budget, n_threads=n_threads
    )
    return Codebook(found.centroids, width, [0] * found.passes)


def score_layer(
    codebook: Codebook,
    train: Part,
    held: Part,
    layer: int,
    seed: int,
    n_threads: int,
    budget: int | None = None,
    predicted: np.ndarray | None = None,
) -> LayerResult:
    """Scores of the held-out rows by what chooses their mask.

    Args:
        budget: neurons of the baselines' masks; default: as many as a centroid has.
        predicted: labels (n_rows,) that something predicted; a mask of its own.
    """
    rows, width = held.rows(layer), codebook.width
    size = int(row_sizes(codebook.centroids[:1])[0]) if budget is None else budget
    magnitudes = held.magnitudes(layer)
    context = held.store.header.context
    count = frequencies(train.rows(layer), width, n_threads).astype(np.float64)
    rng = np.random.default_rng((seed, layer))
    static = pack_bits(largest((count - np.arange(width) / (2 * width))[None], size))
    scores = {name: Coverage() for name in ("cluster", "static", "previous", "random")}
    for part in chunks(len(rows), context):  # a window, so that tokens have those before them
        some = np.ascontiguousarray(rows[part])
        loud = None if magnitudes is None else magnitudes[part]
        labels, _ = codebook.nearest(some, n_threads)
        scores["cluster"].add(some, codebook.centroids[labels], loud)
        scores["static"].add(some, static, loud)
        scores["random"].add(some, pack_bits(largest(rng.random((1, width)), size)), loud)
        if predicted is not None:
            mask = codebook.centroids[predicted[part]]
            scores.setdefault("predicted", Coverage()).add(some, mask, loud)
        scores["previous"].add(some[1:], some[:-1], None if loud is None else loud[1:])
    history = codebook.history  # sums of overlaps, of Lloyd's passes alone
    return LayerResult(
        layer=layer,
        scores={name: score.to_json() for name, score in scores.items()},
        train_recall=(
            history[-1] / count.sum()
            if history and history[-1] and codebook.weights is None
            else None
        ),
        passes=len(history),
        density=float(row_sizes(codebook.centroids).mean() / width),
        active=scores["cluster"].active / (len(rows) * width),
    )


def frequencies(rows: np.ndarray, width: int, n_threads: int = 1) -> np.ndarray:
    """How many of the rows (n, words) each neuron is active in, (width,) int64."""
    total = np.zeros((1, 64 * n_words(width)), dtype=np.uint32)
    labels = np.zeros(ROWS_AT_ONCE, dtype=np.int32)
    for part in chunks(len(rows), ROWS_AT_ONCE):
        some = np.ascontiguousarray(rows[part])
        _core.add_rows(some, labels[: len(some)], total, n_threads)
    return total[0, :width].astype(np.int64)


def check_store(
    store: PatternStore, codebooks: dict[int, Codebook], metadata: dict[str, str], path: str | Path
) -> str:
    """The tap of codebooks with these metadata.

    Raises:
        FallowError: they are not of this store's model, rule and layers, or damaged.
    """
    header = asdict(store.header)
    try:
        made_of = {name: parse_json(metadata[name]) for name in (*_MADE_OF, "tap")}
    except (KeyError, ValueError) as error:
        raise FallowError(f"{path} does not say what it was made of; cluster again") from error
    for name in _MADE_OF:
        if made_of[name] != header[name]:
            raise FallowError(
                f"{path} is of {name} {made_of[name]}, pattern store {store.folder} of "
                f"{header[name]}; give codebooks that were made of such a store"
            )
    width = header["widths"].get(str(made_of["tap"]))
    for layer, codebook in codebooks.items():
        if codebook.width != width or layer >= header["n_layers"]:
            raise FallowError(
                f"{path} has a layer {layer} of {codebook.width} values, pattern store "
                f"{store.folder} has none; give codebooks that were made of such a store"
            )
    return str(made_of["tap"])


class _State:
    """Codebooks of a run that is not finished: a folder of one file per layer.

    Raises:
        FallowError: the folder is of a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = folder / "settings.json"
        if path.exists():
            if not _holds(path, digest):
                raise FallowError(
                    f"{folder} is left of a run with other settings or patterns; delete it, or "
                    "choose another output"
                )
        else:
            write_json(path, digest)

    def keep(self, layer: int, codebook: Codebook, *, finished: bool) -> None:
        metadata = {"history": json.dumps(codebook.history), "finished": json.dumps(finished)}
        save_codebooks(self._file(layer), {layer: codebook}, metadata)

    def finished(self, layer: int) -> Codebook | None:
        return self._load(layer, True)

    def begun(self, layer: int) -> Codebook | None:
        return self._load(layer, False)

    def _load(self, layer: int, finished: bool) -> Codebook | None:
        path = self._file(layer)
        if not path.exists():
            return None
        try:
            codebooks, metadata = load_codebooks(path)
            history = parse_json(metadata["history"])
            if not fits(history, list) or not all(fits(overlap, int) for overlap in history):
                raise ValueError("no history")
            codebooks[layer].history = history
            kept = parse_json(metadata["finished"])
        except (FallowError, KeyError, TypeError, ValueError) as error:
            raise FallowError(f"{path} is damaged; delete {self._folder} to begin again") from error
        return codebooks[layer] if kept == finished else None

    def _file(self, layer: int) -> Path:
        return self._folder / f"layer.{layer:03d}"

    def remove(self) -> None:
        """The settings last: without them layers would be taken for those of any other run."""
        for path in self._folder.glob("*layer.*"):
            path.unlink()
        shutil.rmtree(self._folder)


def _holds(path: Path, value: str) -> bool:
    with suppress(ValueError):
        return bool(parse_json(path.read_bytes()) == value)
    return False


def save_codebooks(
    path: str | Path, codebooks: dict[int, Codebook], metadata: dict[str, str]
) -> None:
    """Writes codebooks by layer as safetensors, whole or not at all."""
    from safetensors.numpy import save

    arrays = {f"layers.{i}.centroids": c.centroids for i, c in codebooks.items()}
    weights = {i: c.weights for i, c in codebooks.items()}
    arrays |= {f"layers.{i}.weights": w for i, w in weights.items() if w is not None}
    width = next(iter(codebooks.values())).width
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(arrays, metadata=metadata | {"width": str(width)}))


def load_codebooks(path: str | Path) -> tuple[dict[int, Codebook], dict[str, str]]:
    """Codebooks by layer, and their metadata.

    Raises:
        FallowError: the file is missing, truncated, or no file of codebooks.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        width = int(metadata["width"])
        layers = [int(name.split(".")[1]) for name in arrays if name.endswith(".centroids")]
        codebooks = {
            i: Codebook(
                arrays[f"layers.{i}.centroids"], width, [], arrays.get(f"layers.{i}.weights")
            )
            for i in sorted(layers)
        }
        for layer, codebook in codebooks.items():
            _check_codebook(layer, codebook)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise FallowError(
            f"{path} is no file of codebooks ({in_one_line(error)}); cluster again"
        ) from error
    return codebooks, metadata


def _check_codebook(layer: int, codebook: Codebook) -> None:
    """Raises ValueError for arrays that are no codebook."""
    centroids, width, weights = codebook.centroids, codebook.width, codebook.weights
    if layer < 0 or centroids.dtype != np.uint64 or width < 1:
        raise ValueError(f"layer {layer} has no centroids of bits")
    if centroids.ndim != 2 or len(centroids) < 1 or centroids.shape[1] != n_words(width):
        raise ValueError(f"layer {layer} has centroids of shape {centroids.shape}")
    neurons = pack_bits(np.ones((1, width), dtype=bool))
    if (centroids & ~neurons).any() or row_sizes(centroids).min() < 1:
        raise ValueError(f"layer {layer} has centroids of no or of other neurons")
    if weights is not None and (
        weights.shape != (width,) or weights.dtype != np.uint8 or weights.max() > LARGEST_WEIGHT
    ):
        raise ValueError(f"layer {layer} has no weights from 0 to {LARGEST_WEIGHT}")
