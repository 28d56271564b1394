"""The `train:` section checks itself: every declared range and list of choices is enforced."""

import math

import pytest
import torch

from bitsmith.errors import RecipeError
from bitsmith.train.config import CHOICES, RANGES, TrainConfig, resolve_device


def test_every_setting_has_a_range_or_choices() -> None:
    assert set(TrainConfig.__dataclass_fields__) == set(RANGES) | set(CHOICES)


OUTSIDE = [
    (name, value)
    for name, (low, high, _) in sorted(RANGES.items())
    for value in [low - 1, "text", True, math.nan, *([high * 2] if high < math.inf else [])]
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_a_value_outside_its_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RecipeError) as error:
        TrainConfig(**{name: value})
    assert str(error.value).startswith(f"train.{name}: ")
    assert RANGES[name][2] in str(error.value)


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_an_unknown_choice_lists_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError, match=f"train.{name}: ") as error:
        TrainConfig(**{name: "nonsense"})
    assert all(choice in str(error.value) for choice in CHOICES[name])


def test_a_misspelt_optimizer_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean adamw\?"):
        TrainConfig(optimizer="adam")


def test_a_whole_number_setting_refuses_fractions() -> None:
    with pytest.raises(RecipeError, match="a whole number >= 0"):
        TrainConfig(epochs=1.5)  # type: ignore[arg-type]


def test_a_batch_does_not_split_into_more_parts_than_rows() -> None:
    with pytest.raises(RecipeError, match="accumulation"):
        TrainConfig(batch_size=4, accumulation=5)


def test_wsd_needs_room_for_warm_up_and_cooldown() -> None:
    with pytest.raises(RecipeError, match="more than all steps"):
        TrainConfig(schedule="wsd", warmup=0.5, cooldown=0.6)


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(RecipeError, match="sees no CUDA device"):
        resolve_device("cuda")
