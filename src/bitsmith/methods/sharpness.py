"""Sharpness: the gradient is that of the neighbourhood, through the quantizers (FQAT, 2509.00859).

    e   towards higher loss, of size rho                          theta = weights, norms, biases AND scales
    SAM   (2010.01412):  g = g_2,              g_2 at theta + e
    SAGM  (2303.10353):  g = (g_1 + g_2) / 2,  g_2 at theta + e - alpha g_1

g_1 is the gradient of the task's first pass, with which BatchNorm statistics move; the second pass leaves
them alone. Every parameter has afterwards the bits that it had before. The radius is

    of the model    e = rho |w| g / |g|, norms over all tensors, w those that are no learned scales
    of each tensor  e_l = rho |theta_l| g_l / |g_l| for each tensor l, of learned scales: rho of each scale
    absolute        e = rho g / |g|

Of the model, rho means about the same for every model, and tensors move as far as the loss asks, which that
of each tensor forbids: there the least sensitive one moves as far as any, and so all must move less. (ASAM,
2102.11600, is relative element by element, with one radius over all.)

The paper's second half: a scale has two gradients that may conflict, g_1 of the task and g_2 of flatness. Its
*disorder* is the share of steps in which g_1 changes sign; every `disorder_window` steps scales are frozen by
it: as long as one is, g_1 does not move it. What 2509.00859 says of it is known to us in outline only, so
both readings are here: freeze the `ordered` (as its forerunner, 2412.05551) or the `disordered` ones.

Widths that train are no place in weight space: logits and real widths are not perturbed, and keep the
gradient of the first pass. Penalties have a backward of their own, and no part in either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, SiteError, check_choice, check_value
from bitsmith.methods.method import Closure, Method, is_number
from bitsmith.quantization import sites

TINY = 1e-12
REUSE = 0.7  # of the flat direction in steps between second passes (2203.02714, section 5)
WARM_UP = 0.1  # of the steps

SCHEDULES: dict[str, Callable[[float], float]] = {  # of t = step / steps, a factor of rho
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "warm_up": lambda t: min(1.0, t / WARM_UP),
}
CHOICES = {
    "kind": ("sam", "sagm"),
    "schedule": tuple(SCHEDULES),
    "relative_to": (None, "model", "tensor"),
    "between": ("plain", "reuse"),
    "freeze": (None, "ordered", "disordered"),
}


class Sharpness(Method):
    """Trains towards flat minima by a second pass at perturbed weights and scales.

    radius: rho, a share of the norm of the "model" or of each "tensor" (relative_to), or as it is (None).
    kind: sam or sagm, with its alpha. schedule: of rho: constant, cosine (to 0) or warm_up (over the first
    tenth). every: steps from one second pass to the next. between: what the others do: plain steps, or
    reuse of the last direction that a second pass added (LookSAM). freeze: which scales the task leaves
    alone, by the disorder of its gradient in the last ``disorder_window`` steps: those below the
    ``disorder_threshold`` (ordered), above it (disordered), or none. unfreeze: whether a frozen one may
    come free again.

    Raises SchemeError for options out of range or that contradict one another, SiteError where scales shall
    be frozen and none is learned.
    """

    turn = -1  # the second pass replaces gradients, which other methods then change

    radius: Tensor
    perturbed_loss: Tensor
    count: Tensor
    previous: Tensor
    flips: Tensor
    disorder: Tensor
    frozen: Tensor
    channels: Tensor
    quantizer: Tensor

    def __init__(
        self,
        radius: float = 0.01,
        *,
        kind: str = "sam",
        relative_to: str | None = "model",
        alpha: float = 0.001,
        schedule: str = "constant",
        every: int = 1,
        between: str = "reuse",
        freeze: str | None = None,
        disorder_threshold: float = 0.3,
        disorder_window: int = 50,
        unfreeze: bool = True,
    ) -> None:
        super().__init__()
        given = locals()
        for name, choices in CHOICES.items():
            if given[name] is not None or None not in choices:
                check_choice(f"sharpness.{name}", given[name], [c for c in choices if c is not None])
        _check(given)
        self.rho, self.kind, self.relative_to, self.schedule = float(radius), kind, relative_to, schedule
        self.each = relative_to == "tensor"
        self.alpha = float(alpha) if kind == "sagm" else 0.0
        self.every, self.reuses = every, between == "reuse" and every > 1
        self.freeze, self.threshold, self.window = freeze, disorder_threshold, disorder_window
        self.unfreeze = unfreeze
        self.register_buffer("radius", torch.tensor(self.rho * SCHEDULES[schedule](0.0)))
        self.register_buffer("perturbed_loss", torch.tensor(torch.nan))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))  # steps done
        self._gathered = False
        self._restore()

    def attach(self, model: nn.Module) -> None:
        """Remember the model; make room for the disorder of its scales and the direction of its weights."""
        self.models = [model]
        channels = [q.range.shape[1] for q in self._learned().values()]
        if self.freeze is not None:
            if not channels:
                raise SiteError(
                    "no scale is learned, so there is none to freeze",
                    where="sharpness.freeze",
                    got=self.freeze,
                    remedy="Leave it out, or choose range: lsq",
                )
            self.register_buffer("previous", torch.zeros(sum(channels), dtype=torch.int8))
            self.register_buffer("flips", torch.zeros(sum(channels)))
            self.register_buffer("frozen", torch.zeros(len(channels)))
            self.register_buffer("disorder", torch.tensor(torch.nan))
            self.register_buffer("channels", torch.tensor(channels), persistent=False)
            index = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))
            self.register_buffer("quantizer", index, persistent=False)
        if self.reuses:
            scales = {id(p) for q in sites(model).values() for p in q.parameters()}
            for i, parameter in enumerate(p for p in model.parameters() if id(p) not in scales):
                self.register_buffer(f"direction_{i}", torch.zeros_like(parameter))

    @torch.no_grad()
    def after_backward(self, closure: Closure) -> None:
        """Replace the task's gradients by those of the neighbourhood."""
        self._gather()
        if self.freeze is not None:
            self._watch()
        moved: list[Tensor] = [p for p in self._perturbed if p.grad is not None]
        if self._step % self.every == 0 and self._rho > 0 and moved:
            self._second_pass(closure, moved)
        else:
            self._without(moved)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """The next radius; from time to time which scales are frozen."""
        self._step = step + 1
        self.count.fill_(self._step)
        self._rho = self.rho * SCHEDULES[self.schedule](min(1.0, self._step / steps))
        self.radius.fill_(self._rho)
        if self.freeze is not None and self._step % self.window == 0:
            self._decide()

    def scalars(self) -> dict[str, Tensor]:
        """The radius, the loss of the last second pass; the mean disorder of the last window and the share
        of frozen scales."""
        found = super().scalars()
        if not self._has_passed:
            del found["perturbed_loss"]
        if self.freeze is not None:
            found["frozen_share"] = self.frozen.mean()
            if self._step < self.window:
                del found["disorder"]
        return found

    # ---- the second pass

    def _second_pass(self, closure: Closure, moved: list[Tensor]) -> None:
        g_1 = [_gradient(p) for p in moved]
        kept = [p.grad for p in self._widths]
        e = torch._foreach_mul(g_1, self._factors(moved, g_1))
        before = [p.detach().clone() for p in moved]
        for parameter in self.models[0].parameters():  # a closure that fills with zeros would clear g_1
            parameter.grad = None
        try:
            torch._foreach_add_(moved, e)
            with torch.enable_grad():
                self.perturbed_loss.copy_(closure())
            self._has_passed = True
        finally:
            torch._foreach_copy_(moved, before)  # adding -e would not give the same bits
        for width, own in zip(self._widths, kept, strict=True):
            width.grad = own
        g_2 = [g if p.grad is None else p.grad for p, g in zip(moved, g_1, strict=True)]
        if self.kind == "sagm":
            g_2 = list(torch._foreach_lerp(g_1, g_2, [0.5 + 0.5 * self._is_frozen(p) for p in moved]))
        for p, gradient in zip(moved, g_2, strict=True):
            p.grad = gradient
        if self.reuses:
            self._remember(dict(zip(moved, g_1, strict=True)))

    def _factors(self, moved: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        """e / g of each tensor, 0-D."""
        norms = _norms(g)
        if not self.each:
            size = norms.new_ones(())
            if self.relative_to is not None:
                weights = [p for p in moved if id(p) not in self._scales]
                size = _norms(weights or moved).norm()  # scales alone are measured by themselves
            return [self.radius * size / (norms.norm() + TINY) - self.alpha] * len(g)
        # A range is the logarithm of its C scales: rho of each scale is rho / ln 2 of each exponent.
        scales = [self._scales.get(id(p)) for p in moved]
        each = zip(_norms(moved).unbind(), scales, strict=True)
        sizes = torch.stack([n if c is None else n.new_full((), c) for n, c in each])
        return list((self.radius * sizes / (norms + TINY) - self.alpha).unbind())

    # ---- between second passes

    def _remember(self, g_1: Mapping[Tensor, Tensor]) -> None:
        """What the second pass added across g_1:  g_v = g - (<g, g_1> / |g_1|^2) g_1."""
        if not (moved := [p for p in self._directions if p in g_1]):
            return
        g, plain = [_gradient(p) for p in moved], [g_1[p] for p in moved]
        products = torch._foreach_mul(g, plain)
        along = torch.stack([product.sum(dtype=torch.float32) for product in products])
        squares = _norms(plain).square()
        if not self.each:
            along, squares = along.sum().expand_as(along), squares.sum().expand_as(squares)
        parts = torch._foreach_mul(plain, list((along / (squares + TINY**2)).unbind()))
        directions = [self._direction(p) for p in moved]
        torch._foreach_copy_(directions, torch._foreach_sub(g, parts))
        for direction in directions:  # one overflow must not last until the next second pass
            direction.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _without(self, moved: list[Tensor]) -> None:
        """A step without a second pass:  g = g_1 + 0.7 (|g_1| / |g_v|) g_v, or g_1."""
        if self.freeze is not None:
            for p in self._ranges:
                if p.grad is not None and self._is_frozen(p):
                    p.grad.zero_()
        moved = [p for p in moved if p in self._directions]
        if not (self.reuses and self._has_passed and moved):
            return
        g, v = [_gradient(p) for p in moved], [self._direction(p) for p in moved]
        sizes, lengths = _norms(g), _norms(v)
        if not self.each:
            sizes, lengths = sizes.norm().expand_as(sizes), lengths.norm().expand_as(lengths)
        torch._foreach_add_(g, torch._foreach_mul(v, list((REUSE * sizes / (lengths + TINY)).unbind())))

    def _direction(self, parameter: Tensor) -> Tensor:
        direction: Tensor = getattr(self, f"direction_{self._directions[parameter]}")
        return direction

    # ---- disorder

    def _watch(self) -> None:
        """Count the scales whose gradient changed its sign; a scale's rows have one in play at a time."""
        gradients = [
            p.new_zeros(p.shape[1]) if p.grad is None else p.grad.sum(0)  # (K, C): zeros in the other rows
            for p in self._ranges
        ]
        signs = torch.cat(gradients).sign().to(torch.int8)
        if self._step % self.window:
            self.flips.add_(signs != self.previous)
        self.previous.copy_(signs)

    def _decide(self) -> None:
        """Freeze by  delta = (1 / (K - 1)) sum over t of [sign g_t is not sign g_(t-1)], the mean of a
        quantizer's scales."""
        share = self.flips / (self.window - 1)
        delta = torch.zeros_like(self.frozen).index_add_(0, self.quantizer, share) / self.channels
        now = (delta < self.threshold if self.freeze == "ordered" else delta > self.threshold).float()
        self.frozen.copy_(now if self.unfreeze else torch.maximum(self.frozen, now))
        self.disorder.copy_(delta.mean())
        self.flips.zero_()
        self._frozen = self.frozen.tolist()

    # ---- bookkeeping

    def _learned(self) -> dict[str, Any]:
        """The quantizers whose ranges train."""
        return {name: q for name, q in sites(self.models[0]).items() if q.range.requires_grad}

    def _gather(self) -> None:
        """The parameters of the model, once all methods are attached (which make new ranges)."""
        if self._gathered:
            return
        self._gathered, quantizers = True, sites(self.models[0])
        own = {id(p) for q in quantizers.values() for p in q.parameters()}
        widths = {id(p) for q in quantizers.values() for p in q.bits.parameters()}
        named = dict(self.models[0].named_parameters())
        self._widths = [p for name, p in named.items() if id(p) in widths or name.endswith("logits")]
        widths |= {id(p) for p in self._widths}
        self._perturbed: list[Tensor] = [p for p in named.values() if id(p) not in widths]
        self._directions: dict[Tensor, int] = {
            p: i for i, p in enumerate(p for p in named.values() if id(p) not in own)
        }
        self._ranges = [q.range for q in self._learned().values()]
        self._index = {id(p): i for i, p in enumerate(self._ranges)}
        self._scales = {id(p): math.sqrt(p.shape[1]) / math.log(2) for p in self._ranges}

    def _is_frozen(self, parameter: Tensor) -> float:
        """1 or 0."""
        index = self._index.get(id(parameter))
        return 0.0 if index is None or not self._frozen else self._frozen[index]

    def _restore(self) -> None:
        """What the buffers say, where Python branches on it."""
        self._step, self._rho = int(self.count), float(self.radius)
        self._has_passed = not bool(self.perturbed_loss.isnan())
        self._frozen = self.frozen.tolist() if "frozen" in self._buffers else []

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._restore()


def _norms(tensors: list[Tensor]) -> Tensor:
    """Of each, (len,), in float32: half precision would lose TINY."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _check(given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range and options that contradict one another. Raises SchemeError."""

    def check(name: str, holds: bool, expected: str) -> None:
        check_value(f"sharpness.{name}", given[name], holds, expected)

    for name in ("radius", "alpha"):
        check(name, is_number(given[name]) and 0 <= given[name] < math.inf, "a number of at least 0")
    for name, least in (("every", 1), ("disorder_window", 2)):
        whole = isinstance(given[name], int) and not isinstance(given[name], bool)
        check(name, whole and given[name] >= least, f"a whole number from {least} on")
    threshold = given["disorder_threshold"]
    check("disorder_threshold", is_number(threshold) and 0 <= threshold <= 1, "a share of steps from 0 to 1")
    check("unfreeze", isinstance(given["unfreeze"], bool), "true or false")
    if given["freeze"] is not None and given["kind"] == "sam" and given["every"] == 1:
        raise SchemeError(
            "with sam in every step no gradient of the task is left that could be frozen",
            where="sharpness.freeze",
            got=given["freeze"],
            remedy="Set kind: sagm",
        )
