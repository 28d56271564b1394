"""Granularity: how many values share a scale, as a view of the tensor.

A tensor x is looked at as blocks such that a scale of shape ``scale_shape`` broadcasts against it:

    granularity   weight (out, ...)                      activation
    tensor        one scale                              one scale
    channel       one per out channel                    one per feature (image: channel, else last axis)
    group         one per `group_size` inputs of a row   one per `group_size` features of a token
    token         -                                      one per position: the last axis shares (dynamic only)

Only groups need another shape than x itself; a ragged last group is padded with copies of its last value,
which leave its range alone, and cut off again.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel", "group", "token"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


def group_count(length: int, group_size: int) -> int:
    """Groups in a row of ``length`` values."""
    return math.ceil(length / group_size)


def to_groups(x: Tensor, group_size: int, flatten: bool) -> Tensor:
    """(rows, ..., length) -> (..., groups, group_size); ``flatten`` joins all axes but the first."""
    rows = x.flatten(1) if flatten else x
    length = rows.shape[-1]
    padding = group_count(length, group_size) * group_size - length
    if padding:
        rows = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], padding)], -1)
    return rows.unflatten(-1, (-1, group_size))


def from_groups(blocks: Tensor, like: Tensor, flatten: bool) -> Tensor:
    """The inverse of ``to_groups``: padding cut off, shape of ``like``."""
    rows = blocks.flatten(-2)
    length = math.prod(like.shape[1:]) if flatten else like.shape[-1]
    return rows[..., :length].reshape(like.shape)


def rows_of(x: Tensor, granularity: Granularity, group_size: int | None, axis: int, flatten: bool) -> Tensor:
    """x as (scales, values per scale): what calibration looks at. ``axis`` is the channel axis."""
    match granularity:
        case "tensor":
            return x.reshape(1, -1)
        case "channel":
            return x.movedim(axis, 0).reshape(x.shape[axis], -1)
        case "group":
            assert group_size is not None
            return to_groups(x, group_size, flatten).flatten(0, -2)
        case "token":
            return x.flatten(0, -2)
    raise ValueError(f"granularity {granularity!r} is not one of {GRANULARITIES}")


def shared_axes(ndim: int, granularity: Granularity, axis: int) -> list[int]:
    """The axes along which values of a tensor (of groups: of its blocks) share a scale; ``axis``: its channel
    axis."""
    if granularity in ("token", "group"):
        return [ndim - 1]
    return [a for a in range(ndim) if granularity == "tensor" or a != axis % ndim]
