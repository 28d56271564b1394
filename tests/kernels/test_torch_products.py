"""torch's ways to multiply bytes: none is used that the self-test has not seen to be exact."""

import pytest
import torch
from torch import Tensor

from bitsmith.kernels import choose
from bitsmith.kernels.torch_products import PRODUCTS, by_float_blocks, by_int_mm, fastest, is_exact
from tests.kernels.shapes import filled, integers


def saturating(a: Tensor, b: Tensor) -> Tensor:
    """vpmaddubsw as many libraries use it on AVX2: pairs of products add up in 16 bits."""
    k = a.shape[1] // 2 * 2
    pairs = (a[:, None, :k].int() * b[None, :, :k].int()).unflatten(2, (-1, 2)).sum(3)
    rest = a[:, None, k:].int() * b[None, :, k:].int()
    return pairs.clamp(-32768, 32767).sum(2, dtype=torch.int32) + rest.sum(2, dtype=torch.int32)


def test_the_self_test_sees_saturation_where_it_happens() -> None:
    assert is_exact(saturating, 4)
    assert is_exact(saturating, 7)
    assert not is_exact(lambda a, b: saturating((a ^ -128).view(torch.uint8), b) - 128 * b.sum(1), 8)


def test_an_operator_that_is_missing_is_not_exact() -> None:
    def missing(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.quantized.no_such_operator(a, b)

    assert not is_exact(missing, 4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_floats_in_blocks_are_exact_at_every_width(bits: int) -> None:
    assert is_exact(by_float_blocks, bits)
    assert is_exact(PRODUCTS[fastest(bits)], bits)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 5), (1, 64, 16), (7, 1, 3), (4, 64, 1)])
def test_strides_of_axes_of_length_one_mean_nothing(m: int, k: int, n: int) -> None:
    a, b = (filled((rows, k), -2, 2, torch.int8, "random", rows) for rows in (m, n))
    expected = integers(a, b)
    if m == 1:
        a = a.as_strided((1, k), (0, 1))
    assert torch.equal(by_int_mm(a, b), expected)


def test_the_measured_choice_is_kept_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_CACHE", str(tmp_path / "cache"))
    choose._fastest.cache_clear()
    first = choose._fastest(4)
    choose._fastest.cache_clear()
    monkeypatch.setattr(choose, "fastest", lambda bits: pytest.fail("measured twice"))
    assert choose._fastest(4) == first
    choose._fastest.cache_clear()
