"""Products of integers: every backend gives the integers of the definition, and floats rounded in one
order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.kernels.choose import Backend, best
from bitsmith.kernels.operands import Activations, Codes, pack_nibbles, unpack_nibbles
from bitsmith.kernels.torch_path import TorchPath
from bitsmith.numerics.affine import quantize
from bitsmith.numerics.pack import pack as dense
from bitsmith.numerics.pack import pack_runs
from tests.kernels.shapes import FILLS, SHAPES, filled, integers

WIDTHS = st.integers(1, 8)
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=20, deadline=None)


@few
@given(SHAPES, WIDTHS, FILLS, FILLS, st.integers(-255, 255), SEEDS)
def test_integers_are_those_of_the_definition(
    backend: Backend, shape, bits, left, right, offset, seed
) -> None:
    m, k, n = shape
    a = filled((m, k), -128, 127, torch.int8, left, seed)
    codes = filled((n, k), 0, 2**bits - 1, torch.uint8, right, seed + 1)
    found = backend.sums(Activations(a), backend.pack(codes, bits, offset=offset))
    assert torch.equal(found, integers(a, codes.long() + offset))


@few
@given(SHAPES, WIDTHS, st.booleans(), st.booleans(), st.booleans(), FILLS, SEEDS)
def test_zero_points_offsets_and_half_steps_are_taken_in(
    backend: Backend, shape, bits, unsigned, by_row, half, fill, seed
) -> None:
    m, k, n = shape
    low, dtype = (0, torch.uint8) if unsigned else (-128, torch.int8)
    a = filled((m, k), low, low + 255, dtype, fill, seed)
    codes = filled((n, k), 0, 2**bits - 1, torch.uint8, fill, seed + 1)
    offset = filled((n, 1), -255, 0, torch.int32, "random", seed + 2)
    zero = filled((m,), low, low + 255, torch.int32, "random", seed + 3)
    point = zero if by_row or not m else int(zero[0])
    weight = backend.pack(codes, bits, offset=offset, half=half)
    found = backend.sums(Activations(a, point), weight)
    centred = a.long() - (zero[:, None].long() if isinstance(point, Tensor) else point)
    level = (codes.long() + offset) * 2 + 1 if half else codes.long() + offset
    assert torch.equal(found, integers(centred, level))


@few
@given(SHAPES, WIDTHS, st.sampled_from([None, 1, 13, 32, 100, 128, 1500]), st.booleans(), SEEDS)
def test_floats_are_equal_bit_for_bit(backend: Backend, shape, bits, group_size, biased, seed) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    groups = -(-max(k, 1) // min(group_size or max(k, 1), max(k, 1)))
    codes = filled((n, k), 0, 2**bits - 1, torch.uint8, "random", seed)
    x = Activations(
        filled((m, k), 0, 255, torch.uint8, "random", seed),
        filled((m,), 0, 255, torch.int32, "random", seed),
        torch.rand(m, generator=generator),
    )
    bias = torch.randn(n, generator=generator) if biased else None
    arguments = {"group_size": group_size, "offset": -3, "scale": torch.rand(n, groups, generator=generator)}
    plain = TorchPath()
    expected = plain.values(x, plain.pack(codes, bits, **arguments), bias)
    assert torch.equal(backend.values(x, backend.pack(codes, bits, **arguments), bias), expected)


@few
@given(SHAPES, st.sampled_from([(-128, 127), (0, 255), (-8, 7), (0, 15)]), st.booleans(), SEEDS)
def test_results_become_codes_of_the_next_grid(backend: Backend, shape, bounds, packed, seed) -> None:
    m, k, n = shape
    low, high = bounds
    packed = packed and high - low == 15
    a = filled((m, k), -128, 127, torch.int8, "random", seed)
    codes = filled((n, k), 0, 7, torch.uint8, "random", seed)
    weight = backend.pack(codes, 3, offset=-4, scale=torch.full((n, 1), 0.25))
    to = Codes(scale=3.0, low=low, high=high, zero_point=2, packed=packed)
    found = backend.codes(Activations(a, 0, torch.tensor([0.5])), weight, to)
    values = integers(a, codes.long() - 4).float() * 0.25 * 0.5
    expected = quantize(values, torch.tensor(3.0), low, high, 0.0, 2)
    assert torch.equal((unpack_nibbles(found, n, low) if packed else found).float(), expected)


@few
@given(SHAPES, st.sampled_from([-8, 0]), SEEDS)
def test_codes_of_four_bits_are_read_two_in_a_byte(backend: Backend, shape, low, seed) -> None:
    m, k, n = shape
    a = filled((m, k), low, low + 15, torch.int8, "random", seed)
    codes = filled((n, k), 0, 15, torch.uint8, "random", seed + 1)
    packed = Activations(pack_nibbles(a, low), 0, None, packed=(k, low))
    assert torch.equal(backend.sums(packed, backend.pack(codes, 4)), integers(a, codes))


@few
@given(SHAPES, FILLS, SEEDS)
def test_gradients_of_a_linear_layer_are_products_of_transposed_bytes(
    backend: Backend, shape, fill, seed
) -> None:
    """y = x w: dx = dy w (m, n) (n, k) and dw = dy x (n, m) (m, k), from row-major bytes without copies."""
    m, k, n = shape
    dy = filled((m, n), -128, 127, torch.int8, fill, seed)
    w = filled((n, k), -128, 127, torch.int8, fill, seed + 1)
    x = filled((m, k), -128, 127, torch.int8, fill, seed + 2)
    assert torch.equal(backend.sums(Activations(dy), backend.pack(w.t(), 8)), integers(dy, w.t()))
    into = torch.ones(n, k, dtype=torch.int32)
    expected = integers(dy.t(), x.t()) + 1
    assert torch.equal(backend.sums(Activations(dy.t()), backend.pack(x.t(), 8), out=into), expected)


@few
@given(SHAPES, WIDTHS, st.sampled_from([None, 5, 32, 96]), SEEDS)
def test_packed_codes_come_back(backend: Backend, shape, bits, group_size, seed) -> None:
    codes = filled(shape[1:], 0, 2**bits - 1, torch.uint8, "random", seed)
    assert torch.equal(backend.unpack(backend.pack(codes, bits, group_size=group_size)), codes)


@few
@given(st.integers(0, 200), WIDTHS, st.integers(0, 9), SEEDS)
def test_the_native_formats_stream_is_read(backend: Backend, count, bits, skipped, seed) -> None:
    codes = filled((skipped + count,), 0, 2**bits - 1, torch.uint8, "random", seed)
    stream = dense(codes.to(torch.int16), bits, 0)
    assert torch.equal(backend.decode(stream, bits, count, skipped * bits), codes[skipped:])


@few
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=2, max_size=4))
def test_codes_of_several_widths_follow_one_another_in_a_stream(
    backend: Backend, runs: list[tuple[int, int]]
) -> None:
    codes = [torch.randint(0, 2**bits, (count,)) for bits, count in runs]
    stream = pack_runs([(values, bits, 0) for values, (bits, _) in zip(codes, runs, strict=True)])
    start = 0
    for values, (bits, count) in zip(codes, runs, strict=True):
        assert torch.equal(backend.decode(stream, bits, count, start), values.to(torch.uint8))
        start += bits * count
    with pytest.raises(ValueError, match="leave"):
        backend.decode(stream, 8, stream.numel() + 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(backend: Backend, threads: int) -> None:
    a = filled((300, 90), -128, 127, torch.int8, "random", 0)
    codes = filled((150, 90), 0, 7, torch.uint8, "random", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(backend.sums(Activations(a), backend.pack(codes, 3)), integers(a, codes))
    finally:
        torch.set_num_threads(before)


def test_a_packed_weight_takes_its_bits() -> None:
    backend = best()
    if isinstance(backend, TorchPath):
        pytest.skip("torch keeps a byte a code")
    for bits in range(1, 9):
        codes = torch.zeros(64, 128, dtype=torch.uint8)
        assert backend.pack(codes, bits).data.numel() == 64 * 128 * bits // 8


@pytest.mark.parametrize("k", [31, 40000])
def test_operands_that_do_not_fit_are_refused(backend: Backend, k: int) -> None:
    weight = backend.pack(torch.zeros(4, 40000, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"do not meet|32768"):
        backend.sums(Activations(torch.zeros(2, k, dtype=torch.int8)), weight)


@pytest.mark.parametrize(
    "out", [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4), torch.zeros(4, 2, dtype=torch.int32).t()]
)
def test_memory_that_does_not_hold_the_result_is_refused(out: Tensor) -> None:
    backend = best()
    if isinstance(backend, TorchPath):
        pytest.skip("torch checks its own operands")
    weight = backend.pack(torch.zeros(4, 8, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"hold|int32"):
        backend.sums(Activations(torch.zeros(2, 8, dtype=torch.int8)), weight, out=out)
