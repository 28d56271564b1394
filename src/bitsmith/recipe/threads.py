"""How many threads a job is worth: a deterministic choice, as results depend on it to the last bit.

PyTorch takes all cores for any model. Threads that have next to nothing to do wait for each other, and where
another process holds a core they wait for it in every operator: the digits CNN, 20 + 20 epochs on two cores
with other work on them, took 158 s with two threads and 20 s with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SMALL_STEP = 2e8  # multiply-accumulates in the forward of a batch: some 10 ms on one core


@contextlib.contextmanager
def enough_threads(model: nn.Module, example: Tensor, batch_size: int) -> Iterator[None]:
    """One thread inside, if ``batch_size`` rows are a small step for ``model``; else as many as before."""
    with threads_for(multiply_accumulates(model, example) * batch_size):
        yield


@contextlib.contextmanager
def threads_for(step: float) -> Iterator[None]:
    """The same where the multiply-accumulates of a forward are known."""
    before = torch.get_num_threads()
    if step < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def multiply_accumulates(model: nn.Module, example: Tensor) -> float:
    """Of one forward of one sample, by PyTorch's own counter."""
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(example)
    model.train(was_training)
    return counter.get_total_flops() / 2 / len(example)
