"""Codes survive packing at every width, and the bytes are the documented bit stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics.pack import pack, pack_runs, packed_size, unpack, unpack_at, unpack_runs
from tests import strategies


def by_hand(codes: list[int], bits: int, low: int) -> list[int]:
    """The layout as its definition: one large little-endian number."""
    number = sum((code - low) << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(packed_size(len(codes), bits), "little"))


@given(strategies.codes())
def test_unpacking_gives_the_packed_codes(example: tuple[Tensor, int, int]) -> None:
    codes, bits, low = example
    packed = pack(codes, bits, low)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((codes.numel() * bits + 7) // 8,)
    unpacked = unpack(packed, bits, codes.numel(), low)
    assert unpacked.dtype == torch.int16
    assert torch.equal(unpacked, codes.reshape(-1).to(torch.int16))


@given(strategies.codes())
def test_bytes_are_one_little_endian_number(example: tuple[Tensor, int, int]) -> None:
    codes, bits, low = example
    assert pack(codes, bits, low).tolist() == by_hand(codes.long().reshape(-1).tolist(), bits, low)


@pytest.mark.parametrize(
    ("codes", "bits", "low", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, 0, [0b00001101, 0b1]),
        ([-2, -1, 0, 1, 1], 2, -2, [0b11100100, 0b11]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, 0, [0b10001000, 0b11000110, 0b11111010]),
        ([-8, 7, 0], 4, -8, [0xF0, 0x08]),
        ([-128, 127, 0], 8, -128, [0, 255, 128]),
    ],
)
def test_layout_of_written_out_examples(codes: list[int], bits: int, low: int, expected: list[int]) -> None:
    assert pack(torch.tensor(codes), bits, low).tolist() == expected


def test_a_transposed_tensor_is_packed_in_its_logical_order() -> None:
    codes = torch.arange(6).reshape(2, 3)
    assert unpack(pack(codes.T, 3, 0), 3, 6, 0).tolist() == [0, 3, 1, 4, 2, 5]


def test_packed_bytes_do_not_keep_a_larger_buffer_alive() -> None:
    packed = pack(torch.zeros(9, dtype=torch.int16), 1, 0)
    assert packed.untyped_storage().nbytes() == packed.numel() == 2


@pytest.mark.parametrize("code", [-3, 2])
def test_a_code_that_does_not_fit_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit 2 bits from -2"):
        pack(torch.tensor([0, code, 1]), 2, -2)


@pytest.mark.parametrize("size", [2, 4])
def test_a_truncated_or_longer_stream_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="take 3 bytes"):
        unpack(torch.zeros(size, dtype=torch.uint8), 3, 8, 0)


# ---- runs of several widths


@given(st.lists(strategies.codes(), min_size=1, max_size=5))
def test_runs_are_one_little_endian_number_and_come_back(examples: list[tuple[Tensor, int, int]]) -> None:
    runs = [(codes, bits, low) for codes, bits, low in examples]
    packed = pack_runs(runs)
    number, place = 0, 0
    for codes, bits, low in runs:
        for code in codes.long().reshape(-1).tolist():
            number |= (code - low) << place
            place += bits
    assert packed.dtype == torch.uint8
    assert packed.tolist() == list(number.to_bytes((place + 7) // 8, "little"))
    found = unpack_runs(packed, [(bits, codes.numel(), low) for codes, bits, low in runs])
    for (codes, _, _), again in zip(runs, found, strict=True):
        assert torch.equal(again, codes.reshape(-1).to(torch.int16))


def test_runs_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="22 bits of codes take 3 bytes, got 4"):
        unpack_runs(torch.zeros(4, dtype=torch.uint8), [(2, 5, -2), (4, 3, -8)])


@given(st.lists(st.tuples(strategies.bit_widths, st.integers(1, 20)), min_size=1, max_size=4), st.data())
def test_single_codes_are_found_wherever_they_begin(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(sum(n for _, n in sizes))
    runs = [(torch.randint(-3, 2**b - 3, (n,), generator=generator), b, -3) for b, n in sizes]
    codes = torch.cat([run for run, *_ in runs])
    bits = torch.cat([torch.full((n,), b) for b, n in sizes])
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=9)))
    found = unpack_at(pack_runs(runs), (bits.cumsum(0) - bits)[index], bits[index], -3)
    assert found.dtype == torch.int16
    assert torch.equal(found.long(), codes[index])
