"""A target that multiplies some pairs of widths alone: what is prepared and planned for it."""

from pathlib import Path

import pytest
from torch import nn

from bitsmith.errors import TargetError
from bitsmith.quantization import Scheme, commit, plan_of, prepare, sites
from bitsmith.quantization.layers import layer_operands
from bitsmith.tasks.models import build
from tests.quantization.test_target_json import NPU, write

W4, A4, A8 = Scheme(bits=4, granularity="channel"), Scheme(bits=4), Scheme(bits=8)  # NPU: 4 x 8 and 8 x 8


def pairs(model: nn.Module) -> set[tuple[int, int]]:
    return {
        (int(first.quantizer.bits.expected()), int(second.quantizer.bits.expected()))
        for first, second in layer_operands(model)
        if first.quantizer is not None and second.quantizer is not None
    }


def test_a_pair_that_the_target_does_not_list_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    target, model = write(tmp_path, NPU), build("digits_cnn")
    with pytest.raises(TargetError) as error:
        prepare(model, W4, A4, target=target)
    assert str(error.value) == (
        f"conv2.weight x conv2.input: target {target} does not multiply this pair of widths; got 4 x 4 bits, "
        "expected 4 x 8 or 8 x 8. Give these sites the bits of a pair that it lists, by the schemes or an "
        "override."
    )
    assert sites(model) == {}
    prepare(model, W4, A4, target=target, overrides={"*.input": {"bits": 8}})
    assert pairs(model) == {(4, 8), (8, 8)}


def test_products_of_activations_are_checked_too_and_float_is_left_to_the_host(tmp_path: Path) -> None:
    target = write(tmp_path, NPU)
    with pytest.raises(TargetError, match=r"\.left x .*\.right: .*got 8 x 4 bits"):
        prepare(build("digits_vit"), W4, A8, target=target, overrides={"*.right": {"bits": 4}})
    model = build("digits_vit")
    prepare(model, W4, None, target=target)
    model = build("digits_vit")
    prepare(model, W4, A8, target=target, overrides={"*.right": {"bits": 32}})
    assert pairs(model) == {(4, 8), (8, 8)}


def test_a_plan_with_such_a_pair_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = build("digits_cnn")
    prepare(model, W4, A8, target=write(tmp_path, NPU))
    before = plan_of(model).bits
    with pytest.raises(TargetError, match=r"conv3\.weight x conv3\.input: .*got 4 x 4 bits"):
        commit(model, {**before, "conv2.weight": 8, "conv3.input": 4})
    assert plan_of(model).bits == before
    commit(model, {**before, "conv3.weight": 8})
