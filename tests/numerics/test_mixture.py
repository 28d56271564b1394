"""A mixture of grids in one node: equal to its plain form, forward and backward."""

import pytest
import torch
from torch import Tensor

from bitsmith.numerics.affine import fake_quantize
from bitsmith.numerics.mixture import fake_quantize_mixture


def stacked(shape: tuple[int, ...], half: bool) -> list[Tensor | None]:
    """share, scale, exponent, low, high and half of three grids whose entries have this shape."""
    generator = torch.Generator().manual_seed(1)
    share = torch.softmax(torch.randn(3, *shape, generator=generator), 0)
    scale = 0.2 + torch.rand(3, *shape, generator=generator)
    exponent = 0.3 * torch.randn(3, *shape, generator=generator)
    high = torch.tensor([1.0, 3.0, 7.0]).view(3, *(1,) * len(shape)).expand(3, *shape).contiguous()
    halves = torch.tensor([0.5, 0.0, 0.0]).view(3, *(1,) * len(shape)) if half else None
    return [share, scale, exponent, -high - 1, high, halves]


@pytest.mark.parametrize("clip_only", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("shape", "shares"), [((1,), (1,)), ((4, 1), (4, 1)), ((4, 1), (1,))])
def test_values_and_gradients_are_those_of_the_weighted_sum(
    shape: tuple[int, ...], shares: tuple[int, ...], half: bool, clip_only: bool
) -> None:
    x, g = torch.randn(2, 4, 60, generator=torch.Generator().manual_seed(3))
    share, scale, exponent, low, high, halves = stacked(shape, half)
    share = stacked(shares, half)[0]

    def plain(x: Tensor, share: Tensor, exponent: Tensor) -> Tensor:
        parts = [
            share[k]
            * fake_quantize(
                x,
                scale[k],
                low[k],
                high[k],
                None if halves is None else halves[k],
                exponent=exponent[k],
                clip_only=clip_only,
                count=60,
            )
            for k in range(3)
        ]
        return torch.stack(parts).sum(0)

    def ours(x: Tensor, share: Tensor, exponent: Tensor) -> Tensor:
        return fake_quantize_mixture(
            x, share, scale, exponent, low, high, halves, clip_only=clip_only, count=60
        )

    results = []
    for function in (plain, ours):
        leaves = [t.clone().requires_grad_() for t in (x, share, exponent)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, g)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_one_graph_of_the_same_values() -> None:
    torch.compiler.reset()
    x, share = torch.randn(4, 60), None
    share, *rest = stacked((4, 1), True)

    def run(x: Tensor, share: Tensor) -> Tensor:
        return fake_quantize_mixture(x, share, *rest)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, share), run(x, share))
