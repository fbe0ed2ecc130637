"""Teaches a model to do without its inactive neurons (docs/methods.md, "Adaptation").

The dense model is the teacher: the student, which runs under a rule's cuts and with its weights
rounded as the packed file will have them, learns the teacher's distribution of every next token
(arXiv:1503.02531 2). What comes out is an ordinary Hugging Face folder, dense to whoever does not
look into its `fallow.plan`, and `adapted.json`, which says how it was made.
"""

import copy
import math
import pickle
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fallow.adaptation import students, texts
from fallow.adaptation.budgets import BUDGETS, allocate, measured_at
from fallow.calibration.calibrator import Calibrator, check_request
from fallow.checkpoints.catalog import find_model
from fallow.checkpoints.text import Text, check_context, load_text, window_bos
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path, check_sums, claim, read_json, write_json
from fallow.common.metrics import ppl_change_percent
from fallow.common.progress import console, log, note, progress
from fallow.common.tables import Table, plus_minus
from fallow.models import REPLACEMENTS, replace_activation
from fallow.models.cuts import cut_taps, weight_of
from fallow.models.devices import as_array, device_named, has_bfloat16
from fallow.models.taps import Layer, Tap, attach
from fallow.packing.quantize import quant_type
from fallow.packing.source import ADAPTED_FILE, Source
from fallow.plan import Cut, Plan
from fallow.reference.model import Model, load
from fallow.reference.sparsified import export

BETAS, CLIP = (0.9, 0.95), 1.0
WARM_UP, LAST_RATE = 0.02, 0.05  # share of the steps; of the rate, at the end of the cosine
# The probe trains with each for a PROBE of the tokens and takes the best. 2e-4 spoilt
# Qwen2.5-Coder-0.5B, from which SmolLM2 at 3e-4 was still far.
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
PROBE, PROBE_STEPS = 0.01, 24
# A run ends when PATIENCE checks in a row are WORSE times as far from the teacher as the best was.
# No better than the best is no reason: SmolLM2 at 6e-4 had 0.152, 0.156, 0.154 and 0.152 nats while
# the rate was near its peak, at 4e-4 0.145 to 0.133 in a half of its tokens and 0.121 at the end.
CHECKS, PATIENCE, WORSE = 10, 3, 1.1
BUDGET_WINDOWS = 4
LADDER = 8  # sparsities on the way to the one asked for
SAVE_SECONDS, REPORT_SECONDS = 300.0, 30.0  # to save SmolLM2 writes 1.7 GB
MANY_EPOCHS = 7  # as often as any text in docs/results/adapt.md was read
# Tokens at once through the model and, of logits, through the head.
PART_TOKENS = {"cpu": 2048, "cuda": 16384}
HEAD_TOKENS = {"cpu": 512, "cuda": 4096}
DENSE_LOSS = 5.0  # percent of dense PPL from where a run says so


@dataclass(frozen=True)
class AdaptSettings:
    """An adaptation, as `fallow adapt` has it."""

    rule: str = "gate_topk"
    sparsity: float = 0.5
    tokens: int = 20_000_000
    minutes: float | None = None  # ends then, if not before; the schedule fits itself to that
    train: str = "layers"
    rank: int = 16  # of train "lora"
    quant: str | None = None  # None: a GGUF's own types, nothing for a folder
    learning_rate: float | None = None  # None: by a probe
    anneal: float = 0.0  # share of the training until the sparsity, or l1, is the one asked for
    activation: str | None = None  # in place of the model's own, one of REPLACEMENTS
    l1: float = 0.0  # nats for as large neurons as the dense model has
    sampled: float = 0.0  # share of tokens that the dense model writes
    budgets: str | None = None  # of layers, one of BUDGETS; None: measured, if the rule has such
    context: int = 512
    batch: int = 32  # windows per step
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        return self.batch * self.context

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / self.step_tokens))

    def check(self) -> None:
        """Raises UsageError for what needs no model to be seen wrong."""
        check_request(self.rule, self.sparsity, None, None)
        check_context(self.context)
        for name in ("tokens", "batch", "rank", "minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
        self._check_zeros()
        for name in ("anneal", "sampled"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} {getattr(self, name)} is outside 0 to 1")
        if self.train not in students.TRAINED:
            known = ", ".join(students.TRAINED)
            raise UsageError(f"unknown --train {self.train!r}; known: {known}")
        if self.budgets is not None and self.budgets not in BUDGETS:
            raise UsageError(f"unknown --budgets {self.budgets!r}; known: {', '.join(BUDGETS)}")
        if self.quant is not None:
            quant_type(self.quant)

    def _check_zeros(self) -> None:
        if self.activation is not None and self.activation not in REPLACEMENTS:
            known = ", ".join(REPLACEMENTS)
            raise UsageError(f"unknown --activation {self.activation!r}; known: {known}")
        if self.activation is not None and (self.rule, self.sparsity) != ("relu", 0):
            raise UsageError(
                f"--activation {self.activation} makes zeros, which need no rule that chooses; "
                "leave out --rule and --sparsity"
            )
        if not (math.isfinite(self.l1) and self.l1 >= 0):
            raise UsageError(f"--l1 {self.l1} is not 0 or more")
        if self.l1 and self.rule != "relu":
            raise UsageError(
                "--l1 makes more zeros of a ReLU; give --activation relu as well, or --rule relu "
                "--sparsity 0 to a model that has one"
            )


@dataclass
class Check:
    """The student on the held-out windows, after some tokens."""

    tokens: int
    seconds: float  # of training
    kl: float  # to the teacher, under the rule; nats per token
    ppl_change_percent: float  # under the rule, against the teacher
    ppl_change_se: float | None  # paired
    dense_ppl_change_percent: float  # without the rule, against the teacher
    sparsity: float | None = None  # share of `inter` that is zero under the rule, mean of layers
    l1: float = 0.0  # what AdaptSettings.l1 adds; nats

    @property
    def loss(self) -> float:
        return self.kl + self.l1


@dataclass(repr=False)
class AdaptReport:
    """What an adaptation gave, and how."""

    path: str
    model: str
    fingerprint: str  # of the model that was adapted
    settings: dict[str, Any]
    learning_rate: float
    texts: list[dict[str, Any]]
    checks: list[Check]
    best: Check
    tokens: int
    tokens_per_second: float
    device: str
    types: dict[str, str] = field(repr=False)  # weights' types that training rounded to

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_table(self) -> Table:
        """The checks, a row each."""
        return Table(asdict(check) for check in self.checks)

    def to_frame(self) -> Any:
        """The checks as a pandas DataFrame. Raises FallowError if pandas is not installed."""
        return self.to_table().to_frame()

    def _repr_html_(self) -> str:
        return self.to_table()._repr_html_()

    def __repr__(self) -> str:
        change = plus_minus(self.best.ppl_change_percent, self.best.ppl_change_se, sign="+")
        return (
            f"<AdaptReport of {self.model} in {self.path}: {self.settings['rule']} at "
            f"{self.settings['sparsity']:.0%}, {self.tokens} tokens, {change} % PPL held out>"
        )


def adapt(
    model: str | Path,
    folder: str | Path,
    settings: AdaptSettings,
    *,
    text: Sequence[str | Path | Text] = (),
    shares: Sequence[float] = (),
    device: str = "auto",
) -> AdaptReport:
    """Adapts a model and writes it as a Hugging Face folder; goes on where a stopped run was.

    Args:
        text: files to train on; none: the calibration half of the default text.
        shares: of the tokens, one for each text; none: by length.
        device: "cpu", "cuda", or "auto", a GPU if there is one.

    Raises:
        UsageError: settings that do not fit together, or a GPU that is not there.
        FallowError: the folder is there, the text is too short, a stopped run of other settings,
            or the loss is NaN.
    """
    settings.check()
    texts.check_shares(shares, len(text))
    folder = Path(folder)
    if folder.exists():
        raise FallowError(f"{folder} is there already; choose another --output")
    work = folder.with_name(folder.name + ".adapting")
    work.mkdir(parents=True, exist_ok=True)
    device = device_named(device)
    run = _Run(load(model, "float32", "cpu"), model, work, settings, text, shares, device)
    run.prepare()
    run.finish()
    return run.write(folder)


class _Run:
    """One adaptation between its first and its last step."""

    def __init__(
        self,
        model: Model,
        name: str | Path,
        work: Path,
        settings: AdaptSettings,
        text: Sequence[str | Path | Text],
        shares: Sequence[float],
        device: str,
    ) -> None:
        model.layers[0].one_ffn()  # or it is refused
        self.model, self.work, self.settings, self.device = model, work, settings, device
        self.source = find_model(str(name))
        if (self.source / ADAPTED_FILE).is_file():
            note(f"{name} was adapted already: what it learns from is itself, not its source")
        self.types = _types(model, str(name), settings.quant)
        read = [load_text(t, "calibration") for t in text or (None,)]
        windows = [model.windows(t, settings.context) for t in read]
        bos = window_bos(model.tokenizer)
        self.mixture = texts.mix(read, windows, shares, settings.seed, bos)
        self.plans = self._ladder(read[0])
        self.half = has_bfloat16(device)
        self.learning_rate = settings.learning_rate or 0.0
        self.step, self.seconds = 0, 0.0
        self.checks: list[Check] = []
        self.best: dict[str, torch.Tensor] = {}

    def _ladder(self, text: Text) -> list[Plan]:
        """The rule's plans on the way to the sparsity, fitted to the dense model."""
        settings = self.settings
        calibrator = Calibrator(self.model, text, context=settings.context, validation_windows=1)
        n = LADDER if settings.anneal and settings.sparsity else 1
        targets = [settings.sparsity * (i + 1) / n for i in range(n)]
        plans = [calibrator.plan(settings.rule, sparsity=t, measure=False) for t in targets]
        return [
            replace(p, cuts=tuple(_frozen(cut, self.model.layers) for cut in p.cuts)) for p in plans
        ]

    def prepare(self) -> None:
        """Makes teacher and student, samples text, finds the rate, or restores a stopped run."""
        self._claim()
        self.teacher = copy.deepcopy(self.model.module).to(self.device)
        head = self.model.module.get_output_embeddings()
        self.head_weight = head.weight.detach().float().to(self.device)
        self.head_bias = None if head.bias is None else head.bias.detach().float().to(self.device)
        self._find_budgets()
        self._sample()
        self._say_what_is_read()
        with torch.no_grad():
            windows = [self._ids(window[None]) for window in self.mixture.held_out]
            layers = self.model.architecture.find_layers(self.teacher)
            sizes = _Sizes(len(layers))
            with attach(layers, {"inter": sizes.add}):
                self.held_out = [(ids, self._exact(self.teacher, ids)) for ids in windows]
            self.usual = sizes.mean / len(windows)  # |inter| of each layer, (L,)
            losses = [
                float(nn.functional.nll_loss(self._log_p(wanted), ids[0, 1:]))
                for ids, wanted in self.held_out
            ]
        self.teacher_losses = np.array(losses)
        if self.half:  # what `_in_half` would make of these weights again for every part of a step
            for layer in self.model.architecture.find_layers(self.teacher):
                for projection in layer.projections.values():
                    projection.bfloat16()
        if not self.learning_rate:
            self.learning_rate = self._find_rate()
        self._begin(self.learning_rate, self.settings.steps)
        self._restore()

    def _claim(self) -> None:
        """Raises FallowError if the folder is of another run."""
        of_run = {"fingerprint": self.model.fingerprint, "texts": self.mixture.metadata}
        claim(self.work / "settings.json", asdict(self.settings) | of_run, "stopped run")

    @torch.no_grad()
    def _find_budgets(self) -> None:
        """Gives layers of the plans' cuts shares of their own, if it shall.

        Raises:
            UsageError: it shall, and the rule does not leave out a share of every token's neurons.
        """
        settings = self.settings
        kept = 1 - settings.sparsity
        has_shares = all(
            cut.kind == "topk" and np.allclose(cut.value, kept) for cut in self.plans[-1].cuts
        )
        wanted = settings.budgets or ("measured" if has_shares and settings.sparsity else "even")
        if wanted == "even":
            return
        if not (has_shares and settings.sparsity):
            raise UsageError(
                f"--budgets measured: {settings.rule} at {settings.sparsity:.0%} does not keep one "
                "share of every layer, which could be divided anew; give --budgets even"
            )
        path = self.work / "budgets.json"
        if not path.exists():
            windows = replace(self.mixture, read=[0] * len(self.mixture.sources)).batch(
                BUDGET_WINDOWS
            )
            costs = self._costs_of_layers([self._ids(window[None]) for window in windows])
            write_json(path, {"left_out": allocate(costs, settings.sparsity).tolist()})
        shares = np.array(read_json(path, f"delete {self.work} to begin again")["left_out"])
        console.print(f"left out of each layer: {shares.min():.2f} to {shares.max():.2f}")
        self.plans = [
            replace(
                plan, cuts=tuple(_with_budgets(c, shares / settings.sparsity) for c in plan.cuts)
            )
            for plan in self.plans
        ]

    def _costs_of_layers(self, windows: list[torch.Tensor]) -> np.ndarray:
        """KL of the teacher with one layer cut to itself, (L, 3), nats per token."""
        layers = self.model.architecture.find_layers(self.teacher)
        wanted = [self._log_p(self._exact(self.teacher, ids)) for ids in windows]
        costs, levels = [], measured_at(self.settings.sparsity)
        with progress("budgets", len(levels) * len(layers)) as ticker:
            for share in levels:
                value = np.full(len(layers), 1 - share)
                cuts = [replace(cut, value=value) for cut in self.plans[-1].cuts]
                taps = self._taps(cuts, layers)
                for index, layer in enumerate(layers):
                    alone = {name: partial(_as_layer, tap, index) for name, tap in taps.items()}
                    with attach([layer], alone):
                        found = [self._log_p(self._exact(self.teacher, ids)) for ids in windows]
                    pairs = zip(wanted, found, strict=True)
                    costs.append(np.mean([float(divergence(p, q).mean()) for p, q in pairs]))
                    ticker.advance()
        return np.reshape(costs, (-1, len(layers))).T

    def _sample(self) -> None:
        settings = self.settings
        if not settings.sampled:
            return
        windows = settings.steps * settings.batch * settings.sampled / texts.SAMPLED_EPOCHS
        writer = copy.deepcopy(self.teacher).bfloat16() if self.half else self.teacher
        written = texts.sample(writer, self.mixture, math.ceil(windows), self.work)
        texts.add_sampled(
            self.mixture, written, settings.sampled, self.model.name, self.model.fingerprint
        )

    def _say_what_is_read(self) -> None:
        epochs = self.mixture.epochs(self.settings.steps * self.settings.batch)
        for source, count in zip(self.mixture.sources, epochs, strict=True):
            console.print(
                f"{source.name}: {source.share:.0%} of the tokens, read {count:.1f} times",
                highlight=False,
            )
        if max(epochs) > MANY_EPOCHS:
            note(
                f"a text is read {max(epochs):.0f} times; in runs whose results are kept none "
                f"was read more than {MANY_EPOCHS} times; give more text, or fewer --tokens"
            )

    # The student ---------------------------------------------------------------------------------

    def _begin(self, rate: float, steps: int) -> None:
        """A student at its start, and its optimiser."""
        self.student = copy.deepcopy(self.model.module).to(self.device).train()
        if self.settings.activation:
            replace_activation(self.model.architecture, self.student, self.settings.activation)
        self.layers = self.model.architecture.find_layers(self.student)
        self.taps = [self._taps(plan.cuts, self.layers) for plan in self.plans]
        s = self.settings
        self.parameters = students.prepare(self.student, self.layers, s.train, s.rank, self.types)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        self.rate, self.steps = rate, steps

    def _taps(self, cuts: Sequence[Cut], layers: list[Layer]) -> dict[str, Tap]:
        taps = cut_taps(cuts, layers, self.model.name)
        if self.device == "cuda" and find_spec("triton"):
            from fallow.adaptation.topk import topk_taps

            taps |= topk_taps(cuts, layers)
        return taps

    @property
    def share(self) -> float:
        """How much of the training is done, [0, 1]: of its tokens, or of its time."""
        minutes = self.settings.minutes
        spent = self.seconds / 60 / minutes if minutes else 0.0
        return min(1.0, max(self.step / self.steps, spent))

    def rung(self) -> dict[str, Tap]:
        """The taps of the plan that it is trained under now."""
        anneal, last = self.settings.anneal, len(self.taps) - 1
        return self.taps[last if not anneal else min(last, int(self.share / anneal * (last + 1)))]

    def train_step(self, windows: np.ndarray) -> float:
        """One step over windows (n, context); the mean KL to the teacher before it, nats/token."""
        warm, share = WARM_UP, self.share
        cosine = (1 + math.cos(math.pi * share)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * (LAST_RATE + (1 - LAST_RATE) * cosine)
            group["lr"] *= min(1.0, (self.step + 1) / max(1, warm * self.steps))
        self.optimiser.zero_grad()
        rows = max(1, PART_TOKENS[self.device] // windows.shape[1])
        total = torch.zeros((), device=self.device)
        sized = {"inter": self._add_l1} if self.settings.l1 else {}
        with attach(self.layers, self.rung()), attach(self.layers, sized):
            for part in np.split(windows, range(rows, len(windows), rows)):
                total += self._learn(self._ids(part), windows.size)
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimiser.step()
        students.renew_rounding(self.student)
        self.step += 1
        return float(total)

    def _learn(self, ids: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Adds the gradient of the KL of windows (n, context), a part of a step of n_tokens."""
        with torch.no_grad():
            wanted = self._hidden(self.teacher, ids)
        self.l1 = torch.zeros((), device=self.device)
        hidden = self._hidden(self.student, ids)
        # The head's logits are made part by part, and each part's gradient at once: together they
        # would be 3 GB of SmolLM2's 16,384 tokens.
        leaf = hidden.detach().requires_grad_()
        total = torch.zeros((), device=self.device)
        size = HEAD_TOKENS[self.device]
        flat = zip(leaf.flatten(0, 1).split(size), wanted.flatten(0, 1).split(size), strict=True)
        for mine, teachers in flat:
            loss = self._divergence(mine, teachers).sum() / n_tokens
            loss.backward()
            total += loss.detach()
        if not self.settings.l1:
            hidden.backward(leaf.grad)
            return total
        l1 = self.l1 * (self._l1_now() * ids.numel() / n_tokens)
        torch.autograd.backward([hidden, l1], [leaf.grad, None])
        return total

    def _l1_of(self, mean: np.ndarray) -> float:
        """What the whole l1 adds for layers' mean |inter|, (L,); nats."""
        return self.settings.l1 * float((mean / self.usual).mean()) if self.settings.l1 else 0.0

    def _l1_now(self) -> float:
        anneal = self.settings.anneal
        return self.settings.l1 * (min(1.0, self.share / anneal) if anneal else 1.0)

    def _add_l1(self, index: int, value: torch.Tensor) -> None:
        """Of `inter` (T, d_ff) of a layer: its mean size over that of the dense model's."""
        self.l1 = self.l1 + value.float().abs().mean() / (self.usual[index] * len(self.layers))

    def _ids(self, windows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(windows)).to(self.device)

    def _hidden(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states (n, context, d_model), float32."""
        with self._in_half():
            return module.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()

    def _in_half(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary), float32."""
        products = nn.functional.linear(hidden, self.head_weight, self.head_bias)
        return self.model.logits_of_products(products.float())

    def _log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (T, vocabulary), float32."""
        return self._logits(hidden).log_softmax(dim=-1)

    def _divergence(self, hidden: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) of each token (T,), nats, of final hidden states (T, d_model)."""
        with self._in_half():
            with torch.no_grad():
                wanted = self._log_p(teachers)
            return divergence(wanted, self._log_p(hidden))

    # Judging -------------------------------------------------------------------------------------

    def _exact(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states (T - 1, d_model) of a window (1, T), that predict; in float32."""
        hidden = module.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0, :-1].float()

    @torch.no_grad()
    def _judge(
        self, taps: dict[str, Tap], sizes: "_Sizes | None" = None
    ) -> tuple[float, np.ndarray]:
        """The student's KL to the teacher, and losses (n,) of held-out windows; nats per token."""
        kl, losses, module = [], [], self.student
        sized = {"inter": sizes.add} if sizes else {}  # what the taps leave
        with attach(self.layers, taps), attach(self.layers, sized):
            for ids, wanted in self.held_out:
                log_q = self._log_p(self._exact(module, ids))
                kl.append(float(divergence(self._log_p(wanted), log_q).mean()))
                losses.append(float(nn.functional.nll_loss(log_q, ids[0, 1:])))
        return float(np.mean(kl)), np.array(losses)

    def check(self) -> Check:
        """The student as it is, under the whole rule."""
        self.student.eval()
        sizes, n = _Sizes(len(self.layers)), len(self.held_out)
        kl, losses = self._judge(self.taps[-1], sizes)
        _, dense = self._judge({})
        self.student.train()
        change, error = ppl_change_percent(losses, self.teacher_losses)
        return Check(
            tokens=self.step * self.settings.step_tokens,
            seconds=self.seconds,
            kl=kl,
            ppl_change_percent=change,
            ppl_change_se=error,
            dense_ppl_change_percent=ppl_change_percent(dense, self.teacher_losses)[0],
            sparsity=float((sizes.zeros / n).mean()),
            l1=self._l1_of(sizes.mean / n),
        )

    def _find_rate(self) -> float:
        """Of RATES the one that a short training ends best with. Raises FallowError if none does.

        Every one reads the same windows.
        """
        path = self.work / "rate.json"
        if path.exists():
            return float(read_json(path, f"delete {self.work} to begin again")["learning_rate"])
        steps = min(self.settings.steps, max(PROBE_STEPS, round(PROBE * self.settings.steps)))
        found = {}
        for rate in RATES:
            mixture = replace(self.mixture, read=[0] * len(self.mixture.sources))
            self._begin(rate, steps)
            self.step, self.seconds = 0, 0.0
            while self.step < steps:
                self.train_step(mixture.batch(self.settings.batch))
            found[rate] = self.check().loss
            console.print(f"rate {rate:g}: {found[rate]:.4f} nats", highlight=False)
        self.step, self.seconds = 0, 0.0
        finite = {rate: kl for rate, kl in found.items() if math.isfinite(kl)}
        if not finite:
            raise FallowError(
                f"every learning rate of {', '.join(f'{r:g}' for r in RATES)} gives NaN; check the "
                "checkpoint, or give --learning-rate"
            )
        best = min(finite, key=finite.__getitem__)
        write_json(path, {"learning_rate": best, "kl": {f"{r:g}": kl for r, kl in found.items()}})
        return best

    # From step to step ---------------------------------------------------------------------------

    def finish(self) -> None:
        """The steps that are left, with a check at every tenth of them."""
        if not self.checks:
            self._keep(self.check())
        saved = reported = began = time.monotonic()
        first = self.step
        next_check = len(self.checks) / CHECKS
        while self.share < 1 and not (self.share > self.settings.anneal and is_worse(self.checks)):
            started = time.monotonic()
            kl = self.train_step(self.mixture.batch(self.settings.batch))
            if not math.isfinite(kl):
                raise FallowError(
                    f"the KL is {kl} after {self.step * self.settings.step_tokens} tokens; delete "
                    f"{self.work} and give a lower --learning-rate"
                )
            log("adapt", self.step, {"kl": kl})
            now = time.monotonic()
            self.seconds += now - started
            if self.share >= next_check or self.share >= 1:
                self._keep(self.check())
                next_check = len(self.checks) / CHECKS
            if now - saved > SAVE_SECONDS:
                self._save()
                saved = now
            if now - reported > REPORT_SECONDS or self.step == first + 1:
                self._say(kl, (self.step - first) / (now - began))
                reported = now

    def _say(self, kl: float, steps_per_second: float) -> None:
        tokens = self.settings.step_tokens
        left = (1 - self.share) / max(self.share, 1e-9) * self.seconds
        console.print(
            f"{self.step * tokens / 1e6:.2f} M tokens: {kl:.4f} nats, "
            f"{steps_per_second * tokens:.0f} tokens/s, {left / 60:.0f} min left",
            highlight=False,
        )

    def _keep(self, found: Check) -> None:
        """A check, whose student is kept if it is the best so far."""
        if not self.checks or found.loss < min(c.loss for c in self.checks):
            self.best = self._trained()
        self.checks.append(found)
        log("adapt", self.step, {f"held_out_{name}": v for name, v in asdict(found).items()})
        console.print(
            f"{found.tokens / 1e6:.2f} M tokens, held-out: {found.kl:.4f} nats, PPL "
            f"{found.ppl_change_percent:+.2f} % (dense {found.dense_ppl_change_percent:+.2f} %), "
            f"{found.sparsity:.0%} of neurons zero",
            highlight=False,
        )
        if found.dense_ppl_change_percent > DENSE_LOSS and not self.settings.activation:
            note(
                f"without the rule the PPL is {found.dense_ppl_change_percent:.1f} % above the "
                "dense model's: it forgets; a lower --learning-rate forgets less"
            )

    def _trained(self) -> dict[str, torch.Tensor]:
        return {
            name: p.detach().cpu().clone()
            for name, p in self.student.named_parameters()
            if p.requires_grad
        }

    def _save(self) -> None:
        state = {
            "trained": self._trained(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "step": self.step,
            "seconds": self.seconds,
            "checks": [asdict(c) for c in self.checks],
            "read": self.mixture.read,
        }
        with atomic_path(self.work / "state.pt") as temporary:
            torch.save(state, temporary)

    def _restore(self) -> None:
        """Raises FallowError if the state is damaged."""
        path = self.work / "state.pt"
        if not path.exists():
            return
        try:
            check_sums(path)
            state = torch.load(path, weights_only=True, map_location="cpu")
            self._fill(state["trained"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.best, self.mixture.read = state["best"], state["read"]
            self.step, self.seconds = state["step"], state["seconds"]
            self.checks = [Check(**c) for c in state["checks"]]
        except (
            OSError, RuntimeError, EOFError, pickle.UnpicklingError,
            KeyError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise FallowError(f"{path} is damaged; delete {self.work} to begin again") from error
        console.print(f"goes on after {self.step} steps", highlight=False)

    def _fill(self, trained: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.student.named_parameters())
        with torch.no_grad():
            for name, values in trained.items():
                parameters[name].copy_(values)
        students.renew_rounding(self.student)

    # The result ----------------------------------------------------------------------------------

    def write(self, folder: Path) -> AdaptReport:
        """The best student as a Hugging Face folder with its plan; the work folder goes."""
        self._fill(self.best)
        best = min(self.checks, key=lambda c: c.loss)
        students.finish(self.student)
        kind = torch.float32 if self.device == "cpu" and not self.half else torch.bfloat16
        self.model.module = self.student.to("cpu", kind).eval().requires_grad_(False)
        self.model.layers = self.model.architecture.find_layers(self.model.module)
        report = AdaptReport(
            path=str(folder),
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            settings=asdict(self.settings),
            learning_rate=self.learning_rate,
            texts=self.mixture.metadata,
            checks=self.checks,
            best=best,
            tokens=self.step * self.settings.step_tokens,
            tokens_per_second=self.step * self.settings.step_tokens / max(self.seconds, 1e-9),
            device=self.device,
            types=self.types,
        )
        made = self.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        export(self.model, self.plans[-1], made, self.source)
        write_json(made / ADAPTED_FILE, report.to_json())
        made.replace(folder)
        shutil.rmtree(self.work)
        return report


class _Sizes:
    """Of `inter` of passes, by layer: mean |value| and share of zeros, (L,) each, added up."""

    def __init__(self, n_layers: int) -> None:
        self.mean, self.zeros = np.zeros(n_layers), np.zeros(n_layers)

    def add(self, index: int, value: torch.Tensor) -> None:
        self.mean[index] += float(value.float().abs().mean())
        self.zeros[index] += float((value == 0).float().mean())


def report_of(folder: Path) -> AdaptReport:
    """What an adaptation said of the folder that it wrote.

    Raises:
        FallowError: the folder has no such report, or a damaged one.
    """
    path, remedy = folder / ADAPTED_FILE, "remove the folder and adapt the model again"
    try:
        said = read_json(path, remedy) if path.is_file() else {}
        checks = [Check(**c) for c in said["checks"]]
        return AdaptReport(**said | {"checks": checks, "best": Check(**said["best"])})
    except (KeyError, TypeError) as error:
        raise FallowError(f"{path} is no report of fallow adapt; {remedy}") from error


def is_worse(checks: Sequence[Check]) -> bool:
    """Whether the last PATIENCE checks were all much worse than the best of those before them."""
    before, last = checks[:-PATIENCE], checks[-PATIENCE:]
    return bool(before) and min(c.loss for c in last) > WORSE * min(c.loss for c in before)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each token (T,), nats, of log-probabilities (T, vocabulary)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _as_layer(tap: Tap, index: int, _: int, value: torch.Tensor) -> torch.Tensor | None:
    """What a tap gives for the layer of that index, whichever it is attached to."""
    return tap(index, value)


def _with_budgets(cut: Cut, factors: np.ndarray) -> Cut:
    """The cut with as many times its share left out of each layer."""
    return replace(cut, value=1 - (1 - cut.value) * factors)


def _frozen(cut: Cut, layers: list[Layer]) -> Cut:
    """The cut with the norms of the dense model's columns: training must not move them."""
    if not isinstance(cut.weight, str):
        return cut
    found = [weight_of(cut, i, layer) for i, layer in enumerate(layers)]
    return replace(cut, weight=[as_array(norm).ravel() for norm in found if norm is not None])


def _types(model: Model, name: str, quant: str | None) -> dict[str, str]:
    """What weights are stored as, by their names, when the model is packed; {}: not stated.

    A GGUF's down_proj becomes what `fallow pack` tries first, since rows of neurons are rounded.
    """
    if quant is None and find_model(name).is_dir():
        return {}
    source = Source(model, name)
    types = source.stored_types()
    down = quant_type(quant or source.down_types(None, None)[0])
    names = {id(part): f"{name}.weight" for name, part in model.module.named_modules()}
    for layer in model.layers:
        types[names[id(layer.down_proj)]] = down
        if quant is not None:
            types |= {names[id(part)]: down for part in layer.projections.values()}
    return types
