"""Learning-rate schedules against their formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.train.schedule import SCHEDULES, learning_rate_factor


def factors(schedule: str, steps: int, warmup: float = 0.0, cooldown: float = 0.0) -> list[float]:
    return [
        learning_rate_factor(schedule, step, steps, warmup=warmup, cooldown=cooldown) for step in range(steps)
    ]


def test_cosine_follows_half_a_cosine() -> None:
    assert factors("cosine", 8) == pytest.approx([(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)])


def test_warm_up_rises_linearly_and_then_the_peak_is_reached() -> None:
    assert factors("constant", 10, warmup=0.3) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_cosine_after_warm_up_spans_the_remaining_steps() -> None:
    expected = [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert factors("cosine", 10, warmup=0.2) == pytest.approx(expected)


def test_warmup_stable_decay_holds_the_peak_and_decays_over_its_share() -> None:
    expected = [0.5] + [1.0] * 5 + [1.0, 0.75, 0.5, 0.25]
    assert factors("wsd", 10, warmup=0.1, cooldown=0.4) == pytest.approx(expected)


def test_without_cooldown_wsd_is_constant() -> None:
    assert factors("wsd", 6) == [1.0] * 6


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    cooldown=st.floats(0, 1),
)
def test_every_step_trains_and_none_exceeds_the_peak(
    schedule: str, steps: int, warmup: float, cooldown: float
) -> None:
    values = factors(schedule, steps, warmup, cooldown)
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1
