"""Trains the selector `learned`: its networks learn the dense model's choice as it runs.

Each layer's network takes its steps in the very pass of the dense model that computes the layer's
input and true scores, window after window, so that nothing has to be stored: 300,000 inputs of one
layer of Qwen2.5-1.5B would be 0.9 GB, all networks of rank 128 with their optimisers are 0.4 GB.
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fallow.calibration.calibrator import Calibrator, origin
from fallow.checkpoints.text import Text, check_context, load_text
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path, check_sums, check_writable
from fallow.common.metrics import ppl_change_percent
from fallow.common.progress import console, progress
from fallow.measure.evaluation import window_losses
from fallow.models.capture import Calibration, non_finite_error
from fallow.models.cuts import per_token_topk
from fallow.models.devices import tensor
from fallow.models.taps import Layer, attach
from fallow.reference.model import Model
from fallow.research.learned import (
    Learned,
    Network,
    Trained,
    arrays_of,
    initial,
    log_score,
    name_of,
)
from fallow.rules._base import check_sparsity
from fallow.selectors import Arrays, Seen, find
from fallow.selectors._base import watch

# Tokens per step: on SmolLM2's layer 15, of equal text, 256 leave 8.0 % of the energy to lose, 512
# 8.3 and 1024 8.8.
BATCH = 256
LEARNING_RATE, LAST_SHARE = 3e-3, 0.05  # falling to that share of it by a cosine
MOMENT_WINDOWS = 8  # for the start, as many as calibration takes
# A neuron counts by how far its score is from the threshold, over the token's mean distance: a
# wrong choice at the threshold costs nothing. Some would count a thousandfold. The same layer lost
# 7.6 % of the energy so, 8.6 % by plain cross-entropy, 9.9 % by regression of log-scores weighted
# around the threshold.
LARGEST_WEIGHT = 20.0


class Student:
    """One layer's network in training."""

    def __init__(
        self, layer: Layer, options: dict[str, int], moment: torch.Tensor, kept: float
    ) -> None:
        self.layer, self.options, self.kept = layer, options, kept
        network, self.basis = initial(layer, options, moment)
        self.parameters = network | {"slope": torch.tensor(1.0, device=layer.device)}
        for value in self.parameters.values():
            value.requires_grad_()
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=LEARNING_RATE)

    @property
    def network(self) -> Network:
        """As it reads x itself."""
        found = {name: self.parameters[name] for name in ("out", "noise")}
        return found | {"in": self.parameters["in"] @ self.basis.T}

    def learn(self, seen: Seen, learning_rate: float) -> None:
        """Steps over a window's tokens, BATCH at a time."""
        self.optimiser.param_groups[0]["lr"] = learning_rate
        threshold = per_token_topk(seen.out_norm, self.kept)
        parts = zip(
            *(v.split(BATCH) for v in (seen.x, seen.gate_act, seen.out_norm, threshold)),
            strict=True,
        )
        for x, gate_act, out_norm, cut in parts:
            score = log_score(self.network, self.layer, self.options, x, gate_act)
            loss = selection_loss(score, self.parameters["slope"], out_norm, cut)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()

    def state(self) -> dict[str, Any]:
        values = {name: value.detach() for name, value in self.parameters.items()}
        return {"parameters": values, "optimiser": self.optimiser.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state["parameters"][name])
        self.optimiser.load_state_dict(state["optimiser"])


def selection_loss(
    score: torch.Tensor, slope: torch.Tensor, out_norm: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of membership in the true top k, weighted by what a mistake costs.

    For the log of the predicted scores (T, d_ff), the true ones and each token's true threshold
    (T, 1). A token that has more zeros (ReLU) than the budget wants teaches nothing.
    """
    distance = (out_norm - threshold).abs()
    weight = distance / distance.mean(dim=1, keepdim=True).clamp_min(1e-30)
    logits = slope * (score - threshold.clamp_min(1e-30).log())
    return nn.functional.binary_cross_entropy_with_logits(
        logits, (out_norm > threshold).float(), weight=weight.clamp_max(LARGEST_WEIGHT)
    )


@dataclass
class Progress:
    """What a stopped training continues from: kept on disk beside the file to be."""

    windows: int  # read so far
    changes: list[float]  # held-out PPL change of every check, percent
    best: Arrays
    students: list[dict[str, Any]]

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        content = vars(self) | {
            "settings": settings,
            "best": {name: torch.from_numpy(array) for name, array in self.best.items()},
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> "Progress":
        """Raises FallowError for a damaged file, UsageError for one of another training."""
        try:
            check_sums(path)
            content = torch.load(path, weights_only=True, map_location="cpu")
            found = content.pop("settings")
            content["best"] = {name: value.numpy() for name, value in content["best"].items()}
            read = cls(**content)
        except (
            OSError, RuntimeError, EOFError, pickle.UnpicklingError,
            KeyError, TypeError, AttributeError, ValueError,
        ) as error:  # fmt: skip
            raise FallowError(f"{path} is damaged; delete it to train from the start") from error
        changed = [k for k, v in settings.items() if found.get(k) != v]
        if changed:
            raise UsageError(
                f"{path} is from a training with another {', '.join(changed)}; delete it or choose "
                "another --output"
            )
        return read


class Trainer:
    """Networks of all layers, the text they learn from, and the windows that judge them."""

    def __init__(
        self, model: Model, selector: type[Learned], calibrator: Calibrator, sparsity: float
    ) -> None:
        self.model, self.selector = model, selector
        self.calibrator, self.sparsity = calibrator, sparsity
        # First: it names a tensor that has NaN.
        self._dense = window_losses(model, calibrator.validation, None)
        sample = Calibration(model, calibrator.calibration.windows[:MOMENT_WINDOWS])
        self.students = [
            Student(layer, selector.options, tensor(moment, layer.device), 1 - sparsity)
            for layer, moment in zip(model.layers, sample.input_moments, strict=True)
        ]

    def arrays(self) -> Arrays:
        return arrays_of([student.network for student in self.students])

    def fit(self, arrays: Arrays) -> Learned:
        """The selector with these networks, at the sparsity that they are trained for."""
        self.calibrator.calibration.cache[self.selector.scores_key()] = arrays
        fitted = self.calibrator.fit(self.selector.name, sparsity=self.sparsity)
        assert isinstance(fitted, Learned)
        return fitted

    def ppl_change(self, arrays: Arrays) -> float:
        """On the held-out windows, percent, with the whole model in the loop."""
        losses = window_losses(self.model, self.calibrator.validation, self.fit(arrays))
        return ppl_change_percent(losses, self._dense)[0]

    def trained(self, arrays: Arrays) -> Trained:
        """What is written of these networks, judged on the held-out windows."""
        fitted, calibrator = self.fit(arrays), self.calibrator
        sparsity, increase, error = calibrator.measure(fitted)
        return Trained(
            selector=fitted.name,
            knob=fitted.knob,
            arrays=fitted.arrays,
            target_sparsity=self.sparsity,
            achieved_sparsity=sparsity,
            achieved_ppl_increase=increase,
            achieved_ppl_increase_se=error,
            **origin(self.model, calibrator.text, calibrator.calibration),
        )

    def read(self, number: int, total: int) -> None:
        """Learns from the number-th window of `total`: each pass has its own random order."""
        windows = self.calibrator.calibration.windows
        passes, place = divmod(number, len(windows))
        window = windows[np.random.default_rng(passes).permutation(len(windows))[place]]
        share = (1 + math.cos(math.pi * number / total)) / 2
        learning_rate = LEARNING_RATE * (LAST_SHARE + (1 - LAST_SHARE) * share)

        def learn(index: int, inter: torch.Tensor, seen: Seen) -> None:
            if not torch.isfinite(seen.out_norm).all():
                bad = int((~torch.isfinite(seen.out_norm)).sum())
                raise non_finite_error("inter", index, bad)
            with torch.inference_mode(False), torch.enable_grad():
                own = Seen(*(value.clone() for value in vars(seen).values()))
                self.students[index].learn(own, learning_rate)

        with attach(self.model.layers, watch(self.model.layers, learn)):
            self.model.hidden(window[None])


def check_request(
    rank: int, gate: bool, tokens: int, sparsity: float, checks: int, patience: int
) -> type[Learned]:
    """The selector to train. Raises UsageError for what needs no model to be seen wrong."""
    selector = find(name_of(f"rank={rank}:gate={int(gate)}"))
    assert issubclass(selector, Learned)
    check_sparsity(sparsity)
    for option, value in (("tokens", tokens), ("checks", checks), ("patience", patience)):
        if value < 1:
            raise UsageError(f"--{option} {value} is too few; give at least 1")
    return selector


def train(
    model: Model,
    output: str | Path,
    *,
    rank: int = 64,
    gate: bool = False,
    tokens: int = 300_000,
    sparsity: float = 0.5,
    text: str | Path | Text | None = None,
    context: int = 1024,
    validation_windows: int = 4,
    checks: int = 10,
    patience: int = 3,
) -> Trained:
    """Trains the networks of `learned` with rank=... and gate=..., and writes them to `output`.

    The PPL at `sparsity` on held-out windows is measured before training and `checks` times in its
    course; the best networks are kept, and after `patience` checks without a better one training
    ends. A text shorter than `tokens` is read again. What is known at a check is on disk: a
    training that was stopped continues there.

    Raises:
        FallowError: the text is too short, the model computes NaN, or a file is damaged.
        UsageError: a number out of range, or a stopped training of other settings.
    """
    output = Path(output)
    selector = check_request(rank, gate, tokens, sparsity, checks, patience)
    check_writable(output)
    check_context(context)
    source = load_text(text, "calibration")
    total = math.ceil(tokens / context)
    available = len(model.windows(source, context))
    calibrator = Calibrator(
        model,
        source,
        context=context,
        windows=max(1, min(total, available - validation_windows)),
        validation_windows=validation_windows,
    )
    settings = {
        "selector": selector.name,
        "fingerprint": model.fingerprint,
        "dtype": model.dtype_name,
        "text_sha256": source.sha256,
        "context": context,
        "tokens": tokens,
        "sparsity": sparsity,
        "validation_windows": validation_windows,
        "checks": checks,
    }
    trainer = Trainer(model, selector, calibrator, sparsity)
    best = _train(trainer, output.with_name(output.name + ".training"), settings, total, patience)
    trained = trainer.trained(best)
    trained.save(output)
    output.with_name(output.name + ".training").unlink(missing_ok=True)
    return trained


def _train(
    trainer: Trainer, path: Path, settings: dict[str, Any], total: int, patience: int
) -> Arrays:
    """The best arrays that `total` windows give, or those read before patience ends."""
    if path.exists():
        done = Progress.load(path, settings)
        for student, state in zip(trainer.students, done.students, strict=True):
            student.restore(state)
    else:
        done = Progress(0, [], {}, [])
        _check(trainer, done, path, settings)
    stops = np.unique(np.linspace(0, total, settings["checks"] + 1).round().astype(int))
    try:
        with progress(f"train {trainer.selector.name}", total) as ticker:
            ticker.advance(done.windows)
            for stop in stops[stops > done.windows]:
                if len(done.changes) - int(np.argmin(done.changes)) > patience:
                    break
                for number in range(done.windows, stop):
                    trainer.read(number, total)
                    ticker.advance()
                done.windows = int(stop)
                _check(trainer, done, path, settings)
    except KeyboardInterrupt:
        console.print(f"stopped; {path} has what is finished, the same command continues it")
        raise
    return done.best


def _check(trainer: Trainer, done: Progress, path: Path, settings: dict[str, Any]) -> None:
    arrays = trainer.arrays()
    change = trainer.ppl_change(arrays)
    if not done.changes or change < min(done.changes):
        done.best = arrays
    done.changes.append(change)
    done.students = [student.state() for student in trainer.students]
    done.save(path, settings)
    read = done.windows * settings["context"]
    console.print(
        f"{trainer.selector.name} after {read} tokens: PPL {change:+.2f} %", highlight=False
    )
