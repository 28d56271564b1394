"""Smoothing leaves the float function alone, and folding the quantized one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, DataError, SchemeError, SiteError
from bitsmith.quantization.smoothing import (
    ClippedQuantizer,
    SmoothedLinear,
    fold,
    in_float,
    smooth,
    transformations,
)


class Block(nn.Module):
    """q, k and v behind a norm; a second norm that the residual stream reads as well, where ``post``."""

    def __init__(self, rms: bool, post: bool) -> None:
        super().__init__()
        kind: Any = nn.RMSNorm if rms else nn.LayerNorm
        self.first, self.second, self.post = kind(8), kind(8), post
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=not rms) for _ in range(3))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h)
        h = self.second(x)
        return (h if self.post else x) + self.down(F.gelu(self.up(h)))


def net(rms: bool = False, post: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ModuleList([Block(rms, post)])[0], nn.Linear(8, 3))
    for norm in (model[1].first, model[1].second):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data[2] *= 30
        if not rms:
            nn.init.normal_(norm.bias, std=0.3)
    return model.eval()


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def prepared(rms: bool = False, post: bool = False, **scheme: Any) -> nn.Module:
    model = net(rms, post)
    bs.prepare(
        model, weights=bs.Scheme(bits=4, **scheme), activations=bs.Scheme(bits=8), first_last_bits=None
    )
    bs.calibrate(model, batches())
    return model


def scramble(model: nn.Module) -> None:
    """Values as training leaves them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in transformations(model).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("rms", [False, True])
def test_layers_behind_a_norm_are_smoothed_and_the_others_clipped(rms: bool) -> None:
    model = prepared(rms)
    assert smooth(model, batches()) == {
        "0": "clipped; it does not read a norm",
        "1.q": "1.first",
        "1.k": "1.first",
        "1.v": "1.first",
        "1.up": "1.second",
        "1.down": "clipped; it does not read a norm",
        "2": "clipped; it does not read a norm",
    }
    assert model[1].q.smooth is model[1].v.smooth
    assert (model[1].q.shift is None) == rms
    assert torch.sigmoid(model[0].weight_quantizer.clip_high).tolist() == pytest.approx([0.9525741], abs=1e-6)


def test_a_norm_that_something_else_reads_is_left() -> None:
    model = prepared(post=True)
    before = copy.deepcopy(model.state_dict())
    outcome = smooth(model, batches())
    assert outcome["1.q"] == "1.first"
    assert outcome["1.up"] == "clipped; others read 1.second too"
    assert not isinstance(model[1].up, SmoothedLinear)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items() if "quantizer" not in n)


@pytest.mark.parametrize("rms", [False, True])
def test_the_float_function_stays(rms: bool) -> None:
    model, x = prepared(rms), batches(1)[0]
    with in_float(model), torch.no_grad():
        plain = model(x)
    torch.testing.assert_close(plain, net(rms)(x))
    smooth(model, batches())
    scramble(model)
    with in_float(model), torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)


SCHEMES = [
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 4},
    {"granularity": "channel", "grid": "asymmetric"},
    {},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_folding_leaves_outputs_and_the_model_exports(rms: bool, scheme: dict[str, Any]) -> None:
    model, x = prepared(rms, **scheme), batches(1)[0]
    names = set(model.state_dict())
    smooth(model, batches())
    scramble(model)
    bs.calibrate(model, batches(), overwrite=True)
    with torch.no_grad():
        before = model(x)
    with pytest.raises(SiteError, match="Call fold"):
        bs.finalize(model, x)
    assert set(fold(model)) == {"0", "1.q", "1.k", "1.v", "1.up", "1.down", "2"}
    assert not transformations(model)
    assert set(model.state_dict()) == names
    assert not any(isinstance(m, SmoothedLinear | ClippedQuantizer) for m in model.modules())
    with torch.no_grad():
        after = model(x)
        # The norm's division rounds elsewhere: an input may land on the next of 256 levels.
        assert float((after - before).abs().mean()) < 1e-3 * float(before.abs().mean())
        torch.testing.assert_close(bs.finalize(model, x)(x), after, rtol=1e-5, atol=1e-6)


def test_folding_is_exact_where_s_is_a_power_of_two() -> None:
    model, x = prepared(True, granularity="channel"), batches(1)[0]
    smooth(model, batches())
    with torch.no_grad():
        for name, parameter in transformations(model).items():
            if name.endswith("smooth"):
                parameter.round_()
        before = model(x)
    fold(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_a_clipped_range_is_the_formula_of_the_paper() -> None:
    model = prepared(granularity="channel", grid="asymmetric")
    smooth(model, batches())
    quantizer, weight = model[2].weight_quantizer, model[2].weight.detach()
    with torch.no_grad():
        quantizer.clip_high += torch.tensor([0.0, -1.0, -2.0])
        quantizer.clip_low += torch.tensor([1.0, 0.0, -3.0])
    high = torch.sigmoid(quantizer.clip_high) * weight.amax(1)
    low = torch.sigmoid(quantizer.clip_low) * weight.amin(1)
    step = (high - low) / 15
    zero = (-low / step).round()
    expected = step[:, None] * (
        ((weight / step[:, None]).round() + zero[:, None]).clamp(0, 15) - zero[:, None]
    )
    torch.testing.assert_close(quantizer(weight), expected)


def test_all_that_is_learned_has_a_gradient() -> None:
    model, x = prepared(granularity="channel"), batches(1)[0]
    smooth(model, batches())
    learned = transformations(model)
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, list(learned.values()))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def test_smoothing_takes_away_the_error_that_outliers_make() -> None:
    """Of one channel of 30 times the others' size, at 8 bits for weights and 4 for activations."""
    x, reference = batches(1)[0], net()(batches(1)[0])
    errors = []
    for smoothed in (False, True):
        model = net()
        weights = bs.Scheme(bits=8, granularity="channel")
        bs.prepare(model, weights, bs.Scheme(bits=4, calibration="minmax"), first_last_bits=None)
        bs.calibrate(model, batches())
        if smoothed:
            smooth(model, batches())
            for name, parameter in transformations(model).items():
                parameter.data.clamp_(min=20.0 if "clip" in name else None, max=20.0)  # nothing is clipped
        with torch.no_grad():
            errors.append(float((model(x) - reference).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: smooth(prepared(), []), DataError, "no batch"),
        (lambda: smooth(prepared(), batches(), strength=2), SchemeError, "strength"),
        (lambda: smooth(prepared(), batches(), layers=("*.o",)), SiteError, "matches no linear layer"),
        (lambda: smooth(nn.Linear(2, 2), batches()), SiteError, "no linear layer"),
    ],
)
def test_what_cannot_be_smoothed_is_refused(call: Any, kind: type[BitsmithError], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
