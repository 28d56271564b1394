"""Bytes that live at the same time, counted by hand."""

import torch
from torch import Tensor

from bitsmith.train.peak import PeakBytes

FLOAT = 4


def test_what_is_made_counts_until_it_is_freed() -> None:
    x = torch.ones(1000)
    with PeakBytes([x]) as seen:
        y = x + 1  # 1000 floats
        y = y.exp() + y[:500].repeat(2)  # and three more, of which the views are none
        del y
    assert (seen.peak, seen.live) == (4 * 1000 * FLOAT, 0)
    assert x.add_(1).sum() == 2000


def test_views_and_changes_in_place_of_what_was_there_count_nothing() -> None:
    x = torch.ones(1000)
    with PeakBytes([x]) as seen:
        x.add_(1).view(10, 100).t().mul_(2)
    assert seen.peak == 0


class Halved(torch.autograd.Function):
    """Keeps a byte for each float, and takes ten times as much for a moment on the way back."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.to(torch.int8))
        return x / 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        torch.empty(10 * g.numel())
        return g / 2


def test_what_backward_keeps_and_takes_is_seen() -> None:
    x = torch.ones(1000, requires_grad=True)
    with PeakBytes([x]) as seen:
        y = Halved.apply(x)
        kept = seen.live
        y.sum().backward()
    assert kept == 1000 * (FLOAT + 1)
    assert seen.peak >= 10 * 1000 * FLOAT + kept
    del y
    assert seen.live == 1000 * FLOAT  # the gradient
