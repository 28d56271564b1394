"""A target refuses, before training, what its files cannot hold."""

import dataclasses

import pytest

from bitsmith.errors import TargetError
from bitsmith.quantization import TARGETS, Scheme, get_target

GROUPS = Scheme(bits=4, granularity="group", group_size=4)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_holds_plain_schemes_of_every_width(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    assert get_target(target) is target
    for bits in range(1, 9):
        target.check("head.weight", "weight", Scheme(bits=bits, granularity="channel"), "Linear")
        target.check("head.input", "activation", Scheme(bits=bits), "Linear")
        assert bits <= target.weight_containers[bits] <= 8


@pytest.mark.parametrize(
    ("target", "kind", "scheme", "layer", "where"),
    [
        ("native", "weight", Scheme(granularity="token", range="dynamic"), "Linear", "granularity"),
        ("onnxruntime", "activation", Scheme(granularity="channel"), "Linear", "granularity"),
        ("onnxruntime", "activation", Scheme(range="dynamic"), "Linear", "range"),
        ("onnxruntime", "weight", Scheme(grid="asymmetric"), "Linear", "grid"),
        ("onnxruntime", "weight", GROUPS, "Conv2d", "granularity"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_with_its_site(
    target: str, kind: str, scheme: Scheme, layer: str, where: str
) -> None:
    with pytest.raises(TargetError, match=f"target {target} ") as error:
        get_target(target).check("head.x", kind, scheme, layer)
    assert error.value.where == f"head.x.{where}"
    assert error.value.expected
    get_target("native").check("head.weight", "weight", GROUPS, "Conv2d")


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"got onnxruntim, .*Did you mean onnxruntime"):
        get_target("onnxruntim")


def test_widths_per_channel_are_held_or_refused() -> None:
    each = Scheme(bits=(2, 4, 4), granularity="channel")
    assert [get_target(name).channel_widths for name in TARGETS] == ["own", "widest", "own"]
    for name in TARGETS:
        get_target(name).check("head.weight", "weight", each, "Linear")
    one = dataclasses.replace(TARGETS["native"], name="one", channel_widths="none")
    with pytest.raises(TargetError, match=r"head\.weight\.bits: target one holds one width .*such as native"):
        one.check("head.weight", "weight", each, "Linear")
    few = dataclasses.replace(TARGETS["native"], name="few", weight_containers={4: 4})
    with pytest.raises(TargetError, match=r"head\.weight\.bits: .*stores no such width; got 2"):
        few.check("head.weight", "weight", each, "Linear")
    npu = dataclasses.replace(TARGETS["native"], name="npu", pairs=((4, 8),))
    with pytest.raises(TargetError, match=r"multiplies no such width; got 2"):
        npu.check("head.weight", "weight", each, "Linear")
    assert not npu.multiplies((2, 4), 8)
    assert npu.multiplies((4, 4), 8)
