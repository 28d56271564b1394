"""The step of integer optimizers and the streams of codes, on every backend: torch's, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.native import Native
from bitsmith.kernels.operands import Step
from bitsmith.kernels.torch_path import TorchPath
from bitsmith.numerics.pack import pack

few = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**16)
FLAGS = st.tuples(*[st.booleans()] * 4)


def operands(r: int, k: int, block: int, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """codes, d, momentum, residual."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (r, k), generator=generator).to(torch.int8)

    scale = torch.rand(r, -(-k // block), generator=generator).div(50).to(torch.bfloat16)
    d = torch.randn(r, k, generator=generator)
    return whole(-8, 7), d, (whole(-127, 127), scale), whole(-63, 63)


@few
@given(st.integers(0, 9), st.integers(1, 300), st.sampled_from([8, 64, 1024]), FLAGS, SEEDS)
def test_a_step_is_that_of_torch(backend: Backend, r, k, block, flags, seed) -> None:
    with_momentum, with_residual, clip, nearest = flags
    keep = 0.9 if with_momentum else 0.0
    step = Step(-8, 7, keep, 1 - 1 / keep if keep else 0.0, block, clip, nearest, (seed, seed + 1, 99))
    found = []
    for one in (backend, TorchPath()):
        codes, d, momentum, residual = operands(r, k, block, seed)
        counts = one.move(
            codes, d, step, momentum if with_momentum else None, residual if with_residual else None
        )
        found.append((counts, codes, *momentum, residual))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_nothing_of_a_step_is_lost_between_codes_residual_and_momentum(backend: Backend) -> None:
    """codes + residual moves by m~; with ECO's carry codes - b m/(1 - b) by d; up to their own steps."""
    for carried in ("residual", "momentum"):
        codes, d, momentum, residual = operands(8, 256, 64, 3)
        codes, d = torch.zeros_like(codes), d * 0.3
        before = momentum[0].float() * momentum[1].float().repeat_interleave(64, 1)
        with_residual = carried == "residual"
        step = Step(-128, 127, 0.9, 0.0 if with_residual else 1 - 1 / 0.9, 64, nearest=with_residual)
        start = residual.float() / 127 if with_residual else -9 * before
        backend.move(codes, d, step, momentum, residual if with_residual else None)
        scale = momentum[1].float().repeat_interleave(64, 1)
        end = codes + (residual.float() / 127 if with_residual else -9 * momentum[0].float() * scale)
        moved = 0.9 * before + 0.1 * d if with_residual else d
        allowed = torch.full_like(d, 1 / 127) if with_residual else 9 * scale
        assert ((start - end - moved).abs() <= allowed * 1.001).all()


@few
@given(st.integers(1, 8), st.integers(0, 500), SEEDS)
def test_streams_are_those_of_numerics(backend: Backend, bits, count, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    stream = backend.encode(codes, bits)
    assert torch.equal(stream, pack(codes, bits, 0))
    assert torch.equal(backend.decode(stream, bits, count), codes)
    for start in (8, 3):
        if count > start:
            assert torch.equal(backend.decode(stream, bits, count - start, start * bits), codes[start:])


def test_operands_that_do_not_fit_are_refused(backend: Backend) -> None:
    if not isinstance(backend, Native):
        pytest.skip("C is what checks nothing itself")
    codes, d, momentum, residual = operands(4, 32, 8, 0)
    for wrong in ((codes, d[:3], momentum, residual), (codes, d, momentum, residual.t())):
        with pytest.raises(ValueError, match="one shape"):
            backend.move(wrong[0], wrong[1], Step(-8, 7, block=8), wrong[2], wrong[3])
    with pytest.raises(ValueError, match="one shape"):
        backend.move(codes, d, Step(-8, 7, block=16), momentum)
