"""ZerothOrder: training with forward passes alone. ZeroQAT (2509.00031), MeZO (2305.17333), QuZO
(2502.12346).

    for each of q directions u, of the key (seed, step, direction, tensor):
        L+ = L(W + eps u),  L- = L(W - eps u)                 weights are moved before they are quantized
    g = 1/q sum of (L+ - L-) / (2 eps) * u                    never there: u is made anew, in pieces
    W <- W - lr * g

Float tensors are moved on a lattice and restored to the bit (lattice); codes of packed layers are moved by
whole codes while they are unpacked (codes). Which tensors of a model are moved: parts. No gradient, no
activation and no direction is kept; momentum is the sum over the last steps' directions, made anew from
their keys.

How it differs from the papers. Restored weights are the same bits. Directions are signs by default, the
least noisy ones with E[uu'] = I (a normal direction adds 2 g_i^2 to the variance of element i); "normal" is
the papers'. ``unit`` "rms" measures eps and lr in each tensor's own size. ``normalize`` divides L+ - L- by
its running size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import (
    FormatError,
    SchemeError,
    SiteError,
    TrainingDiverged,
    check_choice,
    check_value,
    listing,
)
from bitsmith.numerics.noise import NOISES, Key, energy, key
from bitsmith.optim import codes, lattice
from bitsmith.optim.lattice import Term
from bitsmith.optim.parts import PARTS, trained_parts
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.layers import in_eval_mode

UNITS = ("one", "rms")
EPS, EPS_OF_CODES = 1e-3, 0.5
EXPONENTS = ("scales", "transforms")  # parameters that are logarithms, or nearly: their unit is one
SIZE_DECAY = 0.95  # of the running mean square of L+ - L-, where `normalize` divides by its root

Closure = Callable[[], Any]
Value = float | Mapping[str, float]


class ZerothOrder(torch.optim.Optimizer):
    """Forward-only training of a prepared model, a packed one, or of any float tensors.

    target: a model, whose ``parts`` (see optim.parts) in the ``layers`` that match a glob are trained; or
    tensors or torch's parameter groups. lr, eps: one for all, or by part; a scheduler may change both in
    ``param_groups``. Of float tensors they count in ``unit``: "one", or "rms", the size of each tensor when
    training starts (of learned ranges and transformations, which are exponents, always one); of codes in
    codes, times 2^(bits - 4) above 4 bits. eps None: 1e-3, the papers', of floats, and half a code.
    directions: q. momentum: β of g_t + β g_(t-1) + ... over ``history`` further steps: no memory, but time.
    normalize: lr is then the size of a step in units. residual: an int8 per code, which carries what
    rounding cut off.

    Memory is that of a forward pass and a piece of a direction. Raises SchemeError (a value out of range, a
    tensor that is not float32, no closure), SiteError (nothing to train), TrainingDiverged (a loss that is
    not finite).
    """

    def __init__(
        self,
        target: nn.Module | Iterable[Any],
        lr: Value,
        eps: Value | None = None,
        *,
        directions: int = 1,
        noise: str = "signs",
        unit: str = "one",
        momentum: float = 0.0,
        history: int = 16,
        weight_decay: float = 0.0,
        normalize: bool = False,
        residual: bool = False,
        layers: Sequence[str] | None = None,
        parts: Sequence[str] = ("weights",),
        seed: int = 0,
    ) -> None:
        check_choice("noise", noise, tuple(NOISES))
        check_choice("unit", unit, UNITS)
        for part in parts:
            check_choice("parts", part, PARTS)
        check_value("directions", directions, isinstance(directions, int) and directions >= 1, "1 or more")
        check_value("momentum", momentum, 0 <= momentum < 1, "0 up to, but not, 1")
        check_value("history", history, isinstance(history, int) and history >= 1, "1 or more steps")
        check_value("weight_decay", weight_decay, weight_decay >= 0, "0 or more")
        self.model = target if isinstance(target, nn.Module) else None
        self.directions, self.noise, self.momentum = directions, noise, momentum
        self.normalize, self.seed, self.kept = normalize, seed, history
        self.steps, self.mean_square = 0, 0.0
        self.history: list[tuple[int, list[float]]] = []  # latest first: step, (L+ - L-)/2 by direction
        self.saturated = (
            0.0  # of the codes that were to move in the last step, those at the end of their grid
        )
        self.packed: dict[int, PackedWeight] = {}  # by id of the codes
        self.written: dict[
            int, int | None
        ] = {}  # by id of a float tensor: its writes when last on its lattice
        groups = self._groups(target, layers, parts, lr, eps)
        if not groups:
            raise SiteError(
                "there is no tensor to train", where="ZerothOrder", remedy="Pass a model or tensors"
            )
        super().__init__(groups, {"lr": lr, "eps": EPS if eps is None else eps, "weight_decay": weight_decay})
        for group, tensor in self._tensors():
            exponents = group.get("name") in EXPONENTS and isinstance(tensor, nn.Parameter)
            check_value("lr", group["lr"], _positive(group["lr"], zero=True), "a finite number, 0 or more")
            check_value("eps", group["eps"], _positive(group["eps"]), "a finite number above 0")
            self._start(tensor, "one" if exponents else unit, residual)
        self._lay_lattices()

    def _groups(
        self, target: Any, layers: Sequence[str] | None, parts: Sequence[str], lr: Value, eps: Value | None
    ) -> list[Any]:
        if self.model is None:
            return list(target)
        groups = []
        for part, tensors in trained_parts(self.model, layers, parts).items():
            packed = {id(t.codes): t for t in tensors.values() if isinstance(t, PackedWeight)}
            self.packed |= packed
            held = [t.codes if isinstance(t, PackedWeight) else t for t in tensors.values()]
            start = EPS_OF_CODES if packed else EPS
            settings = {
                "lr": _of_part("lr", lr, part),
                "eps": _of_part("eps", start if eps is None else eps, part),
            }
            groups.append({"params": held, "name": part, **settings})
        return groups

    def _tensors(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, tensor) for group in self.param_groups for tensor in group["params"]]

    @torch.no_grad()
    def _start(self, tensor: Tensor, unit: str, residual: bool) -> None:
        """The numbers that a tensor keeps while it is trained."""
        weight, state = self.packed.get(id(tensor)), self.state[tensor]
        if weight is not None:
            state["unit"] = 2.0 ** max(max(bits for bits, *_ in weight.form.runs) - 4, 0)
            if residual:
                state["residual"] = tensor.new_zeros(weight.shape.numel(), dtype=torch.int8)
            return
        size = 0.0
        if unit == "rms" and tensor.numel():
            size = float(torch.linalg.vector_norm(tensor.detach())) / math.sqrt(tensor.numel())
        state["unit"], state["size"], state["spacing"] = size or 1.0, 0.0, 0.0

    def _lay_lattices(self) -> None:
        """Give every float tensor a lattice for the eps that holds now."""
        for number, (group, tensor) in enumerate(self._tensors()):
            state, where = self.state[tensor], f"{group.get('name', 'params')}[{number}]"
            if id(tensor) in self.packed or state["size"] == group["eps"] * state["unit"]:
                continue
            check_value("eps", group["eps"], _positive(group["eps"]), "a finite number above 0")
            lattice.check(where, tensor)
            state["size"] = group["eps"] * state["unit"]
            h = lattice.spacing(tensor, lattice.reach_of(state["size"], self.noise))
            state["spacing"] = max(h, state["spacing"])
            self.written.pop(id(tensor), None)
            least = lattice.LEAST * state["spacing"] / state["unit"]
            check_value("eps", group["eps"], group["eps"] >= least, f"{least:.1e} or more for {where}")

    def _snap(self) -> None:
        """Put float tensors on their lattices that something else has written to."""
        for _, tensor in self._tensors():
            writes = _writes(tensor)
            if id(tensor) not in self.packed and (writes is None or self.written.get(id(tensor)) != writes):
                lattice.snap(lattice.in_memory_order("", tensor), self.state[tensor]["spacing"])

    # ---- a step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """2 q calls of ``closure``, which gives the loss of one batch, the same one in each; then the update.

        A model is in eval mode meanwhile: dropout and statistics of batches would differ from call to call.
        Returns the mean of the losses. An error in the closure leaves the weights as they were.
        """
        if closure is None:
            raise SchemeError(
                "forward-only training needs a closure that gives the loss",
                where="ZerothOrder.step",
                got="none",
                remedy="Call optimizer.step(lambda: loss(model(x), y))",
            )
        self._lay_lattices()
        self._snap()
        halves, losses = [], []
        with contextlib.nullcontext() if self.model is None else in_eval_mode(self.model):
            for direction in range(self.directions):
                above, below = self._pair(closure, direction)
                losses += [above, below]
                halves.append((above - below) / 2)
        if self.normalize:
            square = sum(half**2 for half in halves) / len(halves)
            decay = min(SIZE_DECAY, 1 - 1 / (self.steps + 1))
            self.mean_square = decay * self.mean_square + (1 - decay) * square
        self.history.insert(0, (self.steps, halves))
        self._update()
        self.steps += 1
        del self.history[self.kept if self.momentum else 0 :]
        return sum(losses) / len(losses)

    def _pair(self, closure: Closure, direction: int) -> tuple[float, float]:
        """(L+, L-) along a direction. The last direction of a step is left for the update to take back, where
        it is made once for both."""
        losses: list[float] = []
        at = 0
        try:
            for sign in (1, -1):
                self._move(direction, sign - at)
                at = sign
                with self._moved_codes(direction, sign):
                    losses.append(float(closure()))
                if not math.isfinite(losses[-1]):
                    raise TrainingDiverged(
                        "the loss is not finite",
                        where=f"ZerothOrder, step {self.steps}",
                        got=losses[-1],
                        remedy="Lower lr or eps",
                    )
        except BaseException:
            self._move(direction, -at)
            raise
        if direction < self.directions - 1:
            self._move(direction, -at)
        return losses[0], losses[1]

    def _key(self, number: int, direction: int, step: int | None = None) -> Key:
        return key(self.seed, self.steps if step is None else step, direction, number)

    def _move(self, direction: int, times: int) -> None:
        """Move all float tensors by ``times`` their perturbation."""
        for number, (_, tensor) in enumerate(self._tensors()):
            if times and id(tensor) not in self.packed:
                flat, state = lattice.in_memory_order("", tensor), self.state[tensor]
                at = self._key(number, direction)
                lattice.perturb(flat, state["spacing"], state["size"], at, times, self.noise)

    def _moved_codes(self, direction: int, sign: int) -> contextlib.AbstractContextManager[None]:
        """Inside, all codes are unpacked with their perturbation."""
        if self.model is None or not self.packed:
            return contextlib.nullcontext()
        moves = {}
        for number, (group, tensor) in enumerate(self._tensors()):
            if (weight := self.packed.get(id(tensor))) is not None:
                size = group["eps"] * self.state[tensor]["unit"]
                moves[weight] = codes.Move(self._key(number, direction), size, sign)
        return codes.moved(self.model, moves)

    def _update(self) -> None:
        """W <- W - lr g, with the directions of this step and those that momentum remembers."""
        changed = held = 0
        for number, (group, tensor) in enumerate(self._tensors()):
            state, weight = self.state[tensor], self.packed.get(id(tensor))
            unit, decay = state["unit"], group["lr"] * group["weight_decay"]
            size = group["eps"] * unit
            # In v = W / unit, v <- v - lr (L+ - L-)/(2 eps) u. Of codes u is d / eps, and E[d^2] its eps^2.
            eps = size if weight is None else math.sqrt(energy(size))
            factor = -group["lr"] * unit / (self.directions * (1 if weight is None else eps))
            factor *= 1 / math.sqrt(self.mean_square or 1.0) if self.normalize else unit / eps
            terms = [
                Term(self._key(number, direction, step), factor * self.momentum**age * half)
                for age, (step, halves) in enumerate(self.history)
                for direction, half in enumerate(halves)
            ]
            rounding = self._key(number, self.directions)
            if weight is not None:
                found = codes.update(weight, size, terms, rounding, state.get("residual"))
                changed, held = changed + found[0], held + found[1]
                continue
            flat, last = lattice.in_memory_order("", tensor), self._key(number, self.directions - 1)
            state["spacing"] = lattice.update(
                flat, state["spacing"], size, last, terms, rounding, self.noise, decay
            )
            self.written[id(tensor)] = _writes(tensor)
        self.saturated = held / max(changed + held, 1)

    def tensors(self) -> dict[str, Tensor]:
        """All state beside what is trained: residuals, where there are any."""
        found = {str(number): self.state[t].get("residual") for number, (_, t) in enumerate(self._tensors())}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    # ---- saved and resumed

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the seed, the step and the losses that momentum remembers: scalars, and residuals."""
        own = {name: getattr(self, name) for name in ("seed", "steps", "mean_square", "history")}
        return super().state_dict() | {"zeroth_order": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises FormatError for another optimizer's."""
        state_dict = dict(state_dict)
        own = state_dict.pop("zeroth_order", None)
        if own is None:
            raise FormatError(
                "this is no state of a ZerothOrder",
                where="ZerothOrder.load_state_dict",
                expected="the entry zeroth_order",
            )
        super().load_state_dict(state_dict)
        self.written = {}
        self.seed, self.steps, self.mean_square = own["seed"], own["steps"], own["mean_square"]
        self.history = [(step, list(halves)) for step, halves in own["history"]]


def _writes(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def _of_part(name: str, value: Value, part: str) -> float:
    if not isinstance(value, Mapping):
        return value
    if part not in value:
        raise SchemeError(
            f"there is no {name} for these", where=name, got=listing(value), expected=f"an entry {part}"
        )
    return value[part]


def _positive(value: Any, zero: bool = False) -> bool:
    if not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or (zero and value == 0))
