"""Sharpness: where the second pass looks, what becomes of gradients, and which scales are frozen."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitsmith.errors import SchemeError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.sharpness import Sharpness
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.tasks.models import build
from bitsmith.train import TrainConfig, train
from bitsmith.train.distillation import IGNORED
from bitsmith.train.run import Run
from tests.train.problem import data, network, start

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(24, 1, 8, 8, generator=GENERATOR), torch.randint(0, 10, (24,), generator=GENERATOR)


class Quadratic(nn.Module):
    """L(w) = (A w . w) / 2 in two tensors, and a term in each alone."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))
        self.A = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, -0.3], [0.5, -0.3, 1.0]])

    def forward(self) -> Tensor:
        w = torch.cat([self.u, self.v])
        return w @ self.A @ w / 2


def second_gradient(method: Sharpness, steps: int = 1) -> tuple[Quadratic, Tensor, list[int]]:
    """The gradient that is left after as many steps, none of which moves a weight."""
    net, calls = Quadratic(), []
    method.attach(net)
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            net.zero_grad(set_to_none=False)  # as some loops do: gradients are filled with zeros
            loss = net()
            loss.backward()
            calls.append(step)
            return loss.detach()

        net.zero_grad()
        net().backward()
        method.after_backward(closure)
        method.after_step(step, 100)
    return net, torch.cat([net.u.grad, net.v.grad]), calls


def w_and_gradient(net: Quadratic) -> tuple[Tensor, Tensor]:
    w = torch.cat([net.u, net.v]).detach()
    return w, net.A @ w


# ---- the second pass


def test_sam_has_the_gradient_at_the_radius() -> None:
    net, found, _ = second_gradient(Sharpness(0.3, relative_to=None))
    w, g = w_and_gradient(net)
    torch.testing.assert_close(found, net.A @ (w + 0.3 * g / g.norm()))


def test_sagm_is_the_mean_of_the_gradient_and_that_at_the_matched_point() -> None:
    net, found, _ = second_gradient(Sharpness(0.3, kind="sagm", alpha=0.02, relative_to=None))
    w, g = w_and_gradient(net)
    torch.testing.assert_close(found, (g + net.A @ (w + (0.3 / g.norm() - 0.02) * g)) / 2)


def test_a_radius_relative_to_the_model_is_a_share_of_its_norm() -> None:
    net, found, _ = second_gradient(Sharpness(0.1))
    w, g = w_and_gradient(net)
    torch.testing.assert_close(found, net.A @ (w + 0.1 * w.norm() * g / g.norm()))


@pytest.mark.parametrize("kind", ["sam", "sagm"])
def test_a_relative_radius_is_a_share_of_each_tensor(kind: str) -> None:
    net, found, _ = second_gradient(Sharpness(0.1, kind=kind, alpha=0.02, relative_to="tensor"))
    w, g = w_and_gradient(net)
    parts = zip(w.split([2, 1]), g.split([2, 1]), strict=True)
    e = torch.cat([0.1 * own.norm() * gradient / gradient.norm() for own, gradient in parts])
    there = net.A @ (w + e - (0.02 * g if kind == "sagm" else 0))
    torch.testing.assert_close(found, there if kind == "sam" else (g + there) / 2)


@pytest.mark.parametrize("relative_to", ["tensor", "model", None])
def test_a_step_in_between_adds_the_part_across_the_gradient_again(relative_to: str | None) -> None:
    net, reused, calls = second_gradient(Sharpness(0.3, every=5, relative_to=relative_to), steps=5)
    assert calls == [0]
    _, g = w_and_gradient(net)
    _, flat, _ = second_gradient(Sharpness(0.3, relative_to=relative_to))
    wanted = []
    for part in [slice(0, 2), slice(2, 3)] if relative_to == "tensor" else [slice(0, 3)]:
        own, other = g[part], flat[part]
        across = other - (other @ own) / (own @ own) * own
        wanted.append(own + 0.7 * own.norm() * across / (across.norm() + 1e-12))
    torch.testing.assert_close(reused[:2], torch.cat(wanted)[:2])
    if relative_to != "tensor":  # a tensor of one element has nothing across its gradient but rounding
        torch.testing.assert_close(reused[2:], torch.cat(wanted)[2:])


def test_plain_steps_in_between_are_plain() -> None:
    net, found, calls = second_gradient(Sharpness(0.3, every=3, between="plain"), steps=6)
    assert calls == [0, 3]
    torch.testing.assert_close(found, w_and_gradient(net)[1])


@pytest.mark.parametrize(
    ("schedule", "radii"),
    [
        ("constant", [0.4] * 3),
        ("cosine", [0.4, 0.4 * (1 + math.cos(math.pi / 100)) / 2, 0.4 * (1 + math.cos(math.pi / 50)) / 2]),
        ("warm_up", [0.0, 0.04, 0.08]),
    ],
)
def test_the_radius_follows_its_schedule(schedule: str, radii: list[float]) -> None:
    method, net = Sharpness(0.4, schedule=schedule), Quadratic()
    method.attach(net)
    found = []
    for step in range(3):
        found.append(float(method.radius))
        method.after_step(step, 100)
    assert found == pytest.approx(radii)
    _, _, calls = second_gradient(Sharpness(0.4, schedule=schedule), steps=3)
    assert len(calls) == sum(r > 0 for r in radii), "at radius 0 nothing is looked for"


# ---- through quantizers


def quantized(dropout: float = 0.2) -> nn.Module:
    net = network(dropout=dropout)
    prepare(net, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    return net


def run_of(net: nn.Module, method: Sharpness, *others, **settings) -> Run:
    for each in (*others, method):
        each.attach(net)
    calibrate(net, [data()[0]])
    config = TrainConfig(**{"epochs": 3, "batch_size": 8, "learning_rate": 0.02, "device": "cpu", **settings})
    return start(net, config, methods=[method, *others])


def watched(method: Sharpness, net: nn.Module) -> list[dict[str, Tensor]]:
    """State before, inside and after the second pass of each step."""
    seen: list[dict[str, Tensor]] = []
    original = method.after_backward

    def state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in net.state_dict().items()}

    def watching(closure):
        def inside():
            seen.append(state())
            return closure()

        seen.append(state())
        original(inside)
        seen.append(state())

    method.after_backward = watching
    return seen


@pytest.mark.parametrize("relative_to", ["tensor", "model", None])
def test_weights_and_scales_are_perturbed_and_come_back_to_the_last_bit(relative_to: str | None) -> None:
    net = quantized()
    method = Sharpness(0.05, relative_to=relative_to)
    run = run_of(net, method, accumulation=2)
    seen = watched(method, net)
    for _ in range(3):
        run.train_step()
    trained = {name for name, _ in net.named_parameters()}
    assert {"0.weight", "0.weight_quantizer.range", "5.input_quantizer.range", "1.weight"} <= trained
    for before, inside, after in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before), "BatchNorm's statistics, too"
        biases = {"1.bias"} if relative_to == "tensor" else set()  # begins at zero: a share of it is nothing
        moved = {name for name in before if not torch.equal(before[name], inside[name])}
        assert trained - biases - moved == set()
        assert moved <= trained


def test_a_relative_radius_moves_each_scale_by_its_share() -> None:
    net, method = quantized(), Sharpness(0.05, relative_to="tensor")
    run = run_of(net, method)
    seen = watched(method, net)
    run.train_step()
    name = "0.weight_quantizer.range"
    ratio = torch.exp2(seen[1][name] - seen[0][name])  # of the perturbed scales to the scales
    assert ratio.log().square().mean().sqrt() == pytest.approx(0.05, rel=1e-4)


def test_gradients_are_those_at_the_perturbed_point_with_the_same_dropout() -> None:
    net, method = quantized(), Sharpness(0.05)
    run = run_of(net, method)
    seen = watched(method, net)
    losses = []
    closure = run._second_pass
    run._second_pass = lambda *arguments: losses.append(closure(*arguments)) or losses[-1]
    batch, random = run.batches.step(0), torch.get_rng_state()
    run.optimizer.step = lambda: None  # so that the gradients can be seen
    run.train_step()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.load_state_dict(seen[1])
    torch.set_rng_state(random)
    net.zero_grad()
    loss = cross_entropy(net(batch[0].x), batch[0].y, ignore_index=IGNORED)
    loss.backward()
    assert torch.equal(loss.detach(), losses[0])
    assert torch.equal(method.perturbed_loss, losses[0])
    assert all(torch.equal(found[name], p.grad) for name, p in net.named_parameters())


def test_widths_are_not_perturbed_and_keep_the_tasks_gradient() -> None:
    def logits_after(*methods) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = build("digits_cnn", seed=0)
        prepare(net, Scheme(bits=4, granularity="channel", calibration="minmax"), Scheme(bits=4))
        for each in methods:
            each.attach(net)
        calibrate(net, [X])
        cross_entropy(net.train()(X), Y).backward()

        def closure() -> Tensor:
            net.zero_grad()
            (loss := 3 * cross_entropy(net(X), Y)).backward()
            return loss.detach()

        before = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("logits")}
        assert before
        for each in methods:
            each.after_backward(closure)
        assert all(torch.equal(before[n], p) for n, p in net.named_parameters() if n in before)
        return {n: p.grad for n, p in net.named_parameters() if n in before}

    def search() -> BudgetSearch:
        return BudgetSearch({"bops": 0.02}, X[:2], candidates=(2, 4, 8))

    alone, together = logits_after(search()), logits_after(Sharpness(0.05), search())
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_a_second_pass_that_fails_leaves_the_weights_as_they_were() -> None:
    net = Quadratic()
    method = Sharpness()
    method.attach(net)
    net().backward()
    before = net.u.detach().clone()

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.after_backward(closure)
    assert torch.equal(net.u, before)


def test_gradients_that_overflowed_leave_the_weights_as_they_were() -> None:
    net = Quadratic()  # as under float16, where a GradScaler then skips the step
    method = Sharpness()
    method.attach(net)
    (net() * torch.inf).backward()
    before = net.u.detach().clone()
    method.after_backward(lambda: net().detach())
    assert torch.equal(net.u, before)


def test_one_overflow_does_not_last() -> None:
    net, method = Quadratic(), Sharpness(every=2)
    method.attach(net)
    for step, factor in enumerate([torch.inf, 1.0]):
        net.zero_grad()
        (factor * net()).backward()
        method.after_backward(lambda: net().detach())
        method.after_step(step, 100)
    torch.testing.assert_close(net.u.grad, w_and_gradient(net)[1][:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_zero_perturbs_nothing_in_half_precision(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 2).to(dtype)
    method = Sharpness(kind="sagm")
    method.attach(net)
    net.weight.grad, net.bias.grad = torch.zeros_like(net.weight), torch.ones_like(net.bias)
    before, seen = net.weight.detach().clone(), []
    method.after_backward(lambda: seen.append(net.weight.detach().clone()) or torch.zeros(()))
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_trains_under_autocast(dtype: torch.dtype) -> None:
    net, method = quantized(), Sharpness(0.05)
    method.attach(net)
    x, y = data()
    calibrate(net, [x])

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype):
            logits = net.train()(x)
        value = cross_entropy(logits.float(), y)
        net.zero_grad()
        value.backward()
        return value.detach()

    loss()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    method.after_backward(loss)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_trains_on_cuda() -> None:
    net = quantized()
    method = Sharpness(0.05, kind="sagm", every=2, freeze="ordered", disorder_window=3)
    method.attach(net)
    x, y = data()
    calibrate(net, [x])
    train(net, x, y, TrainConfig(epochs=2, batch_size=8, device="cuda"), methods=[method])
    assert all(p.isfinite().all() for p in net.parameters())


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": -0.1}, "at least 0"),
        ({"radius": math.nan}, "at least 0"),
        ({"alpha": True}, "at least 0"),
        ({"kind": "sum"}, "sam"),
        ({"every": 0}, "from 1 on"),
        ({"every": 2.0}, "from 1 on"),
        ({"between": "nothing"}, "reuse"),
        ({"schedule": "linear"}, "warm_up"),
        ({"freeze": "orderd"}, "ordered"),
        ({"freeze": "ordered", "kind": "sagm", "disorder_threshold": 1.5}, "0 to 1"),
        ({"freeze": "ordered", "kind": "sagm", "disorder_window": 1}, "from 2 on"),
        ({"relative_to": "layer"}, "model"),
        ({"freeze": "ordered"}, "kind: sagm"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Sharpness(**options)
