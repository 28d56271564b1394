"""Directions from a key: their moments, and that pieces, order and repetition do not matter."""

import math

import pytest
import torch

from bitsmith.numerics.noise import BLOCK, NOISES, REACH, energy, key, steps, uniform, uniform_run

COUNT = 4 * BLOCK  # 2^18


def whole(noise: str, *numbers: int) -> torch.Tensor:
    return torch.cat(
        [NOISES[noise](key(*numbers), at, BLOCK, None) for at in range(0, COUNT, BLOCK)]
    ).double()


@pytest.mark.parametrize(("noise", "fourth"), [("normal", 3.0), ("signs", 1.0)])
def test_a_direction_has_the_moments_of_its_name(noise: str, fourth: float) -> None:
    u = whole(noise, 7, 1)
    assert abs(float(u.mean())) < 4 / math.sqrt(COUNT)
    assert float(u.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / COUNT))
    assert float(u.pow(4).mean()) == pytest.approx(fourth, abs=5 * math.sqrt(96 / COUNT))
    assert float(u.abs().max()) <= REACH[noise]


def test_normal_numbers_are_distributed_as_the_error_function_says() -> None:
    u = whole("normal", 3).sort().values
    at = torch.special.ndtr(u)
    distance = (at - (torch.arange(COUNT) + 0.5) / COUNT).abs().max()  # Kolmogorov's
    assert float(distance) < 1.95 / math.sqrt(COUNT)


@pytest.mark.parametrize("noise", list(NOISES))
def test_neighbours_and_other_keys_are_uncorrelated(noise: str) -> None:
    u, limit = whole(noise, 5, 0), 4.5 / math.sqrt(COUNT)
    for other in (
        whole(noise, 5, 1),
        whole(noise, 6, 0),
        u.roll(1),
        u.roll(32),
        u.roll(BLOCK // 2),
        u.roll(BLOCK),
    ):
        assert abs(float((u * other).mean())) < limit


@pytest.mark.parametrize("noise", list(NOISES))
def test_an_element_is_a_function_of_key_and_block(noise: str) -> None:
    make = NOISES[noise]
    again = make(key(1, 2), BLOCK, BLOCK, None)
    assert torch.equal(again, make(key(1, 2), BLOCK, BLOCK, None))
    assert not torch.equal(again, make(key(1, 2), 0, BLOCK, None))
    assert len(make(key(1), 0, 7, None)) == 7


def test_uniform_numbers_depend_on_the_index_alone() -> None:
    index = torch.tensor([5, 0, 70_000, 5], dtype=torch.int32)
    found = uniform(key(9), index.clone())
    assert torch.equal(found, uniform_run(key(9), 0, 70_001)[index.long()])
    assert float(found.min()) >= 0
    assert float(found.max()) < 1


def test_the_words_are_those_of_murmur3() -> None:
    start, stride = key(11, 4)

    def slowly(i: int) -> float:
        h = (i * stride + start) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return ((h ^ (h >> 16)) >> 8) / 2**24

    assert uniform_run(key(11, 4), 0, 50).tolist() == [slowly(i) for i in range(50)]


def test_keys_differ_in_every_number_and_its_place() -> None:
    keys = {key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512
    assert all(stride % 2 for _, stride in keys)


@pytest.mark.parametrize("size", [0.02, 0.5, 1.0, 2.3, 16.0])
def test_whole_steps_have_the_size_and_energy_they_say(size: float) -> None:
    found = steps(key(2), torch.arange(COUNT, dtype=torch.int32), size).double()
    assert set(found.abs().unique().tolist()) <= {math.floor(size), math.ceil(size)}
    assert abs(float(found.mean())) < 5 * math.sqrt(energy(size) / COUNT)
    assert float(found.abs().mean()) == pytest.approx(size, abs=5 / math.sqrt(COUNT))
    assert float(found.square().mean()) == pytest.approx(
        energy(size), abs=10 * size / math.sqrt(COUNT) + 5e-3
    )
