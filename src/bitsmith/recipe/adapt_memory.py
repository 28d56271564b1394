"""What an adaptation needs in memory, said before it begins, and the batch that keeps it within a limit.

State is counted; what a step takes is measured on a real one, forward and backward or twice forward, at a
learning rate of 0, which moves nothing. A step of 2n rows takes at most twice what one of n takes, so a limit
is approached from below: no trial goes beyond it. Python, PyTorch and other libraries are not counted: they
are there before. glibc keeps freed blocks of up to 32 MB, which nearly doubled what a process held:
`return_freed` forbids it.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitsmith.errors import RecipeError
from bitsmith.optim import IntegerOptimizer, ZerothOrder
from bitsmith.tasks import Examples
from bitsmith.tasks.examples import SPLITS
from bitsmith.tasks.labelled import Labelled
from bitsmith.train.batches import Batches
from bitsmith.train.distillation import cross_entropy
from bitsmith.train.peak import PeakBytes
from bitsmith.train.run import frozen_statistics

KEPT = 1.1  # bytes that an allocator holds for each one of short-lived tensors: measured, rounded up
AROUND = 8_000_000  # Python objects, small blocks, files that are read: measured, rounded up
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt
LARGE = 65536
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
MakeOptimizer = Callable[[nn.Module, float], IntegerOptimizer | ZerothOrder]


@dataclass(frozen=True)
class Need:
    """Bytes. data: the user's, as they lie in memory; model, optimizer: what is there from step to step;
    step: what a step of ``batch_size`` rows takes beside them, and ``asked`` rows were wanted; answers: of
    the model on the whole test split; skeleton: the float model of a factory's, while the file is read."""

    data: int
    model: int
    optimizer: int
    step: int
    answers: int
    skeleton: int
    batch_size: int
    asked: int

    @property
    def total(self) -> int:
        """The most that is there at one time, with some room. A checkpoint is copied once while it is written
        or read."""
        state = self.model + self.optimizer
        most = max(KEPT * self.step, state, self.answers, self.skeleton - self.optimizer)
        return int(self.data + state + most) + AROUND

    def with_step(self, step: int, batch_size: int) -> Need:
        """The same with another batch."""
        return Need(**{**vars(self), "step": step, "batch_size": batch_size})

    def to_dict(self) -> dict[str, int]:
        """Plain values, the total among them."""
        return {**vars(self), "total": self.total}


def plan_memory(
    model: nn.Module,
    data: Examples,
    make: MakeOptimizer,
    asked: int,
    limit: int | None,
    *,
    answers: int = 0,
    skeleton: int = 0,
) -> Need:
    """What training takes at ``asked`` rows, or at as many as the limit allows.

    answers: numbers that the model answers to a row. Raises RecipeError, naming the need, where not even one
    row fits.
    """
    asked = min(asked, len(data.train_x))
    optimizer = make(model, 0.0)
    state = _bytes(optimizer.tensors().values())
    _let_go(optimizer)
    rows = (
        len(data.test_x) * answers * 12 if isinstance(data, Labelled) else 0
    )  # float32, and float64 to score
    held = [tensor for split in SPLITS for tensor in data.split(split)]
    need = Need(_bytes(held), _bytes(_tensors(model)), state, 0, rows, skeleton, 0, asked)
    if limit is None:
        return need.with_step(step_bytes(model, data, make, asked), asked)
    if need.total > limit:
        raise _too_little(need, limit)
    least = min(2 if any(isinstance(m, _BatchNorm) for m in model.modules()) else 1, asked)
    found = need.with_step(step_bytes(model, data, make, least), least)
    if found.total > limit:
        raise _too_little(found, limit)
    while found.batch_size < asked:
        more = min(2 * found.batch_size, asked)
        if _scaled(found, more).total > limit:
            break
        found = need.with_step(step_bytes(model, data, make, more), more)
    while found.batch_size < asked:
        between = max(
            (n for n in range(found.batch_size, asked + 1) if _scaled(found, n).total <= limit), default=0
        )
        if between <= found.batch_size:
            break
        found = need.with_step(step_bytes(model, data, make, between), between)
    return found


def _scaled(need: Need, rows: int) -> Need:
    """What ``rows`` take at most."""
    return need.with_step(-(-need.step * rows // need.batch_size), rows)


def _too_little(need: Need, limit: int) -> RecipeError:
    rows = f"a batch of {need.batch_size}" if need.batch_size else "its data and state alone"
    return RecipeError(
        "this adaptation needs more memory",
        where="--memory-limit",
        got=in_megabytes(limit),
        expected=f"at least {in_megabytes(need.total)} with {rows}",
        remedy="Raise the limit, or give fewer or smaller examples",
    )


def step_bytes(model: nn.Module, data: Examples, make: MakeOptimizer, rows: int) -> int:
    """The most bytes of tensors that a training step of ``rows`` rows makes and holds. It changes nothing
    (forward-only training puts floats on its lattice, which it does again)."""
    batches = Batches(
        data.train_x, data.train_y, batch_size=rows, augment=data.augment, augment_both=data.augment_both
    )
    batchnorms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    training = {module: module.training for module in model.modules()}
    optimizer = make(model.train(), 0.0)
    known = [*_tensors(model), *optimizer.tensors().values(), data.train_x, data.train_y]
    try:
        with (
            torch.random.fork_rng(devices=[]),
            frozen_statistics(batchnorms),
            torch.enable_grad(),
            PeakBytes(known) as seen,
        ):
            (part,) = batches.step(0)

            def loss() -> Tensor:
                return cross_entropy(model(part.x).float(), part.y)

            if isinstance(optimizer, ZerothOrder):
                optimizer.step(loss)
            else:
                loss().backward()
                optimizer.step()
    finally:
        _let_go(optimizer)
        for module, was in training.items():
            module.training = was
        for parameter in model.parameters():
            parameter.grad = None
    return seen.peak


def _let_go(optimizer: IntegerOptimizer | ZerothOrder) -> None:
    if isinstance(optimizer, IntegerOptimizer):
        optimizer.detach()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def return_freed() -> None:
    """Let glibc give every freed block of 64 KiB and more back to the system, from now on; where there is
    another C library, it stays as it is."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, LARGE)
        libc.malloc_trim(0)


def parse_bytes(text: str, where: str = "--memory-limit") -> int:
    """ "200MB", "1.5 GB", "512MiB" or a number of bytes. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS:
        raise RecipeError(
            "this is no amount of memory", where=where, got=text, expected="such as 200MB or 1.5GiB"
        )
    return int(float(found[1]) * UNITS[found[2]])


def in_megabytes(count: int) -> str:
    """As a limit is given, rounded up."""
    return f"{-(-count // 10**5) / 10:g} MB"
