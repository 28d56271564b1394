"""calibrate: ranges from what the float model does, and the refusals that protect them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, SiteError
from bitsmith.quantization import Scheme, calibrate, check_calibrated, prepare, sites
from bitsmith.quantization.observe import SAMPLE_PER_BATCH

W4 = Scheme(bits=4, granularity="channel")


def model(activations: Scheme, **arguments) -> nn.Sequential:
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    prepare(float_model, W4, activations, first_last_bits=None, **arguments)
    return float_model


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(10, 6, generator=generator) for _ in range(count)]


def test_ranges_come_from_the_float_model_in_eval_mode() -> None:
    prepared = model(Scheme(bits=8, calibration="minmax"))
    calibrate(prepared, batches())
    x = torch.cat(batches())
    hidden = prepared[0]._parameters
    hidden = nn.functional.linear(x, hidden["weight"], hidden["bias"]).relu()
    expected = hidden.max() / 255
    torch.testing.assert_close(sites(prepared)["3.input"].levels().scale, expected.detach().view(1))
    assert sites(prepared)["3.input"].grid_name() == "unsigned"
    assert sites(prepared)["0.input"].grid_name() == "symmetric"
    check_calibrated(prepared)


def test_calibrating_leaves_no_trace_but_ranges() -> None:
    prepared = model(Scheme(bits=8))
    prepared[2].eval()
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    calibrate(prepared, batches())
    assert [m.training for m in prepared] == [True, True, False, True], "each module in its own mode"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in prepared.modules())
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, state[name])}
    assert {name.split(".", 1)[1].split(".")[0] for name in changed} == {"input_quantizer"}


def test_per_channel_ranges_are_those_of_the_features() -> None:
    prepared = model(Scheme(bits=8, granularity="channel", calibration="minmax", grid="symmetric"))
    x = torch.cat(batches()) * torch.arange(1.0, 7)
    calibrate(prepared, [x])
    low, high = x.amin(0), x.amax(0)
    expected = torch.maximum(-low / 128, high / 127)
    torch.testing.assert_close(sites(prepared)["0.input"].levels().scale, expected)


def test_min_and_max_are_exact_however_large_the_batch() -> None:
    prepared = model(Scheme(bits=8, calibration="minmax"))
    x = torch.zeros(SAMPLE_PER_BATCH, 6)
    x[4321, 1], x[777, 5] = 9.0, -8.5
    calibrate(prepared, [x, torch.ones(2, 6)])
    at = sites(prepared)["0.input"].levels()
    assert float(at.scale * at.high) == pytest.approx(9.0, rel=0.01)


def test_a_generator_of_tuples_is_as_good_as_a_list_of_tensors() -> None:
    first, second = model(Scheme(bits=8)), model(Scheme(bits=8))

    def tuples() -> Iterator[tuple[Tensor]]:
        yield from ((x,) for x in batches())

    calibrate(first, batches())
    calibrate(second, tuples())
    a, b = first.state_dict(), second.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(10 * x)

    twice = Twice()
    prepare(twice, None, Scheme(bits=8, calibration="minmax", grid="symmetric"))
    x = torch.randn(5, 4)
    calibrate(twice, [x])
    bound = torch.maximum(10 * x.max() / 127, -10 * x.min() / 128)
    torch.testing.assert_close(twice.layer.input_quantizer.levels().scale, bound.view(1))


# ---- refusals


@pytest.mark.parametrize("parameter", ["range", "zero_shift"])
def test_trained_ranges_are_not_wiped_unless_asked(parameter: str) -> None:
    prepared = model(Scheme(bits=8, range="lsq+"))
    calibrate(prepared, batches())
    fresh = {name: value.clone() for name, value in prepared.state_dict().items()}
    calibrate(prepared, batches())  # untrained ones may be calibrated again
    with torch.no_grad():
        getattr(sites(prepared)["3.input"], parameter).fill_(0.75)
    with pytest.raises(SiteError, match=r"3\.input: this range was trained.*overwrite=True"):
        calibrate(prepared, batches())
    calibrate(prepared, batches(), overwrite=True)
    assert all(torch.equal(value, fresh[name]) for name, value in prepared.state_dict().items())


def test_a_dead_site_is_named() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.unused.weight)

    bypass = Bypass()
    prepare(bypass, W4, Scheme(bits=8))
    with pytest.raises(SiteError, match=r"unused\.input: the quantizer of this site was never called.*32"):
        calibrate(bypass, [torch.randn(2, 4)])


def test_no_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="there is no batch to calibrate on"):
        calibrate(model(Scheme(bits=8)), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_name_their_batch(value: float) -> None:
    bad = batches()
    bad[1][3, 2] = value
    with pytest.raises(DataError, match="batch 1: calibration data has NaN or infinite values"):
        calibrate(model(Scheme(bits=8)), bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_site(value: float) -> None:
    """A single one among many, which a sample might miss."""
    prepared = model(Scheme(bits=8))
    prepared[1].register_forward_hook(
        lambda _, __, y: y.index_put((torch.tensor([12_345]), torch.tensor([3])), torch.tensor(value))
    )
    with pytest.raises(DataError, match=r"3\.input: activations are not finite here"):
        calibrate(prepared, [torch.randn(SAMPLE_PER_BATCH, 6)])
    assert prepared.training
    assert not any(q._forward_pre_hooks for q in sites(prepared).values())
