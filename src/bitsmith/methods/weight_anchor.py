"""Weight anchor: every quantized weight has a twin in full precision, and the two pull at each other (FQAT).

    forward with Q(W), task loss, update of W;    then, for  L_reg = lambda |A - W|^2,

    pull weights   W <- W + kappa (A - W)
    pull anchor    A <- A + kappa (W - A)                     kappa = 2 eta lambda, share of the gap closed
    requantize     W <- Q(A)                                  before the next batch, where asked for

W are the model's own weights, so that every quantizer serves and what is trained is what ships; the anchors A
are buffers of the method: no weight decay, no cost at inference, gone with the method. The pull is decoupled,
as AdamW's decay is: a kappa means the same under every optimizer.

Differences from the description (2509.00859's idea as the project states it; the paper's own method is in
sharpness). Its two literal forms are here, and neither is the default. With ``requantize`` (and
``pull: anchor``) the anchor moves by kappa (Q(A) - A - eta g): a code changes only where eta |g| exceeds half
a step, else everything stands still; ``codes_moved`` shows it. Without, nothing reads an anchor that is
pulled alone: plain training. By default both are pulled: the anchor is a slow average that holds the weights
back, more and more towards the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitsmith.errors import SchemeError, SiteError, check_choice, check_value, matching
from bitsmith.methods.method import Closure, Method, is_number
from bitsmith.numerics.blocks import to_groups
from bitsmith.quantization.layers import WITH_WEIGHTS, weight_of

LOOKS = 64  # in a run: how often codes are compared with those of the last look
WARM_UP = 0.2  # of the steps, in which `linear` rises
LATE = 0.8  # of the steps, after which `late` begins to rise (CAGE's share)

SCHEDULES: dict[str, Callable[[float], float]] = {  # of t = (step + 1) / steps, a factor in 0..1
    "constant": lambda t: 1.0,
    "linear": lambda t: min(1.0, t / WARM_UP),
    "late": lambda t: max(0.0, (t - LATE) / (1 - LATE)),
}
CHOICES = {
    "schedule": tuple(SCHEDULES),
    "pull": ("anchor", "weights", "both"),
    "optimizer": ("plain", "main"),
}


class WeightAnchor(Method):
    """Pulls quantized weights and their full-precision anchors together.

    strength: kappa, 0 to 1. schedule: its factor over the steps: constant, linear (rises over the first
    fifth) or late (0, then rises over the last fifth). pull: what moves, the anchor, the weights or both.
    anchor_strength: kappa of the anchor, where it is not that of the weights: small, it is a slow average.
    requantize: W = Q(A) after every step. layers: globs of the layers that have an anchor, or a mapping of
    globs to their strengths, the last match wins, the others have ``strength``; by default all.
    optimizer: what moves the anchor: a plain step, or one of the model's own class and settings ("main") on
    the gradient of L_reg, without weight decay.

    Raises SchemeError for options out of range or that contradict one another, and where weights are shaped
    by tanh (dorefa) and requantized; SiteError where the model has no quantized weight, and for a glob that
    matches nothing.
    """

    turn = 1  # after those that draw or decide widths: weights are stored on the grid of the next forward

    strength: Tensor
    codes_moved: Tensor
    gap: Tensor
    started: Tensor
    looked: Tensor

    def __init__(
        self,
        strength: float = 0.1,
        *,
        schedule: str = "late",
        pull: str = "both",
        anchor_strength: float | None = None,
        requantize: bool = False,
        layers: Sequence[str] | Mapping[str, float] | None = None,
        optimizer: str = "plain",
    ) -> None:
        super().__init__()
        given = locals()
        for name, choices in CHOICES.items():
            check_choice(f"weight_anchor.{name}", given[name], choices)
        _check(given)
        self.factor, self.schedule, self.pull, self.requantize = strength, schedule, pull, requantize
        self.anchor_factor, self.wanted, self.how = anchor_strength, layers, optimizer
        self.register_buffer("strength", torch.tensor(float(strength) * SCHEDULES[schedule](0.0)))
        self.register_buffer("codes_moved", torch.tensor(torch.nan))
        self.register_buffer("gap", torch.tensor(0.0))
        self.register_buffer("started", torch.zeros(1))
        self._is_started = False  # what the buffer says
        self._trains: list[bool] | None = None  # which weights got a gradient in this step
        self.own: Optimizer | None = None

    def attach(self, model: nn.Module) -> None:
        """Make room for the anchors; they take the weights' values at the first step."""
        found = {
            layer.weight_quantizer.name.removesuffix(".weight"): layer
            for layer in model.modules()
            if isinstance(layer, WITH_WEIGHTS) and layer.weight_quantizer is not None
        }
        if not found:
            raise SiteError(
                "this model has no quantized weight that could have an anchor",
                where="weight_anchor",
                remedy="Prepare it first, with weights of 1 to 8 bits",
            )
        self.strengths = self._by_layer(found)
        self.layers: list[Any] = [found[name] for name in self.strengths]
        for i, layer in enumerate(self.layers):
            weight, scheme = weight_of(layer).detach(), layer.weight_quantizer.scheme
            if self.requantize and scheme.range == "dorefa":
                raise SchemeError(
                    "weights that tanh shapes cannot be stored quantized: they would be shaped once more",
                    where=f"{layer.weight_quantizer.name}.range",
                    got=scheme.range,
                    remedy="Choose range: lsq, or requantize: false",
                )
            self.register_buffer(f"anchor_{i}", weight.clone(memory_format=torch.contiguous_format))
            shape = weight if scheme.group_size is None else to_groups(weight, scheme.group_size, True)
            self.register_buffer(f"codes_{i}", torch.zeros(shape.shape, dtype=torch.int8))
        self.register_buffer("looked", torch.zeros(len(self.layers)))
        self._has_looked, self._has_counted = [False] * len(self.layers), False

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Make the anchors' own like it, where they have one."""
        if self.how == "plain":
            return
        groups: list[dict[str, Any]] = []
        self.main = optimizer
        self.copied: list[int] = []  # which of its groups is behind each of ours
        for index, group in enumerate(optimizer.param_groups):
            members = {id(parameter) for parameter in group["params"]}
            anchors = [self._anchor(i) for i, layer in enumerate(self.layers) if id(layer.weight) in members]
            if anchors:
                self.copied.append(index)
                groups.append({**group, "params": anchors, "weight_decay": 0.0})
        made: Any = type(optimizer)
        self.own = made(groups)

    def after_backward(self, closure: Closure) -> None:
        """Start at the weights of the first step; see which weights train in this one."""
        self._start()
        self._trains = [layer.weight.grad is not None for layer in self.layers]

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Pull, requantize, and from time to time look at the codes."""
        self._start()
        factor = SCHEDULES[self.schedule]((step + 1) / steps)
        self.strength.fill_(self.factor * factor)
        trains, self._trains = self._trains or [True] * len(self.layers), None
        pulled = [i for i in range(len(self.layers)) if trains[i]]
        if pulled and factor > 0:
            self._pull(pulled, factor)
        if self.requantize:
            for i, layer in enumerate(self.layers):
                weight_of(layer).copy_(layer.weight_quantizer(self._anchor(i)))
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            self._look()

    def scalars(self) -> dict[str, Tensor]:
        """The strength now; the share of codes that moved since the last look, where the widths are decided;
        the distance of weights and anchors, relative to the anchors."""
        found = super().scalars()
        if not self._has_counted:
            del found["codes_moved"]
        return found

    def get_extra_state(self) -> dict[str, Any] | Tensor:
        """The state of the anchors' own optimizer, where they have one."""
        return torch.empty(0) if self.own is None else self.own.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Go on where ``get_extra_state`` was taken."""
        if self.own is not None:
            self.own.load_state_dict(state)

    # ---- inside

    def _by_layer(self, found: Mapping[str, nn.Module]) -> dict[str, float]:
        """Layer -> its strength."""
        where = "weight_anchor.layers"
        if self.wanted is None:
            return dict.fromkeys(found, self.factor)
        if not isinstance(self.wanted, Mapping):
            return dict.fromkeys(matching(where, self.wanted, found, "quantized layer"), self.factor)
        strengths = dict.fromkeys(found, self.factor)
        for pattern, strength in self.wanted.items():
            strengths |= dict.fromkeys(matching(where, [pattern], found, "quantized layer"), strength)
        return strengths

    @torch.no_grad()
    def _start(self) -> None:
        """Weights may have been rounded or loaded since `attach`."""
        if self._is_started:
            return
        for i, layer in enumerate(self.layers):
            self._anchor(i).copy_(weight_of(layer))
        self.started.fill_(1.0)
        self._is_started = True

    def _anchor(self, index: int) -> Tensor:
        anchor: Tensor = getattr(self, f"anchor_{index}")
        return anchor

    def _pull(self, pulled: list[int], factor: float) -> None:
        """W <- W + kappa (A - W), then A <- A + kappa (W - A), for these layers."""
        weights, anchors = [weight_of(self.layers[i]) for i in pulled], [self._anchor(i) for i in pulled]
        kappas = list(self.strengths.values())
        if self.pull != "anchor":
            torch._foreach_lerp_(weights, anchors, [kappas[i] * factor for i in pulled])
        if self.pull == "weights":
            return
        if self.anchor_factor is not None:
            kappas = [self.anchor_factor] * len(kappas)
        if self.how == "plain":
            torch._foreach_lerp_(anchors, weights, [kappas[i] * factor for i in pulled])
        else:
            self._descend(
                {id(a): (w, kappas[i] * factor) for i, w, a in zip(pulled, weights, anchors, strict=True)}
            )

    def _descend(self, towards: Mapping[int, tuple[Tensor, float]]) -> None:
        """A step of the anchors' own optimizer on 2 lambda (A - W), lambda = kappa / (2 eta)."""
        if self.own is None:
            raise SchemeError(
                "anchors move like the model's weights, and nobody said by which optimizer these do",
                where="weight_anchor.optimizer",
                got="main",
                remedy="Call method.optimizer_made(optimizer) once it is made",
            )
        for group, index in zip(self.own.param_groups, self.copied, strict=True):
            rate = group["lr"] = self.main.param_groups[index]["lr"]
            for anchor in group["params"]:
                weight, kappa = towards.get(id(anchor), (anchor, 0.0))
                anchor.grad = (anchor - weight) * (kappa / rate) if kappa and rate else None
        self.own.step()

    def _look(self) -> None:
        """Which share of the codes is another than at the last look, and how far weights and anchors are
        apart."""
        moved, count = [], 0
        for i, layer in enumerate(self.layers):
            bits = layer.weight_quantizer.bits
            if bits.in_float or bits.share is not None:  # there are no codes (yet)
                continue
            codes = layer.weight_quantizer.codes(weight_of(layer)).to(torch.int8)
            before: Tensor = getattr(self, f"codes_{i}")
            if self._has_looked[i]:
                moved.append((codes != before).sum())
                count += codes.numel()
            before.copy_(codes)
            self._has_looked[i] = True
            self.looked[i] = 1.0
        if count:
            self.codes_moved.copy_(torch.stack(moved).sum() / count)
            self._has_counted = True
        anchors = [self._anchor(i) for i in range(len(self.layers))]
        gaps = torch._foreach_sub([weight_of(layer) for layer in self.layers], anchors)
        self.gap.copy_(_norm(gaps) / _norm(anchors).clamp(min=1e-12))

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._is_started = bool(self.started)
        self._has_looked = self.looked.bool().tolist()
        self._has_counted = not bool(self.codes_moved.isnan())


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all of them together, 0-D."""
    return torch.stack(torch._foreach_norm(list(tensors))).norm()


def _check(given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range and options that contradict one another. Raises SchemeError."""
    expected = "a share of the gap from 0 to 1"
    strengths = {"strength": given["strength"]}
    if given["anchor_strength"] is not None:
        strengths["anchor_strength"] = given["anchor_strength"]
    if isinstance(given["layers"], Mapping):
        strengths |= {f"layers.{pattern}": value for pattern, value in given["layers"].items()}
    for name, value in strengths.items():
        check_value(f"weight_anchor.{name}", value, is_number(value) and 0 <= value <= 1, expected)
    if isinstance(given["layers"], str):
        check_value("weight_anchor.layers", given["layers"], False, "a list of globs, or globs and strengths")
    requantize = given["requantize"]
    check_value("weight_anchor.requantize", requantize, isinstance(requantize, bool), "true or false")
    if given["requantize"] and given["pull"] != "anchor":
        raise SchemeError(
            "weights that are requantized from their anchors lose what they were pulled to",
            where="weight_anchor.pull",
            got=given["pull"],
            expected="anchor, with requantize: true",
            remedy="Set pull: anchor, or requantize: false",
        )
