"""Integer optimizers: their memory counted, their state resumed, what they refuse, and that they learn."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import FormatError, SchemeError, SiteError
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD, IntegerSign, state_bytes
from bitsmith.quantization.integer_gradients import WeightGradient
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import int_layers

OPTIMIZERS = [IntegerSGD, IntegerSign, IntegerAdam]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 10))


def prepared(*widths: int) -> nn.Module:
    model = network()
    prepare_integer(model, *widths)
    return model


def train(model: nn.Module, optimizer: IntegerOptimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(drawn(32, 64, seed=step)), torch.arange(32) % 10)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CHOICES = [*((kind, {}) for kind in OPTIMIZERS), (IntegerAdam, {"carry": "eco"})]


@pytest.mark.parametrize(("kind", "options"), CHOICES)
@pytest.mark.parametrize("scales", ["learned", "refit"])
def test_resuming_is_exact_to_the_bit(
    kind: type[IntegerOptimizer], options: dict[str, Any], scales: str
) -> None:
    def made() -> tuple[nn.Module, IntegerOptimizer]:
        model = prepared(4, 4, 4)
        return model, kind(model, lr=0.01, scales=scales, refit_every=3, **options)

    model, optimizer = made()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 0, 4)
    schedule.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 4, 8)

    again, other = made()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.lr == pytest.approx(0.005)
    assert train(again, other, 4, 8) == expected
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, other.tensors()[name]) for name, t in optimizer.tensors().items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    state = IntegerSGD(prepared(), lr=0.1).state_dict()
    with pytest.raises(FormatError, match="kind: this is the state of another optimizer"):
        IntegerAdam(prepared(), lr=0.1).load_state_dict(state)
    with pytest.raises(FormatError, match="momentum"):
        IntegerSGD(prepared(), lr=0.1, carry="eco").load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (IntegerSGD, {}),
        (IntegerAdam, {}),
        (IntegerSign, {"carry": "none"}),
        (IntegerSGD, {"carry": "eco"}),
    ],
)
@pytest.mark.parametrize("group_size", [None, 64])
def test_all_state_is_within_1_6_bytes_a_weight_at_4_bits(
    kind: type[IntegerOptimizer], options: dict[str, Any], group_size: int | None
) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    prepare_integer(model, 4, first_last_bits=None, group_size=group_size)
    optimizer = kind(model, lr=1e-3, **options)
    F.mse_loss(model(drawn(8, 512)), drawn(8, 512)).backward()
    optimizer.step()
    counted = state_bytes(model, optimizer)
    assert counted.weights == 2 * 512 * 512
    assert 1.5 <= counted.per_weight <= 1.6
    held = {id(t): t for t in (*model.buffers(), *optimizer.tensors().values())}.values()
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    assert counted.codes + counted.scales + counted.optimizer == held_bytes
    assert counted.float_parameters == 2 * 512 * 4


def test_momentum_is_there_where_something_needs_it() -> None:
    """By default a byte holds the residual; ECO's carry needs a momentum, the sign of an average, too."""
    kinds = {name.rpartition(".")[2] for name in IntegerAdam(prepared(), lr=0.1).tensors()}
    assert "residual" in kinds
    assert "momentum" not in kinds
    assert IntegerSGD(prepared(), lr=0.1, carry="eco").momentum == 0.9
    assert IntegerSign(prepared(), lr=0.1).momentum == 0.9


def test_the_float_leftovers_train_here_or_with_the_user() -> None:
    model = prepared()
    floats = [p.detach().clone() for p in model.parameters()]
    optimizer = IntegerSGD(model, lr=0.1)
    train(model, optimizer, 0, 1)
    assert all(not torch.equal(a, b) for a, b in zip(floats, model.parameters(), strict=True))

    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1, float_optimizer=False)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 0, 1)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert {"0.weight.codes", "0.weight.scale"} <= changed
    assert not changed & {name for name, _ in model.named_parameters()}


def test_two_gradients_in_one_step_are_refused() -> None:
    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1)
    x = drawn(4, 64)
    model(x).sum().backward()
    with pytest.raises(SiteError, match="4: this layer's codes were updated already in this step"):
        model(x).sum().backward()
    optimizer.step()
    model(x).sum().backward()


def test_closures_early_steps_clipping_and_second_optimizers_are_refused() -> None:
    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1)
    with pytest.raises(SiteError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(SiteError, match="no gradient has arrived"):
        optimizer.step()
    with pytest.raises(SiteError, match="clipping by a norm"):
        optimizer.check_loop(clip=1.0)
    with pytest.raises(SiteError, match="accumulation needs all gradients"):
        optimizer.check_loop(accumulation=2)
    with pytest.raises(SiteError, match="a second pass"):
        optimizer.check_loop(second_pass=True)
    optimizer.check_loop()
    with pytest.raises(SiteError, match="another integer optimizer has this layer"):
        IntegerAdam(model, lr=0.1)
    optimizer.detach()
    IntegerAdam(model, lr=0.1)
    with pytest.raises(SiteError, match="no layer that trains on integers"):
        IntegerSGD(network(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (IntegerSGD, {"lr": -1.0}, "IntegerSGD.lr"),
        (IntegerSGD, {"carry": "byte"}, "no such carry"),
        (IntegerSGD, {"momentum": 0.0, "carry": "eco"}, "residual or none without momentum"),
        (IntegerSign, {"carry": "eco"}, "no such carry"),
        (IntegerSGD, {"estimator": "through"}, "no such estimator"),
        (IntegerSign, {"carry": "none", "estimator": "smooth"}, "needs no latent weight"),
        (IntegerSGD, {"scale_rate": -1.0}, "IntegerSGD.scale_rate"),
        (IntegerSGD, {"scales": "free"}, "no such scales"),
        (IntegerAdam, {"second": 1.0}, "IntegerAdam.second"),
        (IntegerSGD, {"block": 3}, "IntegerSGD.block"),
    ],
)
def test_choices_that_there_are_not_are_refused(
    kind: type[IntegerOptimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        kind(prepared(), **{"lr": 0.1, **options})


def test_rows_that_were_not_looked_up_do_not_change() -> None:
    model = nn.Sequential(nn.Embedding(20, 7), nn.Linear(7, 5))
    prepare_integer(model, 4)
    for kind in OPTIMIZERS:
        optimizer = kind(model, lr=0.5)
        table = model[0].weight
        before = table.integers()
        rows = torch.tensor([3, 17, 3])
        F.cross_entropy(model(rows), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        optimizer.detach()
        changed = (table.integers() != before).any(1).nonzero().flatten()
        assert set(changed.tolist()) <= {3, 17}
        assert len(changed)


def test_second_moments_are_factored_and_steps_do_not_depend_on_the_size_of_gradients() -> None:
    for size in (1e-4, 1e4):
        model = prepared(8)
        optimizer = IntegerAdam(model, lr=0.01, scales="fixed", momentum=0.0, carry="none")
        layer = int_layers(model)["2"]
        state = optimizer._states["2.weight"]
        before = layer.weight()
        g = torch.outer(torch.logspace(-2, 2, 96), torch.logspace(2, -2, 96)) * size  # v of rank one
        for _ in range(3):
            optimizer._arrived.clear()
            layer.sink(WeightGradient(lambda start, stop, g=g: g[start:stop]))
        torch.testing.assert_close(state.row_squares, g.square().mean(1))
        torch.testing.assert_close(state.column_squares, g.square().mean(0))
        moved = (before - layer.weight()) / 0.01
        assert 1.9 < moved[:, :48].mean() + moved[:, 48:].mean() < 6.1  # of two or three steps of 0.01


DIGITS = {
    "sgd": (IntegerSGD, {"lr": 1.0}),
    "sign": (IntegerSign, {"lr": 3e-3}),
    "adam": (IntegerAdam, {"lr": 5e-3}),
    "adam, 4 4 4": (IntegerAdam, {"lr": 5e-3}),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_learned(name: str) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    model = network()
    prepare_integer(model, *((4, 4, 4) if "4 4 4" in name else (4, 8, 8)), example=x[:8])
    kind, options = DIGITS[name]
    optimizer = kind(model, **options)
    for batch in torch.arange(1400).repeat(3).split(50):
        optimizer.param_groups[0]["lr"] = options["lr"] * (1 - optimizer.steps / 84)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean()
    assert accuracy > 0.9
    assert 0 <= optimizer.saturated < 0.2
    assert 0 < optimizer.moved < 0.5
