"""Forward-only training: the estimate is the gradient's, weights come back to the bit, memory stays that of a
forward pass, and what is learned is more than noise."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import BitsmithError, FormatError, SchemeError, SiteError, TrainingDiverged
from bitsmith.numerics.noise import BLOCK
from bitsmith.optim.parts import pack_rest
from bitsmith.optim.zeroth_order import ZerothOrder
from tests.optim.models import Largest, attention, loss_of, mlp, packed, prepared_mlp, rows, train

TARGET = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.25])
CURVATURE = torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])
START = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.5])


def quadratic(w: Tensor) -> Tensor:
    return (CURVATURE * (w - TARGET).double() ** 2).sum() / 2


def estimates(count: int, **options: Any) -> Tensor:
    """(count, 5): steps of one seed each, divided by -lr."""
    found = []
    for seed in range(count):
        w = START.clone()
        optimizer = ZerothOrder([w], lr=1.0, eps=0.125, seed=seed, **options)
        optimizer.step(lambda w=w: quadratic(w))
        found.append((START - w).double())
    return torch.stack(found)


@pytest.mark.parametrize("noise", ["signs", "normal"])
def test_the_mean_over_seeds_is_the_gradient(noise: str) -> None:
    found = estimates(600, noise=noise)
    gradient = (CURVATURE * (START - TARGET)).double()
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - gradient).abs() < 4 * error).all()
    # Signs leave out their own element: |g|^2 - g_i^2; normal numbers double it: |g|^2 + g_i^2.
    own = gradient**2 * (-1 if noise == "signs" else 1)
    torch.testing.assert_close(found.var(0), (gradient**2).sum() + own, rtol=0.3, atol=0.0)


def test_more_directions_divide_the_variance() -> None:
    one, eight = estimates(250).var(0).sum(), estimates(120, directions=8).var(0).sum()
    assert float(one / eight) == pytest.approx(8, rel=0.35)


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(8, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    odd = torch.randn(BLOCK + 77, generator=generator)
    return [conv, odd, 1e-6 * torch.randn(5, generator=generator), torch.zeros(3), torch.randn(2, 3).double()]


@pytest.mark.parametrize("noise", ["signs", "normal"])
@pytest.mark.parametrize("directions", [1, 3])
def test_weights_come_back_to_the_bit(noise: str, directions: int) -> None:
    tensors = weights()
    before = [t.clone() for t in tensors]
    optimizer = ZerothOrder(tensors, lr=0.0, noise=noise, directions=directions)
    seen: list[Tensor] = []

    def closure() -> float:
        seen.append(tensors[1].clone())
        return float(len(seen))

    optimizer.step(closure)
    restored = [t.clone() for t in tensors]
    for _ in range(10):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(tensors, restored, strict=True))
    # They were put on a lattice, once, of 2^-21 of the largest or of eps at most.
    for tensor, was in zip(restored, before, strict=True):
        assert float((tensor - was).abs().max()) <= 2**-21 * (float(was.abs().max()) + 5e-3)
    away = seen[2 * directions] - restored[1], seen[2 * directions + 1] - restored[1]
    torch.testing.assert_close(away[0], -away[1], rtol=0, atol=0)
    assert float(away[0].square().mean()) == pytest.approx(1e-6, rel=0.05)


def test_an_error_in_the_closure_leaves_the_weights() -> None:
    w = START.clone()
    optimizer = ZerothOrder([w], lr=0.1)
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return math.inf if len(calls) > 2 else 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(w, START)
    with pytest.raises(TrainingDiverged, match="the loss is not finite"):
        optimizer.step(closure)
    assert torch.equal(w, START)


def test_steps_below_the_lattice_count_in_the_mean() -> None:
    w = torch.ones(4000)
    optimizer = ZerothOrder([w], lr=1e-9, eps=1.0)  # a float32 at 1 does not take steps below 6e-8
    for _ in range(20):
        optimizer.step(lambda: w.double().sum())
    noise = 1e-9 * math.sqrt(20 * 4000)  # of the other elements, in every one
    assert float(w.double().sum() / 4000 - 1) == pytest.approx(-20e-9, abs=6 * noise / math.sqrt(4000) + 2e-8)
    assert not torch.equal(w, torch.ones(4000))


def test_a_tensor_that_grows_keeps_being_restored() -> None:
    w = torch.full((50,), 1e-3)
    optimizer = ZerothOrder([w], lr=0.5, eps=0.01)
    for _ in range(40):
        optimizer.step(lambda: (w - 100).double().square().mean())
    assert float(w.mean()) > 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = w.clone()
    optimizer.step(lambda: w.sum())
    assert torch.equal(w, before)


def test_what_others_write_is_put_on_the_lattice_and_then_restored() -> None:
    w = torch.randn(1000)
    optimizer = ZerothOrder([w], lr=0.0)
    optimizer.step(lambda: 1.0)
    w.add_(torch.rand(1000))
    for eps in (1e-3, 0.5, 0.01):  # as a schedule might
        optimizer.param_groups[0]["eps"] = eps
        optimizer.step(lambda: 1.0)
        before = w.clone()
        optimizer.step(lambda: 1.0)
        assert torch.equal(w, before)


def test_momentum_is_the_sum_of_the_steps_it_remembers() -> None:
    w, plain = START.clone(), START.clone()
    with_momentum = ZerothOrder([w], lr=0.01, momentum=0.5, history=2, seed=3)
    steps: list[Tensor] = []
    for step in range(4):
        with torch.no_grad():
            plain.copy_(w)
        alone = ZerothOrder([plain], lr=0.01, seed=3)
        alone.steps = step
        alone.step(lambda: quadratic(plain))
        steps.insert(0, plain - w)
        expected = w + sum(0.5**age * s for age, s in enumerate(steps[:3]))
        with_momentum.step(lambda: quadratic(w))
        torch.testing.assert_close(w, expected, rtol=0, atol=2e-6)


# ---- models


FORMS: dict[str, Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]] = {
    "latent weights": lambda m: (copy.deepcopy(m), {"lr": 0.02, "eps": 0.02, "unit": "rms"}),
    "codes": lambda m: (packed(m), {"lr": 0.15, "eps": 0.5}),
    "codes with a residual": lambda m: (packed(m), {"lr": 0.15, "eps": 0.5, "residual": True}),
    "scales of codes": lambda m: (
        packed(m),
        {"lr": 0.03, "eps": 0.02, "unit": "rms", "parts": ("scales", "biases")},
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_model_recovers_from_a_shift_beyond_noise(form: str, trained: nn.Module) -> None:
    x, y = rows(600, 0.3, seed=2)
    left = []
    for seed in range(3):
        model, options = FORMS[form](trained)
        before = loss_of(model, x, y)
        train(model, ZerothOrder(model, normalize=True, seed=seed, **options), 45)
        left.append(loss_of(model, x, y) / before)
    mean, error = torch.tensor(left).mean(), torch.tensor(left).std() / math.sqrt(3)
    assert mean + 3 * error < 0.95


@pytest.mark.parametrize("form", list(FORMS))
def test_a_resumed_run_ends_at_the_same_bits(form: str, trained: nn.Module) -> None:
    def start() -> tuple[nn.Module, ZerothOrder]:
        model, options = FORMS[form](trained)
        return model, ZerothOrder(model, normalize=True, momentum=0.9, history=3, directions=2, **options)

    model, optimizer = start()
    train(model, optimizer, 7)
    other, resumed = start()
    train(other, resumed, 3)
    saved = copy.deepcopy((other.state_dict(), resumed.state_dict()))
    last, final = start()
    last.load_state_dict(saved[0])
    final.load_state_dict(saved[1])
    train(last, final, 4)
    ended = last.state_dict()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in model.state_dict().items())


def test_the_state_is_a_few_numbers(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = ZerothOrder(model, lr=0.01, momentum=0.9)
    train(model, optimizer, 3)

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return (
            [leaf for inner in value for leaf in leaves(inner)]
            if isinstance(value, list | tuple)
            else [value]
        )

    found = leaves(optimizer.state_dict())
    assert len(found) < 60
    assert all(leaf is None or isinstance(leaf, int | float | str) for leaf in found)


# ---- memory


@pytest.mark.parametrize("noise", ["signs", "normal"])
def test_no_direction_is_ever_there_as_a_whole(noise: str) -> None:
    w = torch.randn(40 * BLOCK)
    optimizer = ZerothOrder([w], lr=1e-4, noise=noise, momentum=0.9, directions=2)
    with Largest() as largest:
        for _ in range(2):
            optimizer.step(lambda: 1.0)
    assert 0 < largest.bytes <= 5 * BLOCK  # of 160 in the tensor


# ---- what is refused


REFUSED: dict[str, tuple[Callable[[], Any], type[BitsmithError], str]] = {
    "eps of 0": (lambda: ZerothOrder([START.clone()], lr=1, eps=0), SchemeError, "eps.*above 0"),
    "eps below the lattice": (
        lambda: ZerothOrder([START.clone()], lr=1, eps=1e-9),
        SchemeError,
        "eps.* or more for",
    ),
    "lr below 0": (lambda: ZerothOrder([START.clone()], lr=-1.0), SchemeError, "lr.*0 or more"),
    "lr of words": (lambda: ZerothOrder([START.clone()], lr="much"), SchemeError, "lr.*a finite number"),  # type: ignore[arg-type]
    "no direction": (lambda: ZerothOrder([START.clone()], lr=1, directions=0), SchemeError, "directions"),
    "momentum of 1": (lambda: ZerothOrder([START.clone()], lr=1, momentum=1.0), SchemeError, "momentum"),
    "another noise": (lambda: ZerothOrder([START.clone()], lr=1, noise="sign"), SchemeError, "signs"),
    "another part": (lambda: ZerothOrder(attention(), lr=1, parts=("weight",)), SchemeError, "weights"),
    "no lr for a part": (
        lambda: ZerothOrder(attention(), lr={"scales": 1.0}),
        SchemeError,
        "an entry weights",
    ),
    "no closure": (lambda: ZerothOrder([START.clone()], lr=1).step(), SchemeError, "needs a closure"),
    "no tensor": (lambda: ZerothOrder([], lr=1), SiteError, "no tensor to train"),
    "a float model": (lambda: ZerothOrder(mlp(), lr=1), SiteError, "no quantized layer"),
    "all frozen": (
        lambda: ZerothOrder(attention().requires_grad_(False), lr=1),
        SiteError,
        "nothing to train",
    ),
    "no such layer": (lambda: ZerothOrder(attention(), lr=1, layers=("*.o",)), SiteError, "matches no layer"),
    "bfloat16": (lambda: ZerothOrder([START.bfloat16()], lr=1), SchemeError, "bfloat16"),
    "gaps": (lambda: ZerothOrder([torch.ones(4, 4)[:, ::2]], lr=1), SchemeError, "one piece"),
    "another's state": (
        lambda: ZerothOrder([START.clone()], lr=1).load_state_dict({"state": {}, "param_groups": []}),
        FormatError,
        "no state of a ZerothOrder",
    ),
    "no light layer": (lambda: pack_rest(prepared_mlp()), SiteError, "Name layers of this model"),
    "a light glob": (lambda: pack_rest(prepared_mlp(), ("7",)), SiteError, "no layer"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_trained_is_refused_in_one_line(case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
