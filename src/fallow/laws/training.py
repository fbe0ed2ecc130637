"""Trains small LLaMA-like models to see how sparse they become (arXiv:2411.02335 5.1, App. I).

The folder that a training leaves is a Hugging Face model, so that every other command works on it:

    config.json, model.safetensors, tokenizer.json    the trained model
    curve.json               what `fallow law fit` reads; a point per checkpoint, docs/laws.md
    checkpoints/<tokens>/    the like after so many tokens, with its profile and cett.plan
    training.json            settings
    state.pt                 what a stopped training goes on from

CETT-PPL-1 %, the published activation ratio, is that at one CETT, found jointly on the last five
checkpoints and applied to all (4.2, App. E-F): it is measured when the last of them is there.
Until then each checkpoint is measured at a CETT of its own, which falls as a model learns.

The learning rate warms up, stays, and decays (WSD). As the published curves do, this one ends
before the decay.
"""

import hashlib
import math
import pickle
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fallow.calibration.calibrator import Calibrator, search_jointly
from fallow.checkpoints.text import Text, load_text
from fallow.checkpoints.tokenizer import usable
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import (
    atomic_folder,
    atomic_path,
    check_sums,
    check_writable,
    claim,
    fits,
    read_array,
    read_json,
    write_json,
    write_text,
)
from fallow.common.metrics import ppl_change_percent, window_error
from fallow.common.progress import console, log
from fallow.laws.curves import RATIO, TOKENS
from fallow.measure.evaluation import run_window, window_losses
from fallow.measure.profiling import DEAD, profile
from fallow.models.devices import device_named, has_bfloat16
from fallow.plan import Plan
from fallow.reference.model import (
    Model,
    keep_freed_memory,
    load,
    quieten_transformers,
    use_fastest_float32,
)
from fallow.rules.cett import Cett

ACTIVATIONS = ("relu", "silu")
WARM_UP, DECAY = 0.02, 0.1  # shares of the steps
LAST_RATE = 0.1  # of the learning rate, at the end of the decay
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
HELD_OUT = 0.02  # of the text, its last paragraphs; more of a short one
CHARACTERS_PER_TOKEN = 6  # at most, of small vocabularies
FIRST_CHECKPOINT = 1 / 50  # of the tokens
PPL_INCREASE = 1.0  # percent: CETT-PPL-1 %
METRIC = "CETT-PPL-1 %, jointly"
JOINT = 5  # last checkpoints that CETT is searched on
# Of the held-out text: thresholds are fitted on the first, CETT is searched on the next, and what
# is reported is measured on the last.
FIT_WINDOWS, SEARCH_WINDOWS, JUDGE_WINDOWS = 32, 32, 32
SAVE_SECONDS = 120.0  # between states
REPORT_SECONDS = 30.0
TOKENIZER_CHARACTERS = 10_000_000  # of the text that the tokenizer is trained on
END = "<|endoftext|>"
OWN_RATIO = f"own_cett_{RATIO}"
LISTS = (RATIO, OWN_RATIO)  # of a curve, besides its tokens
_FINAL = ".final"  # a folder of the final model, until it is whole


@dataclass(frozen=True)
class Settings:
    """A training. Non-embedding parameters: layers (4 d² + 3 d d_ff), d = hidden_size."""

    activation: str = "relu"
    hidden_size: int = 192
    layers: int = 5
    intermediate_size: int = 480
    head_size: int = 64
    vocabulary: int = 2048
    tokens: int = 40_000_000
    context: int = 256
    batch: int = 32  # windows
    learning_rate: float = 3e-3
    checkpoints: int = 12
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def step_tokens(self) -> int:
        return self.batch * self.context

    @property
    def all_tokens(self) -> int:
        """Those of whole steps."""
        return self.steps * self.step_tokens

    @property
    def stable_steps(self) -> int:
        """Steps before the decay."""
        return max(1, round((1 - DECAY) * self.steps))

    def check(self) -> None:
        """Raises UsageError for what cannot be trained."""
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}"
            )
        for name, value in asdict(self).items():
            option = f"--{name.replace('_', '-')}"
            if not isinstance(value, str) and not (value > 0 or (value == 0 and name == "seed")):
                raise UsageError(f"{option} {value} is too small")
            if value == math.inf:
                raise UsageError(f"{option} {value} is too large")
        if self.hidden_size % self.head_size:
            raise UsageError(
                f"--hidden-size {self.hidden_size} is no multiple of heads of {self.head_size}"
            )
        if not 260 <= self.vocabulary <= 65536:
            raise UsageError(f"--vocabulary {self.vocabulary} is outside 260 to 65536")

    def checkpoint_steps(self) -> list[int]:
        """Log-spaced, up to the last step before the decay."""
        last = self.stable_steps
        first = max(1, round(FIRST_CHECKPOINT * last))
        return sorted({round(s) for s in np.geomspace(first, last, self.checkpoints)})

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        left = (self.steps - step) / max(1, self.steps - self.stable_steps)
        return self.learning_rate * (LAST_RATE + (1 - LAST_RATE) * min(1.0, left))


@dataclass
class TrainReport:
    """What a training gave."""

    path: str
    curve: str
    parameters: int
    non_embedding_parameters: int
    tokens: int
    epochs: float
    validation_loss: float
    activation_ratio: float  # of the final model, behind the decay, at CETT-PPL-1 %
    activation_ratio_se: float  # over windows
    cett: float  # the one of all checkpoints
    sha256: str  # of model.safetensors

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    folder: str | Path, text: str | Path | Text, settings: Settings, device: str = "auto"
) -> TrainReport:
    """Trains a model and measures it at every checkpoint; goes on where a stopped run was.

    Args:
        device: "cpu", "cuda", or "auto", a GPU if there is one.

    Raises:
        UsageError: settings that do not fit together, or a GPU that is not there.
        FallowError: the text is too short, the folder is of another training, or the loss is NaN:
            the last good state stays.
    """
    settings.check()
    device = device_named(device)
    use_fastest_float32()
    keep_freed_memory()
    quieten_transformers()
    folder = Path(folder)
    check_writable(folder / "training.json")
    source = load_text(text, "calibration")
    # Folders of older versions, whose curves are of each checkpoint's own CETT, say no metric.
    of_run = asdict(settings) | {"text_sha256": source.sha256, "metric": METRIC}
    claim(folder / "training.json", of_run, "training")
    run = _Run(folder, settings, prepare(folder, source, settings), device)
    if not (folder / "model.safetensors").exists():
        run.restore()
        run.finish()
    run.clear()
    return run.report()


# Text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Token ids to train on, (n,) uint16, and text that is held out."""

    ids: np.ndarray
    held_out: Text
    windows: int  # of context tokens and the one behind

    def batch(self, settings: Settings, step: int) -> np.ndarray:
        """Windows (batch, context + 1) int64: every epoch has its own order."""
        numbers = np.arange(step * settings.batch, (step + 1) * settings.batch)
        rows = []
        for number in numbers:
            epoch, place = divmod(int(number), self.windows)
            start = int(_order(settings.seed, epoch, self.windows)[place]) * settings.context
            rows.append(self.ids[start : start + settings.context + 1])
        return np.stack(rows).astype(np.int64)


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def prepare(folder: Path, source: Text, settings: Settings) -> Corpus:
    """The text's tokens, cached in the folder, by a tokenizer that is trained on the same text.

    Raises:
        FallowError: the text is too short.
    """
    length = len(source.content)
    judged = _held_out_windows() * settings.context * CHARACTERS_PER_TOKEN
    cut = source.content.find("\n", length - max(round(HELD_OUT * length), judged))
    if judged > length / 2 or cut < 0:
        raise FallowError(
            f"text {source.name} has {length} characters; {judged} are held out to judge by, so "
            f"give one of {4 * judged} at least"
        )
    parts = source.content[:cut], source.content[cut + 1 :]
    tokenizer = _tokenizer(folder / "tokenizer.json", parts[0], settings.vocabulary)
    path = folder / "tokens.npy"
    if not path.exists():
        console.print("tokenising", highlight=False)
        # In pieces: the tokenizer keeps much more per character than the ids.
        lines = parts[0].split("\n")
        pieces = ["\n".join(lines[i : i + 1000]) + "\n" for i in range(0, len(lines), 1000)]
        encoded = [np.array(tokenizer.encode(piece).ids, dtype=np.uint16) for piece in pieces]
        with atomic_path(path) as temporary:
            np.save(temporary, np.concatenate(encoded))
    remedy = f"delete {folder} to begin again"
    ids = read_array(path, remedy)
    if ids.dtype != np.uint16 or ids.ndim != 1 or (len(ids) and ids.max() >= settings.vocabulary):
        raise FallowError(f"{path} has no ids of this vocabulary; {remedy}")
    windows = (len(ids) - 1) // settings.context
    if windows < settings.batch:
        raise FallowError(
            f"text {source.name} has {len(ids)} tokens, less than a step of {settings.batch} "
            f"windows of {settings.context}; give a longer --text"
        )
    return Corpus(ids, Text(f"{source.name}, its end", parts[1]), windows)


def _tokenizer(path: Path, text: str, vocabulary: int) -> Any:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if path.exists():
        with usable(str(path)):
            return Tokenizer.from_file(str(path))
    console.print("training the tokenizer", highlight=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text[:TOKENIZER_CHARACTERS].split("\n"), trainer)
    write_text(path, tokenizer.to_str())
    return tokenizer


# The run -----------------------------------------------------------------------------------------


class _Run:
    """A training between its first and its last step."""

    def __init__(self, folder: Path, settings: Settings, corpus: Corpus, device: str) -> None:
        self.folder, self.settings, self.corpus, self.device = folder, settings, corpus, device
        self.module = _module(settings).to(device)
        matrices = [p for p in self.module.parameters() if p.ndim > 1]
        others = [p for p in self.module.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.half = has_bfloat16(device)  # in products; weights stay float32
        self.step = 0
        self.losses: list[float] = []  # of every step

    @property
    def non_embedding(self) -> int:
        """Parameters besides the embedding, which the head shares."""
        embedding = self.settings.vocabulary * self.settings.hidden_size
        return sum(p.numel() for p in self.module.parameters()) - embedding

    @property
    def epochs(self) -> float:
        """How often the whole training reads the text."""
        return self.settings.all_tokens / (self.corpus.windows * self.settings.context)

    @property
    def tokens(self) -> int:
        return self.step * self.settings.step_tokens

    def restore(self) -> None:
        """Raises FallowError if the state is damaged."""
        path = self.folder / "state.pt"
        if not path.exists():
            console.print(
                f"{self.settings.all_tokens} tokens are {self.epochs:.2f} epochs of this text",
                highlight=False,
            )
            return
        try:
            check_sums(path)
            state = torch.load(path, weights_only=True, map_location=self.device)
            self.module.load_state_dict(state["module"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.losses = state["step"], state["losses"]
        except (
            OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError,
        ) as error:  # fmt: skip
            raise FallowError(f"{path} is damaged; delete {self.folder} to begin again") from error
        console.print(f"goes on after {self.tokens} tokens", highlight=False)

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        with atomic_path(self.folder / "state.pt") as temporary:
            torch.save(state, temporary)

    def finish(self) -> None:
        """The steps that are left, with measurements at the checkpoints."""
        checkpoints = set(self.settings.checkpoint_steps())
        measured = _points(self.folder / "curve.json")
        if self.step in checkpoints and self.tokens not in measured[TOKENS]:
            self._measure()
        saved = reported = time.monotonic()
        began = self.step, reported
        while self.step < self.settings.steps:
            self._take_step()
            now = time.monotonic()
            at_checkpoint, last = self.step in checkpoints, self.step == self.settings.steps
            if at_checkpoint or last or now - saved > SAVE_SECONDS:
                self.save()
                saved = now
            if at_checkpoint:
                self._measure()
            if last or now - reported > REPORT_SECONDS:
                self._report(began, now)
                reported = now
        self._judge()
        self._save_final()

    def _take_step(self) -> None:
        batch = torch.from_numpy(self.corpus.batch(self.settings, self.step)).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(self.step)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            logits = self.module(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        value = loss.item()
        if not math.isfinite(value):
            raise FallowError(
                f"the loss is {value} after {self.tokens} tokens; {self.folder}/state.pt has the "
                "last good state; begin again elsewhere with a lower --learning-rate"
            )
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimiser.step()
        self.step += 1
        self.losses.append(value)
        log("law train", self.step, {"loss": value})

    def _report(self, began: tuple[int, float], now: float) -> None:
        step, start = began
        per_step = self.settings.step_tokens
        speed = (self.step - step) * per_step / max(now - start, 1e-9)
        left = (self.settings.steps - self.step) * per_step / max(speed, 1e-9)
        console.print(
            f"{self.tokens / 1e6:.1f} M tokens of {self.settings.tokens / 1e6:.0f}: loss "
            f"{np.mean(self.losses[-20:]):.3f}, {speed:.0f} tokens/s, {left / 60:.0f} min left",
            highlight=False,
        )

    def _measure(self) -> None:
        """A checkpoint: its model, and a point of the curve at a CETT of its own."""
        folder = self._checkpoint(self.tokens)
        if not folder.exists():  # a run that was killed later left it whole
            with atomic_folder(folder) as made:
                self._write_model(made)
        found = measure(folder, self.corpus.held_out, self.settings)
        curve = _points(self.folder / "curve.json")
        curve |= {"activation": self.settings.activation, "parameters": self.non_embedding}
        recent = self.losses[-20:]
        point = {TOKENS: self.tokens, "train_loss": float(np.mean(recent))} | found
        for name, value in point.items():
            curve.setdefault(name, []).append(value)
        write_json(self.folder / "curve.json", curve)
        log("law train", self.step, {f"curve_{name}": value for name, value in point.items()})
        console.print(
            f"{self.tokens} tokens: {OWN_RATIO} {found[OWN_RATIO]:.4f}, zeros "
            f"{found['zero_ratio']:.4f}, validation loss {found['validation_loss']:.3f}",
            highlight=False,
        )

    def _checkpoint(self, tokens: int) -> Path:
        return self.folder / "checkpoints" / str(tokens)

    def _judge(self) -> None:
        """All checkpoints at the CETT that the last ones have in common: the curve itself."""
        path = self.folder / "curve.json"
        curve = _points(path)
        if RATIO in curve:
            return
        folders = [self._checkpoint(tokens) for tokens in curve[TOKENS]]
        held_out, settings = self.corpus.held_out, self.settings
        if "cett" not in curve:
            curve["cett"] = joint_cett(folders[-JOINT:], held_out, settings)
            write_json(path, curve)
        found = [judge(folder, held_out, settings, curve["cett"]) for folder in folders]
        for name in found[0]:
            curve[name] = [point[name] for point in found]
        write_json(path, curve)
        console.print(
            f"all at CETT {curve['cett']:.4f}: {RATIO} {curve[RATIO][0]:.4f} at first, "
            f"{curve[RATIO][-1]:.4f} at last",
            highlight=False,
        )

    def _save_final(self) -> None:
        """The trained model; its weights last, as they say that it is whole."""
        folder = self.folder / _FINAL
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as made:
            self._write_model(made)
        held_out, settings, name = self.corpus.held_out, self.settings, str(self.folder)
        cett = _points(self.folder / "curve.json")["cett"]
        found = judge(folder, held_out, settings, cett, name)
        found |= {"cett": cett} | measure(folder, held_out, settings, name)
        write_json(self.folder / "final.json", found)
        for path in sorted(folder.iterdir(), key=lambda p: p.name == "model.safetensors"):
            path.replace(self.folder / path.name)

    def clear(self) -> None:
        """Removes what a finished training does not need."""
        shutil.rmtree(self.folder / _FINAL, ignore_errors=True)
        (self.folder / "state.pt").unlink(missing_ok=True)

    def _write_model(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.module.save_pretrained(folder)
        path = str(self.folder / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, eos_token=END)
        tokenizer.save_pretrained(folder)

    def report(self) -> TrainReport:
        path, remedy = self.folder / "final.json", f"delete {self.folder} to begin again"
        found = read_json(path, remedy)
        figures: dict[str, Any] = {
            name: found.get(name) for name in ("validation_loss", RATIO, f"{RATIO}_se", "cett")
        }
        if not all(fits(value, float) for value in figures.values()):
            raise FallowError(f"{path} is damaged; {remedy}")
        weights = self.folder / "model.safetensors"
        return TrainReport(
            path=str(self.folder),
            curve=str(self.folder / "curve.json"),
            parameters=sum(p.numel() for p in self.module.parameters()),
            non_embedding_parameters=self.non_embedding,
            tokens=self.settings.all_tokens,
            epochs=self.epochs,
            **figures,
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        )


def _module(settings: Settings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        config = LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.hidden_size // settings.head_size,
            num_key_value_heads=settings.hidden_size // settings.head_size,
            hidden_act=settings.activation,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config).train()


def _points(path: Path) -> dict[str, Any]:
    """Raises FallowError if a file is there but damaged."""
    if not path.exists():
        return {TOKENS: []}
    remedy = f"delete {path.parent} to begin again"
    curve = read_json(path, remedy)
    lists = [curve.get(TOKENS), *(v for k, v in curve.items() if fits(v, list) or k in LISTS)]
    if not all(fits(values, list) and len(values) == len(lists[0]) for values in lists):
        raise FallowError(f"{path} is damaged; {remedy}")
    if not all(fits(value, float) for values in lists for value in values):
        raise FallowError(f"{path} is damaged; {remedy}")
    if not fits(curve.get("cett", 0.0), float) or (RATIO in curve and "cett" not in curve):
        raise FallowError(f"{path} is damaged; {remedy}")
    return curve


# What is measured --------------------------------------------------------------------------------


def measure(
    folder: Path, held_out: Text, settings: Settings, name: str | None = None
) -> dict[str, Any]:
    """A checkpoint on held-out text, and its ratio at a CETT that costs it alone 1 % of PPL.

    Leaves `profile.json` and `profile.npz` in the folder, of a model of that name, or of the
    folder's.

    Raises:
        FallowError: the held-out text is too short.
    """
    calibrator, unseen = _calibrator(folder, held_out, settings, name)
    model = calibrator.model
    plan = calibrator.plan("cett", max_ppl_increase=PPL_INCREASE, measure=False)
    own = _on_unseen(model, unseen, plan)
    n = _held_out_windows()
    seen = profile(model, held_out, context=settings.context, windows=n)
    seen.save(folder)
    losses = window_losses(model, model.windows(held_out, settings.context, n), None)
    return {
        "own_cett": plan.knob,
        **{f"own_cett_{figure}": value for figure, value in own.items()},
        "zero_ratio": seen.summary["natural_sparsity"],
        "dead": float((seen.arrays["firing_frequency"] < DEAD).mean()),
        "validation_loss": float(losses.mean()),
    }


def joint_cett(folders: Sequence[Path], held_out: Text, settings: Settings) -> float:
    """The CETT at which the PPL of checkpoints rises by 1 % on average: CETT-PPL-1 %.

    Raises:
        FallowError: the held-out text is too short.
    """
    calibrators = [_calibrator(folder, held_out, settings)[0] for folder in folders]
    return search_jointly(calibrators, Cett, PPL_INCREASE, to_spare=0)[0].knob


def judge(
    folder: Path, held_out: Text, settings: Settings, cett: float, name: str | None = None
) -> dict[str, float]:
    """A checkpoint's activation ratio and rise of PPL at that CETT, on text of no search.

    Leaves `cett.plan` in the folder.

    Raises:
        FallowError: the held-out text is too short.
    """
    calibrator, unseen = _calibrator(folder, held_out, settings, name)
    plan = calibrator.plan("cett", knob=cett, measure=False)
    found = _on_unseen(calibrator.model, unseen, plan)
    plan.achieved_sparsity = 1 - found[RATIO]
    plan.achieved_ppl_increase = found["ppl_change_percent"]
    plan.achieved_ppl_increase_se = found["ppl_change_se"]
    plan.save(folder / "cett.plan")
    return found


def _held_out_windows() -> int:
    return FIT_WINDOWS + SEARCH_WINDOWS + JUDGE_WINDOWS


def _calibrator(
    folder: Path, held_out: Text, settings: Settings, name: str | None = None
) -> tuple[Calibrator, np.ndarray]:
    """What fits and searches for a checkpoint, and the windows that neither sees, (n, context)."""
    model, context = load(str(folder)), settings.context
    model.name = name or model.name
    calibrator = Calibrator(
        model, held_out, context=context, windows=FIT_WINDOWS, validation_windows=SEARCH_WINDOWS
    )
    windows = model.windows(held_out, context, _held_out_windows())
    return calibrator, windows[FIT_WINDOWS + SEARCH_WINDOWS :]


def _on_unseen(model: Model, windows: np.ndarray, plan: Plan) -> dict[str, float]:
    """Ratio and rise of PPL under a plan, with their standard errors over windows."""
    runs = [run_window(model, window, [plan]) for window in windows]
    ratios = np.array([1 - sparse.achieved_sparsity for _, (sparse,) in runs])
    losses = np.array([sparse.loss for _, (sparse,) in runs])
    change, change_se = ppl_change_percent(losses, np.array([dense.loss for dense, _ in runs]))
    ratio_se = window_error(ratios)
    assert ratio_se is not None
    assert change_se is not None
    return {
        RATIO: float(ratios.mean()),
        f"{RATIO}_se": ratio_se,
        "ppl_change_percent": change,
        "ppl_change_se": change_se,
    }
