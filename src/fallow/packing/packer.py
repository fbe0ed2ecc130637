"""Turns a model into a packed file: one GGUF that the engine runs, FFN laid out by neuron.

docs/packed.md describes the file. From a GGUF source every matrix but down_proj keeps its own
quantised bytes; down_proj is transposed, so that a neuron's weights lie together, and requantised
along its rows.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from fallow.checkpoints.text import Text, load_text
from fallow.common.errors import FallowError
from fallow.common.files import atomic_path, check_writable
from fallow.common.procfs import processors
from fallow.common.progress import console, note
from fallow.engine.engine import Engine
from fallow.engine.memory import COARSE_HEAD
from fallow.measure.quality import evaluate_engine
from fallow.packing.coarse_gate import check_predictable, coarse_gates
from fallow.packing.quantize import FILE_TYPES, quant_type
from fallow.packing.selfcheck import LARGEST_KL, LARGEST_PPL_CHANGE, Reference, SelfCheck
from fallow.packing.source import OUTLIER_WINDOWS, Source
from fallow.packing.writer import write_packed
from fallow.plan import Plan
from fallow.reference.lora import merge_lora
from fallow.reference.model import Model, load


def pack(
    model: str | Path | Model,
    output: str | Path,
    *,
    plan: Plan | None = None,
    quant: str | None = None,
    down: str | None = None,
    shortlist: bool = False,
    predictor: float | None = None,
    lora: str | Path | None = None,
    text: str | Path | Text | None = None,
    n_threads: int | None = None,
) -> SelfCheck:
    """Writes a packed model, and compares it with its source before it gets its name.

    Args:
        plan: stored in the file, and used by the engine unless another is given.
        quant: type of all matrices, for a Hugging Face folder (default Q8_0), or the name of
            one of llama.cpp's mixes, Q4_K_M for Q4_K. A GGUF keeps its own.
        down: type of down_proj_t; default: for a GGUF the smallest that passes the check on a part
            of the default calibration text, else that of `quant`.
        shortlist: add a coarse copy of the head (2 bits), by which a plan with a `head_margin`
            spares most tokens' exact logits.
        predictor: add coarse copies of the gates (2 bits), by which the engine reads only the rows
            of neurons that a ReLU is likely to leave, with this share of their energy (0.99 say).
        lora: an adapter that is merged first (into `model` itself if it is loaded), a PEFT folder
            or a GGUF; matrices of a GGUF that it changes are quantised again, to types they had.
        text: what the check reads, which has chosen nothing but may refuse a type; default: the
            evaluation half of the default text.

    Raises:
        FallowError: the file would not pass the check (nothing is written), a matrix has a type
            that the engine has no kernels for, the architecture's variant is not supported, the
            plan is for another model, or no ReLU follows the gates that are to be predicted.
        UsageError: an unknown type, or a share that is not between 0 and 1.
    """
    check_writable(output)
    packer = Packer(
        model,
        quant=quant,
        down=down,
        shortlist=shortlist,
        predictor=predictor,
        lora=lora,
        text=text,
        plan=plan,
    )
    return packer.write(output, plan, n_threads)


def _known_type(name: str) -> str:
    """As `quant_type`; what llama.cpp mixes is said to be of one type here."""
    kind = quant_type(name)
    if name.upper() in FILE_TYPES:
        note(f"{name}, a mix in llama.cpp, is {kind} here for every matrix; --down says another")
    return kind


PREDICTED_TOKENS = 128  # of each window, by which a predictor's price is told


class Packer:
    """A model made ready to be packed, once or with several plans. Arguments as for `pack`."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        quant: str | None = None,
        down: str | None = None,
        shortlist: bool = False,
        predictor: float | None = None,
        lora: str | Path | None = None,
        text: str | Path | Text | None = None,
        plan: Plan | None = None,  # of another model: refused before the work
        device: str = "cpu",  # that the source runs on
    ) -> None:
        name = None if isinstance(model, Model) else str(model)
        quant, down = (given and _known_type(given) for given in (quant, down))
        text = load_text(text, "evaluation")
        loaded = load(model, "float32", device)
        if lora is not None:
            merge_lora(loaded, lora)
        self._source = Source(loaded, name)
        if plan is not None:
            self.model.taps(plan)
        for problem in self.model.tokenizer.chat_problems():
            note(problem)
        self._predicts = predictor is not None
        if predictor is not None:
            check_predictable(self.model, self._source.activation, predictor)
        self._types = self._source.down_types(quant, down)
        self._matrices = self._source.matrices(quant)
        if shortlist:
            self._matrices |= self._source.coarse_head()
        if predictor is not None:
            activation = self._source.activation
            self._matrices |= coarse_gates(self.model, self._matrices, activation, predictor)
        self._text = text
        self._reference = self._reference_on(text)

    @property
    def model(self) -> Model:
        """The source, float32."""
        return self._source.model

    @cached_property
    def _choice(self) -> Reference:
        """By which the type of down_proj_t is chosen: not the text whose figures are reported."""
        return self._reference_on(load_text(None, "calibration"), skip=OUTLIER_WINDOWS)

    def _reference_on(self, text: Text, skip: int = 0) -> Reference:
        return Reference(self.model, text, self.context_length, skip)

    @property
    def context_length(self) -> int:
        """Tokens that the packed model is made for."""
        return self._source.context_length

    def add_coarse_head(self, text: Text, windows: np.ndarray) -> None:
        """Files written from now on have a coarse head, if there can be one for the model.

        Rounded for windows (n, context) of this text and, if it is another, for the default text.
        """
        if self._source.has_coarse_head:
            self._matrices |= self._source.coarse_head(text, windows)

    def leave_out_unused(self, plan: Plan | None) -> None:
        """Files written from now on have a coarse head only if the plan uses it."""
        if plan is None or plan.head_margin == 0:
            self._matrices = {k: v for k, v in self._matrices.items() if k not in COARSE_HEAD}

    def write(
        self, output: str | Path, plan: Plan | None = None, n_threads: int | None = None
    ) -> SelfCheck:
        """Writes the packed model, whole or not at all. Raises as `pack` does."""
        source, check = self._source, None
        n_threads = n_threads or processors()
        if plan is not None:
            source.model.taps(plan)  # fits this model
        with atomic_path(output) as temporary:
            for kind in self._types:
                write_packed(temporary, source, self._matrices, kind, plan)
                if kind != self._types[-1]:
                    chosen = self._choice.check(temporary, n_threads)
                    console.print(f"down_proj_t {kind}, to choose: {chosen}", highlight=False)
                    if not chosen.passed:
                        continue
                check = self._reference.check(temporary, n_threads)
                console.print(f"down_proj_t {kind}: {check}", highlight=False)
                if check.passed or not source.keeps_bytes:
                    self._types = (kind,)  # of further files
                    break
            assert check is not None
            if not check.passed and source.keeps_bytes:
                raise FallowError(
                    f"the packed model differs too much from {source.model.name} ({check}; at most "
                    f"{LARGEST_KL} nats and {LARGEST_PPL_CHANGE} %); nothing was written; try "
                    "--down q8_0, and please report this model"
                )
            if self._predicts:
                self._report_predictor(temporary, n_threads)
        return check

    def _report_predictor(self, path: Path, n_threads: int) -> None:
        """Says what the predictor costs, read token by token: in blocks the gate is read whole."""
        windows = self._reference.windows[:, :PREDICTED_TOKENS]
        engine = Engine(path, plan=False, threads=n_threads, context=windows.shape[1])
        price = evaluate_engine(engine, None, self._text, windows=windows, decode=True)
        share = float(engine.predicted_neurons().mean())  # of the last window
        console.print(
            f"predictor, without a plan: {share:.1%} of the gates' rows are read; KL "
            f"{price.kl_to_dense['mean']:.5f} nats/token, PPL {price.ppl_change_percent:+.3f} % on "
            f"{price.tokens} tokens",
            highlight=False,
        )

    def write_again(self, output: str | Path, plan: Plan | None) -> None:
        """The same file with another plan, or without a coarse head; not checked once more."""
        (kind,) = self._types  # that the first passed with
        with atomic_path(output) as temporary:
            write_packed(temporary, self._source, self._matrices, kind, plan)
