"""reconstruct: learn smoothing and clipping block by block, each block's output against the float block's.

The start of ZeroQAT (2509.00031) as of OmniQuant (2308.13137): for each block in order, the float model
shows what the block should put out, the quantized one, whose earlier blocks are done, what comes in; Adam
moves the block's transformations alone, by the mean squared error. Backpropagation through one block at a
time; weights stay. A block is a child of the module list that holds smoothed layers, or any module named.
Both models are one: transformations leave the float function alone, so that it runs with its quantizers
passing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError, SiteError, check_value
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.quantization.smoothing import in_float, transformations


@dataclass(frozen=True)
class BlockFacts:
    """Of one block: the mean squared error of its output before and after, over that output's mean square."""

    name: str
    before: float
    after: float


Progress = Callable[[BlockFacts, int, int], None]


class _Reached(Exception):
    """The block was seen; the rest of the forward is not needed."""


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: Sequence[str] | None = None,
    epochs: int = 2,
    lr: float = 5e-3,
    progress: Progress | None = None,
) -> list[BlockFacts]:
    """Learn what `smooth` added to ``model``, in place. batches: of inputs; each is kept while a block is
    learned, as the block's input and output. blocks: names, in the order in which they run. progress: called
    with (facts, blocks done, blocks).

    The learned values are those of the epoch with the least error, the start among them, so that no block is
    worse than before. Raises SiteError (nothing smoothed, a block without transformations or never called),
    SchemeError (epochs, lr), DataError (no batch).
    """
    check_value("epochs", epochs, isinstance(epochs, int) and epochs >= 1, "1 or more")
    check_value("lr", lr, lr > 0, "above 0")
    held = list(batches)
    if not held:
        raise DataError("there is no batch to reconstruct on", where="reconstruct")
    names = list(blocks) if blocks is not None else blocks_of(model)
    facts: list[BlockFacts] = []
    for name in names:
        block = model.get_submodule(name)
        learned = list(transformations(block).values())
        if not learned:
            raise SiteError(
                "this block has nothing to learn", where=name, remedy="Name it in smooth's layers"
            )
        with in_float(model):
            targets = [_look(model, block, name, batch)[1] for batch in held]
        with in_eval_mode(model):
            inputs = [_look(model, block, name, batch)[0] for batch in held]
            facts.append(BlockFacts(name, *_learn(block, learned, inputs, targets, epochs, lr)))
        if progress is not None:
            progress(facts[-1], len(facts), len(names))
    return facts


def blocks_of(model: nn.Module) -> list[str]:
    """The children of module lists that hold transformations, in their order; else the model's children that
    do. Raises SiteError where there are none."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and n]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    for parents in (outer, [""]):
        children = [
            f"{parent}.{name}" if parent else name
            for parent in parents
            for name, child in model.get_submodule(parent).named_children()
            if transformations(child)
        ]
        if children:
            return children
    raise SiteError(
        "nothing of this model is smoothed",
        where=f"reconstruct({type(model).__name__})",
        remedy="Call smooth(model, batches) first",
    )


def _learn(
    block: nn.Module,
    learned: list[nn.Parameter],
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]],
    targets: list[Tensor],
    epochs: int,
    lr: float,
) -> tuple[float, float]:
    """Relative errors before and after."""
    size = sum(float(t.double().square().sum()) for t in targets) or 1.0

    def error() -> float:
        with torch.no_grad():
            off = [_first(block(*a, **k)) - t for (a, k), t in zip(inputs, targets, strict=True)]
        return sum(float(o.double().square().sum()) for o in off) / size

    optimizer = torch.optim.Adam(learned, lr=lr)
    start = least = error()
    best = [p.detach().clone() for p in learned]
    for _ in range(epochs):
        for (arguments, named), target in zip(inputs, targets, strict=True):
            with torch.enable_grad():
                loss = F.mse_loss(_first(block(*arguments, **named)), target)
                gradients = torch.autograd.grad(loss, learned, allow_unused=True)
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        if (now := error()) < least:
            least, best = now, [p.detach().clone() for p in learned]
    with torch.no_grad():
        for parameter, kept in zip(learned, best, strict=True):
            parameter.grad = None
            parameter.copy_(kept)
    return start, least


@torch.no_grad()
def _look(
    model: nn.Module, block: nn.Module, name: str, batch: Any
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
    """((arguments, named arguments), output) of ``block`` in a forward, which ends there."""
    seen: list[Any] = []

    def after(_: nn.Module, arguments: Any, named: Any, output: Any) -> None:
        seen.append(((arguments, named), _first(output)))
        raise _Reached

    hook = block.register_forward_hook(after, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        hook.remove()
    if not seen:
        raise SiteError("the model never calls this block", where=name)
    arguments, output = seen[0]
    return arguments, output


def _first(output: Any) -> Tensor:
    """The tensor that a block hands on: all it gives, or the first of several."""
    found = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(found, Tensor)
    return found
