"""Weight anchor: how weights and anchors pull, what re-quantization does to codes, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitsmith.errors import Interrupted, SchemeError, SiteError
from bitsmith.methods.weight_anchor import LOOKS, SCHEDULES, WeightAnchor
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare, sites
from bitsmith.train import TrainConfig, train
from tests.train.problem import data, network

X, Y = data()
RATE = 0.05


def start(
    seed: int = 0, *, weights: Scheme | None = None, inputs: Scheme | None = None, **options
) -> tuple[nn.Module, WeightAnchor]:
    net = network(seed, dropout=0.0)
    weights = weights or Scheme(bits=4, granularity="channel")
    prepare(net, weights, inputs, first_last_bits=None)
    method = WeightAnchor(**{"schedule": "constant", **options})
    method.attach(net)
    calibrate(net, [X])
    return net.train(), method


def step(net: nn.Module, method: WeightAnchor, optimizer: torch.optim.Optimizer, at: int = 0) -> None:
    """A step of a loop of one's own."""
    optimizer.zero_grad()
    cross_entropy(net(X), Y).backward()
    method.after_backward(lambda: torch.zeros(()))
    optimizer.step()
    method.after_step(at, 100)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=RATE)


def plain_weights(net: nn.Module, weight: Tensor) -> Tensor:
    """The first layer's weight after a plain step of this model, from ``weight``."""
    other = copy.deepcopy(net)
    other[0].weight.data.copy_(weight)
    optimizer = sgd(other)
    cross_entropy(other(X), Y).backward()
    optimizer.step()
    return other[0].weight.detach()


# ---- the pull


@pytest.mark.parametrize("pull", ["anchor", "weights", "both"])
def test_each_step_closes_its_share_of_the_gap(pull: str) -> None:
    net, method = start(strength=0.2, pull=pull)
    optimizer = sgd(net)
    w, a = net[0].weight.detach().clone(), net[0].weight.detach().clone()
    for at in range(3):
        w = plain_weights(net, w)
        step(net, method, optimizer, at)
        if pull != "anchor":
            w = w + 0.2 * (a - w)
        if pull != "weights":
            a = a + 0.2 * (w - a)
        torch.testing.assert_close(net[0].weight.detach(), w)
        torch.testing.assert_close(method.anchor_0, a)


def test_kappa_is_twice_the_rate_times_lambda() -> None:
    """The literal form: an SGD step of the anchor on lambda |A - W|^2, lambda = kappa / (2 eta)."""
    net, method = start(strength=0.2, pull="anchor")
    optimizer = sgd(net)
    step(net, method, optimizer)
    before = method.anchor_0.clone().requires_grad_()
    w = plain_weights(net, net[0].weight.detach())
    (0.2 / (2 * RATE) * (before - w).square().sum()).backward()
    step(net, method, optimizer, 1)
    torch.testing.assert_close(method.anchor_0, (before - RATE * before.grad).detach())


def test_pulled_alone_without_requantization_the_anchor_is_read_by_nothing() -> None:
    (plain, _), (net, method) = start(), start(pull="anchor")
    one, other = sgd(plain), sgd(net)
    for at in range(4):
        one.zero_grad()
        cross_entropy(plain(X), Y).backward()
        one.step()
        step(net, method, other, at)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), net.parameters(), strict=True))


def test_requantized_the_weights_are_the_quantized_anchors() -> None:
    net, method = start(strength=0.3, pull="anchor", requantize=True)
    optimizer = sgd(net)
    a = net[0].weight.detach().clone()
    w = a
    for at in range(3):
        a = a + 0.3 * (plain_weights(net, w) - a)
        step(net, method, optimizer, at)
        w = net[0].weight_quantizer(a).detach()
        torch.testing.assert_close(method.anchor_0, a)
        torch.testing.assert_close(net[0].weight.detach(), w)


SCHEMES = {
    "lsq per channel": (Scheme(bits=4, granularity="channel"), None),
    "lsq of 2 bits, without zero": (Scheme(bits=2, granularity="channel"), None),
    "lsq+": (Scheme(bits=4), Scheme(bits=4, range="lsq+")),
    "groups": (Scheme(bits=3, granularity="group", group_size=5), None),
    "asymmetric": (Scheme(bits=4, grid="asymmetric", granularity="channel", calibration="minmax"), None),
    "dynamic": (Scheme(bits=4, range="dynamic"), None),
    "static": (Scheme(bits=4, range="static"), None),
    "pact": (Scheme(bits=4, range="pact"), None),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("requantize", [True, False])
def test_it_serves_any_quantizer(scheme: str, requantize: bool) -> None:
    weights, inputs = SCHEMES[scheme]
    pull = "anchor" if requantize else "both"
    net, method = start(weights=weights, inputs=inputs, requantize=requantize, pull=pull)
    optimizer = sgd(net)
    for at in range(3):
        step(net, method, optimizer, at)
    for layer in (net[0], net[5]):
        stored, quantizer = layer.weight.detach(), layer.weight_quantizer
        if requantize:  # nothing is left to be rounded: what trains is what ships
            torch.testing.assert_close(quantizer(stored), stored)
        assert (quantizer.codes(stored) != 0).any()


def test_a_dorefa_weight_is_pulled_but_not_requantized() -> None:
    dorefa = Scheme(bits=4, range="dorefa")
    net, method = start(weights=dorefa, pull="both")
    step(net, method, sgd(net))
    with pytest.raises(SchemeError, match="tanh"):
        start(weights=dorefa, pull="anchor", requantize=True)


def test_a_small_pull_on_requantized_weights_moves_no_code() -> None:
    """Why the literal form freezes: A stays within the step where eta |g| is below half of it."""

    def codes_moved(**options) -> float:
        net, method = start(weights=Scheme(bits=2, granularity="channel"), **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for at in range(30):
            step(net, method, optimizer, at)
        return float(method.codes_moved)

    assert codes_moved(strength=0.2, pull="anchor", requantize=True) == 0.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_strength_follows_its_schedule(name: str) -> None:
    wanted = {"constant": [0.5] * 4, "linear": [0.125, 0.25, 0.5, 0.5], "late": [0, 0, 0, 0.5]}[name]
    _, method = start(strength=0.5, schedule=name)
    found = []
    for at in (4, 9, 49, 99):  # of 100
        method.after_step(at, 100)
        found.append(float(method.strength))
    assert found == pytest.approx(wanted)
    method.after_step(89, 100)
    assert float(method.strength) == pytest.approx({"late": 0.25}.get(name, 0.5))


def test_layers_are_chosen_by_globs_and_may_have_strengths_of_their_own() -> None:
    net, method = start(strength=0.2, layers={"*": 0.5, "5": 0.0})
    assert list(method.strengths.values()) == [0.5, 0.0]
    w = plain_weights(net, net[0].weight.detach())
    start_weight = net[0].weight.detach().clone()
    step(net, method, sgd(net))
    torch.testing.assert_close(net[0].weight.detach(), w + 0.5 * (start_weight - w))
    assert torch.equal(method.anchor_1, start(0)[0][5].weight)
    assert len(start(layers=["5"])[1].layers) == 1


def test_the_anchor_may_be_slower_than_the_weights() -> None:
    net, method = start(strength=0.5, anchor_strength=0.1)
    a = net[0].weight.detach().clone()
    w = plain_weights(net, a)
    step(net, method, sgd(net))
    w = w + 0.5 * (a - w)
    torch.testing.assert_close(net[0].weight.detach(), w)
    torch.testing.assert_close(method.anchor_0, a + 0.1 * (w - a))


def test_the_anchors_start_where_training_does() -> None:
    net, method = start()
    net[0].weight.data.mul_(2)  # rounded, or loaded, after attach
    method.after_backward(lambda: torch.zeros(()))
    assert torch.equal(method.anchor_0, net[0].weight)


def test_a_weight_that_does_not_train_is_not_pulled() -> None:
    net, method = start(strength=0.5)
    optimizer = sgd(net)
    step(net, method, optimizer)
    before, anchor = net[0].weight.detach().clone(), method.anchor_0.clone()
    assert not torch.equal(before, anchor)
    optimizer.zero_grad()
    method.after_backward(lambda: torch.zeros(()))
    method.after_step(1, 100)
    assert torch.equal(net[0].weight, before)
    assert torch.equal(method.anchor_0, anchor)


# ---- the anchors' own optimizer


@pytest.mark.parametrize(
    "made",
    [
        lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=True),
        lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9),
    ],
)
def test_the_anchors_own_optimizer_is_like_the_models(made) -> None:
    net, method = start(strength=0.2, pull="anchor", optimizer="main")
    optimizer = made(parameter_groups(net, learning_rate=RATE, weight_decay=0.1))
    method.optimizer_made(optimizer)
    assert type(method.own) is type(optimizer)
    twin = nn.Parameter(net[0].weight.detach().clone())
    own = made([{"params": [twin], "weight_decay": 0.0}])
    for at in range(3):
        step(net, method, optimizer, at)
        twin.grad = (twin.detach() - net[0].weight.detach()) * (0.2 / RATE)
        own.step()
        torch.testing.assert_close(method.anchor_0, twin.detach(), rtol=1e-4, atol=1e-6)


def test_without_being_told_of_an_optimizer_there_is_none_to_copy() -> None:
    net, method = start(optimizer="main")
    with pytest.raises(SchemeError, match="optimizer_made"):
        step(net, method, sgd(net))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [{"optimizer": "main"}, {"optimizer": "main", "pull": "anchor", "requantize": True}, {"strength": 0.3}],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(options: dict, optimizer: str, tmp_path) -> None:
    config = TrainConfig(epochs=2, batch_size=8, optimizer=optimizer, learning_rate=0.02, device="cpu")

    def run(method: WeightAnchor, net: nn.Module, **arguments) -> list[dict]:
        return train(net, X, Y, config, methods=[method], **arguments).traces

    whole, one = start(**options)
    traces = run(one, whole)
    stopped, half = start(**options)
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted):
        run(half, stopped, checkpoint=tmp_path / "c", stop=lambda: next(calls) == 3)
    resumed, other = start(seed=1, **options)
    assert run(other, resumed, checkpoint=tmp_path / "c", resume=True) == traces
    for left, right in ((whole, resumed), (one, other)):
        ours, theirs = left.state_dict(), right.state_dict()
        assert all(torch.equal(v, theirs[name]) for name, v in ours.items() if isinstance(v, Tensor))


# ---- what is told


def test_the_share_of_codes_that_move_is_counted() -> None:
    net, method = start(strength=0.0)
    layers = [net[0], net[5]]

    def codes() -> Tensor:
        return torch.cat([layer.weight_quantizer.codes(layer.weight).flatten() for layer in layers])

    assert "codes_moved" not in method.scalars(), "nothing to compare with yet"
    method.after_step(0, LOOKS)
    before = codes()
    with torch.no_grad():
        net[0].weight[:2] += 1.0
    method.after_step(1, LOOKS)
    moved = (codes() != before).float().mean()
    assert 0 < float(moved) < 1
    torch.testing.assert_close(method.scalars()["codes_moved"], moved)
    a = torch.cat([method.anchor_0.flatten(), method.anchor_1.flatten()])
    w = torch.cat([layer.weight.detach().flatten() for layer in layers])
    torch.testing.assert_close(method.scalars()["gap"], (w - a).norm() / a.norm())


def test_a_long_run_is_looked_at_a_few_times() -> None:
    _, method = start()
    looks = []
    method._look = lambda: looks.append(1)
    for at in range(1000):
        method.after_step(at, 1000)
    assert LOOKS <= len(looks) <= LOOKS + 3


def test_nothing_of_it_is_left_in_the_model() -> None:
    net, _ = start()
    plain = network(dropout=0.0)
    prepare(plain, Scheme(bits=4, granularity="channel"), None, first_last_bits=None)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert len(sites(net)) == 2


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "from 0 to 1"),
        ({"strength": -0.1}, "from 0 to 1"),
        ({"strength": float("nan")}, "from 0 to 1"),
        ({"anchor_strength": 2}, "from 0 to 1"),
        ({"layers": {"*": 3}}, "from 0 to 1"),
        ({"layers": "0"}, "list of globs"),
        ({"pull": "weight"}, "weights"),
        ({"schedule": "lat"}, "late"),
        ({"optimizer": "adam"}, "main"),
        ({"requantize": 1}, "true or false"),
        ({"requantize": True, "pull": "both"}, "pull: anchor"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        WeightAnchor(**options)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(SiteError, match="no quantized weight"):
        WeightAnchor().attach(network())
    for layers in (["fc"], {"fc": 0.1}):
        with pytest.raises(SiteError, match="matches no quantized layer"):
            start(layers=layers)
