"""Which cluster a token will be in, from what is known before its layer has run.

A network with one hidden layer is fitted on a store, per layer, on any of FEATURES: `token`, the
token's id; `previous`, the cluster that the token before was in, in the same layer; `below`, the
token's active set in the layer below, hence all that a prefetcher can know while that one runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fallow.common.errors import FallowError, UsageError
from fallow.common.progress import progress
from fallow.patterns.clustering import Codebook
from fallow.patterns.codebooks import (
    LayerResult,
    Part,
    Scored,
    check_store,
    load_codebooks,
    score_layer,
    split,
)
from fallow.patterns.store import PatternStore, chunks, unpack_bits

FEATURES = ("token", "previous", "below")
HIDDEN = 128
EPOCHS, BATCH, LEARNING_RATE = 6, 256, 2e-3
JUDGED = 0.1  # of the training windows, the last: they say which epoch is the best
FORGOTTEN = 0.05  # of the token ids in training, so that those never seen have a meaning


@dataclass
class PredictionReport(Scored):
    """How well masks of predicted clusters cover held-out patterns; "cluster" is an oracle's."""

    model: str
    rule: str
    features: list[str]
    hidden: int
    n_clusters: int
    train_rows: int
    test_rows: int
    test_text: str
    accuracy: list[float]  # by layer: how often the predicted cluster is the nearest
    layers: list[LayerResult]


def predict_clusters(
    store: PatternStore,
    codebooks: str | Path,
    *,
    features: Sequence[str] = FEATURES,
    test: PatternStore | None = None,
    held_out: float = 0.25,
    layers: Sequence[int] | None = None,
    hidden: int = HIDDEN,
    epochs: int = EPOCHS,
    seed: int = 0,
    n_threads: int = 1,
) -> PredictionReport:
    """Fits a classifier per layer on a store, and scores it on windows it was not fitted on.

    The cluster chosen is that of the largest expected overlap, sum over j of P(j) |c_k and c_j|.

    Args:
        codebooks: a file of `cluster_store`, of this store's model, rule and tap.
        layers: default: all that the file has.

    Raises:
        UsageError: an unknown feature, or a layer without a codebook.
        FallowError: codebooks of another model, rule or tap, or a store too small to split.
    """
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise UsageError(f"unknown features {unknown or '(none)'}; known: {', '.join(FEATURES)}")
    made, metadata = load_codebooks(codebooks)
    tap = check_store(store, made, metadata, codebooks)
    wanted = _with_codebooks(made, layers, codebooks)
    train, held = split(store, tap, test, held_out)
    if train.n_windows < 2:
        raise FallowError(f"{store.folder} has too few windows to fit a classifier; collect more")
    results, accuracy = [], []
    with progress("predicting clusters", len(wanted)) as ticker:
        for layer in wanted:
            codebook = made[layer]
            inputs = _Inputs(train, codebook, layer, features, n_threads)
            network = _fit(inputs, hidden, epochs, seed)
            # Ids are numbered as in training.
            seen = _Inputs(held, codebook, layer, features, n_threads, inputs.ids)
            labels = _predict(network, seen, codebook)
            accuracy.append(float((labels == seen.labels).mean()))
            results.append(
                score_layer(codebook, train, held, layer, seed, n_threads, predicted=labels)
            )
            ticker.advance()
    return PredictionReport(
        model=store.header.model,
        rule=store.header.rule,
        features=list(features),
        hidden=hidden,
        n_clusters=made[wanted[0]].n_clusters,
        train_rows=train.n_rows,
        test_rows=held.n_rows,
        test_text=held.store.header.text,
        accuracy=accuracy,
        layers=results,
    )


def _with_codebooks(
    made: dict[int, Codebook], layers: Sequence[int] | None, path: str | Path
) -> list[int]:
    """The layers asked for, or all; UsageError for one that the file has no codebook of."""
    wanted = sorted(made) if layers is None else list(layers)
    missing = [layer for layer in wanted if layer not in made]
    if missing:
        raise UsageError(f"{path} has no codebook of layer {missing[0]}")
    return wanted


class _Inputs:
    """Features and nearest clusters of all tokens of a part, for one layer."""

    def __init__(
        self,
        part: Part,
        codebook: Codebook,
        layer: int,
        features: Sequence[str],
        n_threads: int,
        ids: np.ndarray | None = None,
    ) -> None:
        self.context, self.n_rows, self.n_clusters = part.context, part.n_rows, codebook.n_clusters
        self.labels, _ = codebook.nearest(np.ascontiguousarray(part.rows(layer)), n_threads)
        tokens = part.tokens
        self.ids = np.unique(tokens) if ids is None else ids
        self.token = self.previous = self.below = None
        self.width = codebook.width
        if "token" in features:
            place = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
            self.token = np.where(self.ids[place] == tokens, place + 1, 0)  # 0: not seen
        if "previous" in features:
            shifted = np.full((part.n_windows, part.context), codebook.n_clusters)  # a window's 1st
            shifted[:, 1:] = self.labels.reshape(shifted.shape)[:, :-1]
            self.previous = shifted.ravel()
        if "below" in features:  # nothing is active below the first layer
            rows = part.rows(max(layer - 1, 0))
            self.below = rows if layer else np.zeros_like(rows)

    def batch(self, rows: np.ndarray | slice) -> dict[str, torch.Tensor]:
        found = {"token": self.token, "previous": self.previous}
        batch = {n: torch.from_numpy(a[rows]) for n, a in found.items() if a is not None}
        if self.below is not None:
            active = unpack_bits(self.below[rows], self.width)
            # Vectors of length 1: Adam's step moves all of a row's weights, half of which add up.
            signs = (2 * active.astype(np.float32) - 1) / np.float32(self.width**0.5)
            batch["below"] = torch.from_numpy(signs)
        return batch


class _Classifier(nn.Module):
    """Logits of the clusters from the sum of what each feature adds to the hidden layer."""

    def __init__(self, inputs: _Inputs, hidden: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        if inputs.token is not None:
            self.parts["token"] = nn.Embedding(len(inputs.ids) + 1, hidden)
        if inputs.previous is not None:
            self.parts["previous"] = nn.Embedding(inputs.n_clusters + 1, hidden)
        if inputs.below is not None:
            self.parts["below"] = nn.Linear(inputs.width, hidden)
        for part in self.parts.values():
            nn.init.normal_(part.get_parameter("weight"), std=0.3)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.last = nn.Linear(hidden, inputs.n_clusters)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total = sum(part(batch[name]) for name, part in self.parts.items())
        return self.last(torch.relu(total + self.bias))


def _fit(inputs: _Inputs, hidden: int, epochs: int, seed: int) -> _Classifier:
    """The best epoch's network, by the last windows, which it is not fitted on."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Classifier(inputs, hidden)
    n_windows = inputs.n_rows // inputs.context
    first = (n_windows - (round(JUDGED * n_windows) or 1)) * inputs.context
    labels = torch.from_numpy(inputs.labels.astype(np.int64))
    steps = epochs * -(-first // BATCH)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, state = float("inf"), {}
    for _ in range(epochs):
        order = rng.permutation(first)
        for part in chunks(first, BATCH):
            rows = np.sort(order[part])
            batch = inputs.batch(rows)
            if "token" in batch:
                batch["token"] *= torch.from_numpy(rng.random(len(rows)) >= FORGOTTEN)
            loss = nn.functional.cross_entropy(network(batch), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        judged = torch.cat(list(_logits(network, inputs, first)))
        value = float(nn.functional.cross_entropy(judged, labels[first:]))
        if value < best:
            best, state = value, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    return network


@torch.no_grad()
def _logits(network: _Classifier, inputs: _Inputs, first: int = 0) -> Iterator[torch.Tensor]:
    for part in chunks(inputs.n_rows - first, 4 * BATCH):
        yield network(inputs.batch(slice(first + part.start, first + part.stop)))


def _predict(network: _Classifier, inputs: _Inputs, codebook: Codebook) -> np.ndarray:
    """Labels (n,) of the largest expected overlap."""
    centroids = unpack_bits(codebook.centroids, codebook.width).astype(np.float32)
    weighted = centroids if codebook.weights is None else centroids * codebook.weights
    shared = torch.from_numpy(weighted @ centroids.T)
    found = [(torch.softmax(z, dim=1) @ shared).argmax(dim=1) for z in _logits(network, inputs)]
    return torch.cat(found).numpy()
