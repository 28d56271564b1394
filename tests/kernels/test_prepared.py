"""A prepared product gives what its two steps give, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.native import Native
from bitsmith.kernels.prepared import PreparedProduct


@pytest.fixture
def library(backend: Backend) -> Native:
    if not isinstance(backend, Native):
        pytest.skip("torch's operators take tensors: there is nothing to prepare")
    return backend


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40)),
    bits=st.integers(1, 8),
    grid=st.sampled_from([(-128, 127), (-8, 7), (0, 255), (0, 3)]),
    how=st.sampled_from(["static", "zero point", "per token", "per token, asymmetric"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_it_is_quantize_and_values(
    library: Native,
    sizes: tuple[int, int, int],
    bits: int,
    grid: tuple[int, int],
    how: str,
    options: tuple[bool, bool, bool],
) -> None:
    (m, k, n), (low, high), (grouped, biased, offsets) = sizes, grid, options
    torch.manual_seed(m * k + n)
    group = 32 if grouped else None
    groups = -(-k // (group or k))
    offset = torch.randint(-9, 3, (n, groups), dtype=torch.int32) if offsets else -(2 ** (bits - 1))
    weight = library.pack(
        torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        bits,
        group_size=group,
        offset=offset,
        scale=torch.rand(n, groups) + 0.1,
    )
    bias = torch.randn(n) if biased else None
    static = how in ("static", "zero point")
    zero = (low + high) // 2 if how == "zero point" else 0
    more = {"scale": torch.tensor([0.03]), "zero_point": zero} if static else {}
    more |= {"asymmetric": how.endswith("asymmetric")}
    product = PreparedProduct(library, weight, bias, low=low, high=high, **more)
    for rows in (m, 1):
        x = torch.randn(rows, k)
        assert torch.equal(product(x), library.values(library.quantize(x, low, high, **more), weight, bias))


def test_it_keeps_the_memory_that_it_reads(library: Native) -> None:
    def made() -> PreparedProduct:
        weight = library.pack(torch.full((16, 32), 3, dtype=torch.uint8), 2, scale=torch.ones(16, 1))
        return PreparedProduct(library, weight, torch.ones(16), low=-128, high=127, scale=torch.ones(1))

    product = made()
    [torch.full((16, 32), 7.0) for _ in range(50)]
    assert torch.equal(product(torch.ones(2, 32)), torch.full((2, 16), 97.0))


def test_a_parameter_of_another_size_is_refused(library: Native) -> None:
    weight = library.pack(torch.zeros(4, 8, dtype=torch.uint8), 2, scale=torch.ones(4, 1))
    with pytest.raises(ValueError, match="3 parameters where the product takes 4"):
        PreparedProduct(library, weight, torch.ones(3), low=0, high=255)
