"""Granularity is a view: what shares a scale, and nothing is lost on the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.numerics.blocks import GRANULARITIES, from_groups, group_count, rows_of, shared_axes, to_groups


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    group_size=st.integers(1, 12),
    flatten=st.booleans(),
)
def test_groups_and_back_is_the_identity(shape: list[int], group_size: int, flatten: bool) -> None:
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    groups = to_groups(x, group_size, flatten)
    length = x[0].numel() if flatten else shape[-1]
    assert groups.shape[-2:] == (group_count(length, group_size), group_size)
    assert groups.shape[0] == shape[0]
    assert torch.equal(from_groups(groups, x, flatten), x)


def test_a_group_holds_neighbouring_inputs_of_one_row() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)  # two output channels of 12 inputs
    assert to_groups(weight, 6, flatten=True).tolist() == [
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23]],
    ]


def test_a_ragged_last_group_is_padded_with_its_last_value() -> None:
    """Zeros would widen the range of a group that holds none."""
    groups = to_groups(torch.tensor([[1.0, 2, 3, 4, 5], [9, 8, 7, 6, -5]]), 4, flatten=True)
    assert groups.tolist() == [[[1, 2, 3, 4], [5] * 4], [[9, 8, 7, 6], [-5] * 4]]


def test_groups_of_an_activation_keep_the_tokens_apart() -> None:
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    groups = to_groups(tokens, 2, flatten=False)
    assert groups.shape == (2, 3, 2, 2)
    assert groups[1, 2].tolist() == [[20, 21], [22, 23]]


def test_gradients_pass_through_groups_unchanged() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    g = torch.randn(3, 5)
    from_groups(to_groups(x, 4, flatten=True), x, flatten=True).backward(g)
    assert torch.equal(x.grad, g)


IMAGE = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("granularity", "group_size", "axis", "flatten", "expected"),
    [
        ("tensor", None, 0, True, [IMAGE.flatten()]),
        ("channel", None, 0, True, [IMAGE[i].flatten() for i in range(2)]),
        ("channel", None, 1, False, [IMAGE[:, i].flatten() for i in range(3)]),
        ("channel", None, -1, False, [IMAGE[..., i].flatten() for i in range(5)]),
        ("group", 30, 0, True, [IMAGE.flatten()[i : i + 30] for i in range(0, 120, 30)]),
        ("group", 5, 0, False, list(IMAGE.reshape(-1, 5))),
        ("token", None, 0, False, list(IMAGE.reshape(-1, 5))),
    ],
)
def test_rows_are_the_values_that_share_a_scale(
    granularity: str, group_size: int | None, axis: int, flatten: bool, expected: list[torch.Tensor]
) -> None:
    assert granularity in GRANULARITIES
    assert torch.equal(rows_of(IMAGE, granularity, group_size, axis, flatten), torch.stack(expected))


def test_an_unknown_granularity_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'row' is not one of .*channel"):
        rows_of(IMAGE, "row", None, 0, True)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shared_axes_are_those_of_the_rows(granularity: str, axis: int) -> None:
    x = torch.randn(2, 3, 4)
    over_axes = x.amax(shared_axes(3, granularity, axis)).flatten()
    assert torch.equal(over_axes, rows_of(x, granularity, None, axis, False).amax(1))
