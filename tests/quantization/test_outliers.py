"""Outlier channels in a layer of their own: the same function, fewer errors, counted and stored."""

import json

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SchemeError, SiteError
from bitsmith.export.native import load, read_stored, save, write_stored
from bitsmith.quantization import Scheme, calibrate, measure, prepare
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.outliers import SplitLinear, split_outliers

INJECTED = [3, 40]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(256, 64, generator=GENERATOR)
X[:, INJECTED] *= 40


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def split_net() -> nn.Module:
    made = net()
    assert split_outliers(made, [X[:128], X[128:]], share=0.04) == {"0": INJECTED}
    return made


def quantized(made: nn.Module, calibration: str = "minmax") -> nn.Module:
    keep = {"*.outliers.*": {"bits": 8}} if isinstance(made[0], SplitLinear) else {}
    weights = Scheme(bits=8, granularity="channel")
    prepare(made, weights, Scheme(bits=4, calibration=calibration), overrides=keep, first_last_bits=None)
    calibrate(made, [X])
    return made.eval()


def test_the_parts_compute_what_the_whole_did() -> None:
    torch.testing.assert_close(split_net()(X), net()(X), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
def test_with_injected_outliers_the_error_falls_far_below_what_clipping_reaches(calibration: str) -> None:
    wanted = net()(X)

    def error(made: nn.Module) -> Tensor:
        return (made(X) - wanted).square().mean() / wanted.var()

    assert error(quantized(split_net(), calibration)) < 0.2 * error(quantized(net(), calibration))


def test_the_cost_counts_both_parts_at_their_widths() -> None:
    cost = measure(quantized(split_net()), X[:1])
    first, last = 32 * (2 * 8 * 8 + 62 * 8 * 4), 8 * 32 * 8 * 4
    assert cost.bops(cost.present) == first + last


def test_the_native_file_holds_both_parts_at_their_widths(tmp_path) -> None:
    packed = finalize(quantized(split_net()), X[:4])
    save(packed, tmp_path)
    for into in (net(), split_net()):  # the file says where it is split
        again = load(tmp_path, into=into, kernels=False)
        assert again[0].outliers.input.form.bits == 8
        assert again[0].rest.input.form.bits == 4
        assert torch.equal(again(X), packed(X))


@pytest.mark.parametrize(
    "splits", [{"1": [0]}, {"5": [0]}, {"0": [64]}, {"0": []}, {"0": list(range(64))}, {"": [0]}]
)
def test_a_split_that_does_not_fit_leaves_the_model_as_it_is(splits: dict[str, list[int]], tmp_path) -> None:
    save(finalize(quantized(split_net()), X[:4]), tmp_path)
    config, tensors = read_stored(tmp_path)
    write_stored(tmp_path, json.dumps({**config, "split": splits}).encode(), tensors)
    into = net()
    with pytest.raises(FormatError, match=r"cannot be (put together|split)"):
        load(tmp_path, into=into)
    assert type(into[0]) is nn.Linear


def test_a_model_without_outliers_stays_as_it_is() -> None:
    made = net()
    assert split_outliers(made, [torch.randn(64, 64, generator=GENERATOR)]) == {}
    assert type(made[0]) is nn.Linear


def test_a_tied_weight_stays_whole() -> None:
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    made[1].weight = made[0].weight
    assert split_outliers(made, [X]) == {}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SiteError, match="matches no Linear"):
        split_outliers(net(), [X], layers=["1"])
    with pytest.raises(SchemeError, match="share"):
        split_outliers(net(), [X], share=0)
