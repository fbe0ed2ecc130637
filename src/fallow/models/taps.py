"""Named places in a model's FFN and attention where values are read or replaced.

Hooks on the modules that every transformers model has; no forward is copied, but for that of
experts, which transformers keeps as one module. For FFN input x:

    gate_pre = x gate_projᵀ      gate_act = act(gate_pre)      up = x up_projᵀ
    inter = gate_act * up        ffn_out = inter down_projᵀ

A non-gated FFN (OPT, Phi-2) has no `up`: gate_pre is fc1's output and inter = gate_act. Of a layer
of Gemma 3n that keeps the top of gate_proj's outputs, gate_pre is what it keeps: act's input.

A mixture of experts has `router` besides: of every token the square roots of its experts' shares of
the router's mass on them, (T, n_experts), and zero for the others. Of the rest it has gate_pre,
gate_act, up and inter, of one expert after the other and the tokens that use it; an expert that all
tokens share is left alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fallow.common.errors import FallowError, UsageError
from fallow.plan import FFN_TAPS, NEURON_TAPS, ROUTER

Tap = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Called with (layer, value (T, width)); what it returns replaces the value, None leaves it."""


TINY = 1e-30  # no share of an expert is smaller


@dataclass(frozen=True)
class Ffn:
    """The modules of an FFN, under the checkpoint's own names.

    A gated one has `gate_proj` and `up_proj`, or both fused in `gate_up_proj` (gate rows first); a
    non-gated one has `up_proj` alone.
    """

    act: nn.Module
    down_proj: nn.Linear
    gate_proj: nn.Linear | None
    up_proj: nn.Linear | None
    gate_up_proj: nn.Linear | None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a router, and FFNs whose weights are stacked."""

    module: nn.Module  # whose forward takes x (T, d_model), chosen and shares, and sums the experts
    router: Any  # gives (logits, shares, chosen), (T, n_experts) and twice (T, n_used)
    gate_proj: torch.Tensor  # (n_experts, d_ff, d_model), as up_proj; parameters or views of them
    up_proj: torch.Tensor
    down_proj: torch.Tensor  # (n_experts, d_model, d_ff)
    biases: Mapping[str, torch.Tensor]  # of these three, (n_experts, rows); {}: there are none
    shared: (
        Any  # an FFN that every token uses, or None; what the sigmoid of this gives is its share
    )
    shared_gate: nn.Linear | None

    @property
    def count(self) -> int:
        return int(self.down_proj.shape[0])

    @property
    def d_ff(self) -> int:
        """Neurons of one expert."""
        return int(self.down_proj.shape[2])

    @property
    def used(self) -> int:
        """By a token."""
        return int(self.router.top_k)

    @property
    def is_normed(self) -> bool:
        """Whether shares of a token's experts are made to sum to 1."""
        return bool(getattr(self.router, "norm_topk_prob", True))

    @property
    def current(self) -> int:
        """The expert whose neurons a tap is given."""
        return self._tapped.current

    def tap(self, name: str, tap: Callable[[torch.Tensor], Any]) -> "_TapHandle":
        """Attaches a tap to neurons until its handle's `remove` is called."""
        self._tapped.taps.append((name, tap))
        self.module.forward = partial(_forward, self, self._tapped)
        return _TapHandle(self.module, self._tapped, (name, tap))

    @property
    def _tapped(self) -> "_Tapped":
        """On the module, since a model's layers may be described several times."""
        found: _Tapped = vars(self.module).setdefault("_fallow_tapped", _Tapped())
        return found

    def gate_and_up(self, x: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_pre and up of tokens (T, d_model), (T, d_ff) each."""
        module: Any = self.module
        if not self.biases:
            gate, up = linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            return gate, up
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        return both[..., ::2], both[..., 1::2].clamp(min=-module.limit, max=module.limit) + 1

    def act(self, gate: torch.Tensor) -> torch.Tensor:
        """What an expert's activation makes of gate_pre."""
        module: Any = self.module
        if not self.biases:
            return module.act_fn(gate)
        gate = gate.clamp(max=module.limit)
        return gate * torch.sigmoid(gate * module.alpha)

    def down(self, inter: torch.Tensor, expert: int) -> torch.Tensor:
        """What an expert puts out for inter (T, d_ff), (T, d_model)."""
        module: Any = self.module
        if not self.biases:
            return linear(inter, module.down_proj[expert])
        return inter @ module.down_proj[expert] + module.down_proj_bias[expert]


class _Tapped:
    """Taps on the neurons of a module of experts, in order, and the expert that they are given."""

    def __init__(self) -> None:
        self.taps: list[tuple[str, Callable[[torch.Tensor], Any]]] = []
        self.current = -1


@dataclass(frozen=True)
class _TapHandle:
    module: nn.Module
    tapped: _Tapped
    tap: tuple[str, Callable[[torch.Tensor], Any]]

    def remove(self) -> None:
        self.tapped.taps.remove(self.tap)
        if not self.tapped.taps:
            del self.module.forward  # the class's own is left


def _forward(
    experts: Experts, tapped: _Tapped, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """As a module of experts computes it, to the bit, with taps on neurons.

    Of x (T, d_model) and each token's experts and their shares, (T, n_used).
    """

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        for at, each in tapped.taps:
            replaced = each(value) if at == name else None
            value = value if replaced is None else replaced
        return value

    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        tapped.current = expert
        place, token = torch.where(chosen.T.eq(expert))
        gate, up = experts.gate_and_up(x[token], expert)
        # Laid out as it was, or an activation may round it otherwise.
        cut = torch.empty_strided(gate.shape, gate.stride(), dtype=gate.dtype, device=gate.device)
        gate = cut.copy_(tap("gate_pre", gate))
        inter = tap("gate_act", experts.act(gate)) * tap("up", up)
        y = experts.down(tap("inter", inter), expert) * shares[token, place, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer that fallow looks at."""

    block: nn.Module
    attention: Mapping[str, nn.Linear]  # q_proj, k_proj, v_proj (or qkv_proj), o_proj; or some
    ffn: Ffn | None
    experts: Experts | None = None  # in place of the FFN

    def one_ffn(self) -> Ffn:
        """Raises FallowError for a mixture of experts."""
        if self.ffn is None:
            raise FallowError(
                "the model is a mixture of experts, whose neurons only profile, evaluate and the "
                f"rules of calibrate look at yet; what can be cut is {', '.join(cut_names(self))}"
            )
        return self.ffn

    @property
    def act(self) -> nn.Module:
        return self.one_ffn().act

    @property
    def down_proj(self) -> nn.Linear:
        return self.one_ffn().down_proj

    @property
    def gate_proj(self) -> nn.Linear | None:
        return self.one_ffn().gate_proj

    @property
    def up_proj(self) -> nn.Linear | None:
        return self.one_ffn().up_proj

    @property
    def gate_up_proj(self) -> nn.Linear | None:
        return self.one_ffn().gate_up_proj

    @property
    def d_ff(self) -> int:
        """Neurons; of a mixture those of one expert."""
        return self.down_proj.in_features if self.experts is None else self.experts.d_ff

    @property
    def device(self) -> torch.device:
        if self.experts is not None:
            return self.experts.down_proj.device
        return self.down_proj.weight.device

    @property
    def gated(self) -> bool:
        if self.experts is not None:
            return True
        return self.gate_proj is not None or self.gate_up_proj is not None

    @property
    def ffn_taps(self) -> tuple[str, ...]:
        """Those of FFN_TAPS that this FFN has: no `up` without a gate; and a mixture's router."""
        if self.experts is not None:
            return (ROUTER, *NEURON_TAPS)
        return tuple(name for name in FFN_TAPS if name != "up" or self.gated)

    @cached_property
    def ffn_inputs(self) -> dict[str, nn.Linear]:
        """The projections that read the FFN's input x."""
        if self.experts is not None:
            return {}
        named = {
            "gate_proj": self.gate_proj,
            "up_proj": self.up_proj,
            "gate_up_proj": self.gate_up_proj,
        }
        return {name: module for name, module in named.items() if module is not None}

    @cached_property
    def projections(self) -> dict[str, nn.Linear]:
        """Every projection of the layer; each name is a tap on that projection's input."""
        if self.experts is not None:
            return dict(self.attention)
        return {**self.attention, **self.ffn_inputs, "down_proj": self.down_proj}

    @cached_property
    def down_norm(self) -> torch.Tensor:
        """c_i = ||down_proj[:, i]||_2, (d_ff,) float32; of a mixture (n_experts, d_ff)."""
        if self.experts is not None:
            return torch.stack([column_norm(weight) for weight in self.experts.down_proj])
        return column_norm(self.down_proj.weight)

    def of_tapped(self, per_neuron: torch.Tensor) -> torch.Tensor:
        """Of figures of all neurons those of the neurons that a tap is given, (d_ff,).

        All, (d_ff,); or of a mixture's (n_experts, d_ff) or (n_experts * d_ff,) one expert's.
        """
        if self.experts is None:
            return per_neuron
        return per_neuron.view(self.experts.count, -1)[self.experts.current]

    @cached_property
    def input_norms(self) -> dict[str, torch.Tensor]:
        """||W[:, j]||_2 of every projection, (in,) float32."""
        return {name: column_norm(module.weight) for name, module in self.projections.items()}


def one_width(layers: list[Layer]) -> int:
    """Neurons of every layer. Raises FallowError if layers differ in them."""
    widths = sorted({layer.d_ff for layer in layers})
    if len(widths) > 1:
        raise FallowError(
            f"the model's layers have {' and '.join(map(str, widths))} neurons, and patterns and "
            "selectors are for models whose layers have as many; the rules of calibrate take any"
        )
    return widths[0]


def column_norm(weight: torch.Tensor) -> torch.Tensor:
    """||W[:, j]||_2 of a weight (out, in), (in,) float32."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=0)


def tap_names(layer: Layer) -> tuple[str, ...]:
    """The taps that this layer has."""
    return (*(() if layer.experts else ("x",)), *layer.ffn_taps, *layer.projections)


def cut_names(layer: Layer) -> tuple[str, ...]:
    """Those that a plan can cut."""
    return tuple(name for name in tap_names(layer) if name != "x")


@contextmanager
def attach(layers: list[Layer], taps: Mapping[str, Tap]) -> Iterator[None]:
    """Runs `taps` whenever the model runs inside the block, in the order given.

    `x` is called once for each projection that reads the FFN's input; a projection's name taps
    that projection's input alone; `inter` is the input of down_proj.

    Raises:
        UsageError: an unknown tap, naming the known ones.
    """
    with ExitStack() as stack:
        for name, tap in taps.items():
            for index, layer in enumerate(layers):
                for handle in _register(layer, name, partial(tap, index)):
                    stack.callback(handle.remove)
        yield


def _register(layer: Layer, name: str, tap: Callable[[torch.Tensor], Any]) -> Iterator[Any]:
    if name not in tap_names(layer):
        raise UsageError(f"unknown tap {name!r}; this model has {', '.join(tap_names(layer))}")
    if name == "x":
        for module in layer.ffn_inputs.values():
            yield module.register_forward_pre_hook(_input_hook(tap))
    elif name == ROUTER:
        assert layer.experts is not None
        yield layer.experts.router.register_forward_hook(_router_hook(tap, layer.experts.is_normed))
    elif layer.experts is not None and name in NEURON_TAPS:
        yield layer.experts.tap(name, tap)
    elif name == "inter":
        yield layer.down_proj.register_forward_pre_hook(_input_hook(tap))
    elif name in layer.projections:
        yield layer.projections[name].register_forward_pre_hook(_input_hook(tap))
    elif name == "gate_act":
        yield layer.act.register_forward_hook(_output_hook(tap))
    elif name == "ffn_out":
        yield layer.down_proj.register_forward_hook(_output_hook(tap))
    elif layer.gate_up_proj is not None:
        half = 0 if name == "gate_pre" else 1
        yield layer.gate_up_proj.register_forward_hook(_half_hook(tap, half))
    elif name == "gate_pre":  # after what a model does to gate_proj's output, as Gemma 3n
        yield layer.act.register_forward_pre_hook(_input_hook(tap))
    else:
        assert layer.up_proj is not None
        yield layer.up_proj.register_forward_hook(_output_hook(tap))


def _apply(tap: Callable[[torch.Tensor], Any], value: torch.Tensor) -> torch.Tensor | None:
    replaced = tap(value.reshape(-1, value.shape[-1]))
    return None if replaced is None else replaced.reshape(value.shape)


def _input_hook(tap: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        replaced = _apply(tap, args[0])
        return None if replaced is None else (replaced, *args[1:])

    return hook


def _output_hook(tap: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> Any:
        return _apply(tap, output)

    return hook


def _half_hook(tap: Callable[[torch.Tensor], Any], half: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> Any:
        halves = list(output.chunk(2, dim=-1))
        replaced = _apply(tap, halves[half])
        if replaced is None:
            return None
        halves[half] = replaced
        return torch.cat(halves, dim=-1)

    return hook


def _router_hook(tap: Callable[[torch.Tensor], Any], is_normed: bool) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        logits, shares, chosen = output
        probabilities = torch.softmax(logits.float(), dim=-1)
        left = shares != 0  # by a plan that cut before
        picked = probabilities.gather(-1, chosen) * left
        value = (picked / picked.sum(dim=-1, keepdim=True).clamp_min(TINY)).sqrt()
        replaced = tap(torch.zeros_like(probabilities).scatter(-1, chosen, value))
        if replaced is None:
            return None
        kept = replaced.gather(-1, chosen) != 0
        if torch.equal(kept, left):
            return None
        picked = picked * kept
        if is_normed:
            picked = picked / picked.sum(dim=-1, keepdim=True).clamp_min(TINY)
        return logits, picked.to(shares.dtype), chosen

    return hook
