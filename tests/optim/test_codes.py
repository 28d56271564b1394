"""Codes that train: never written before a step, moved within their grids, right in the mean."""

import math

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.optim.zeroth_order import ZerothOrder
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_products import run_on_kernels
from tests.optim.models import Largest, mlp, packed, rows


def codes_of(model: nn.Module) -> list[Tensor]:
    return [m.integers().clone() for m in model.modules() if isinstance(m, PackedWeight)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kernels", [False, True])
def test_codes_are_never_written_before_the_step(bits: int, kernels: bool) -> None:
    model = mlp(hidden=300)
    bs.prepare(model, weights=bs.Scheme(bits=bits), activations=bs.Scheme(bits=8), first_last_bits=None)
    bs.calibrate(model, [rows(50)[0]])
    model = packed(model)
    if kernels:
        assert run_on_kernels(model)
    x, stored = rows(20)[0], [b.clone() for b in model.buffers()]
    outputs, plain = [], model(x)
    before, seen = codes_of(model), []

    def closure() -> float:
        seen.append(codes_of(model))
        outputs.append(model(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stored, strict=True))
        return 1.0

    ZerothOrder(model, lr=0.1, eps=0.75).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stored, strict=True))  # L+ - L- was 0
    assert torch.equal(model(x), plain)
    assert not torch.equal(outputs[0], plain)
    assert not torch.equal(outputs[0], outputs[1])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for was, above, below in zip(before, *seen, strict=True):
        up, down = above - was, below - was
        most = math.ceil(0.75 * 2 ** max(bits - 4, 0))
        inside = (was >= low + most) & (was <= high - most)
        assert torch.equal(up[inside], -down[inside])
        assert int(above.min()) >= low
        assert int(above.max()) <= high
        size = 0.75 * 2 ** max(bits - 4, 0)
        spread = up[inside].double()
        assert float(spread.abs().mean()) == pytest.approx(size, rel=0.1)
        assert abs(float(spread.mean())) < 5 * size * 1.2 / math.sqrt(len(spread))


@pytest.mark.parametrize("residual", [False, True])
def test_steps_of_codes_are_right_in_the_mean(residual: bool) -> None:
    """Of a linear function of the values: each code moves against its gradient, by lr * g / s in units of
    v."""
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    bs.prepare(model, weights=bs.Scheme(bits=4), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 64))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    weight.codes.fill_(0x88)  # codes of 0
    slope = torch.linspace(-1, 1, 512).view(8, 64)
    total = torch.zeros(8, 64)
    for seed in range(200):
        weight.codes.fill_(0x88)
        optimizer = ZerothOrder(model, lr=0.02, eps=0.5, seed=seed, residual=residual)
        optimizer.step(lambda: float((slope * weight.integers()).double().sum()))
        moved = weight.integers().float()
        if residual:
            moved += optimizer.state[weight.codes]["residual"].view(8, 64) / 254
        total += moved
    mean = total / 200
    agreement = float((mean * -slope).sum() / slope.square().sum())
    assert agreement == pytest.approx(0.02, rel=0.25)


def test_a_residual_carries_what_no_whole_code_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    bs.prepare(model, weights=bs.Scheme(bits=8), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 8))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    before = weight.integers().clone()
    optimizer = ZerothOrder(model, lr=1e-4, eps=1 / 16, residual=True)
    optimizer.step(lambda: float(weight.integers().double().sum()))
    assert torch.equal(weight.integers(), before)
    assert bool(optimizer.state[weight.codes]["residual"].any())


def test_rows_of_an_embedding_move_as_the_whole_table_does() -> None:
    model = nn.Sequential(nn.Embedding(500, 20), nn.Linear(20, 2))
    bs.prepare(model, weights=bs.Scheme(bits=4, granularity="channel"), first_last_bits=None)
    model = bs.finalize(model, torch.arange(4)[None])
    index = torch.tensor([[3, 499, 3, 0]])
    looked_up, whole = [], []

    def closure() -> float:
        looked_up.append(model[0](index))
        whole.append(model[0].weight()[index])
        return 0.0

    ZerothOrder(model, lr=0.1, eps=0.5).step(closure)
    assert torch.equal(torch.stack(looked_up), torch.stack(whole))
    assert not torch.equal(looked_up[0], looked_up[1])


def test_channels_of_several_widths_move_within_their_own_grids() -> None:
    model = nn.Sequential(nn.Linear(33, 6))
    bs.prepare(model, weights=bs.Scheme(bits=(2, 4, 8, 2, 4, 8), granularity="channel"), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 33))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    optimizer = ZerothOrder(model, lr=3.0, eps=0.5)
    before = weight.integers().clone()
    for _ in range(5):
        optimizer.step(lambda: float(weight.integers().double().sum()))
    after = weight.integers()
    assert not torch.equal(after, before)
    for row, bits in enumerate((2, 4, 8, 2, 4, 8)):
        assert int(after[row].min()) >= -(2 ** (bits - 1))
        assert int(after[row].max()) < 2 ** (bits - 1)


def test_a_step_of_codes_makes_nothing_larger_than_a_forward_does() -> None:
    model = nn.Sequential(nn.Linear(2048, 1024))
    bs.prepare(model, weights=bs.Scheme(bits=4), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 2048))
    x = torch.randn(4, 2048)
    with torch.no_grad(), Largest() as forward:
        model(x)
    optimizer = ZerothOrder(model, lr=1.0, eps=0.5)
    with Largest() as step:
        optimizer.step(lambda: model(x).square().mean())
    assert 0 < step.bytes <= forward.bytes
