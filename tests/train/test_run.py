"""One optimizer step: the order of the hooks, accumulation, clipping, averaging, the second pass."""

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import RecipeError
from bitsmith.methods.method import Method
from bitsmith.quantization import Scheme, prepare
from bitsmith.train import TrainConfig
from tests.train.problem import Anchor, attached, network, same_state, start


class Recorder(Method):
    """Writes down when it is called and what the gradients were."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def attach(self, model: nn.Module) -> None:
        self.weight = [model[-1].weight]

    def after_backward(self, closure) -> None:
        assert self.weight[0].grad is not None
        self.task_gradient = self.weight[0].grad.clone()
        self.calls.append("after_backward")

    def penalty(self) -> Tensor:
        self.calls.append("penalty")
        return 3 * self.weight[0].sum()

    def after_step(self, step: int, steps: int) -> None:
        self.calls.append(f"after_step {step}/{steps}")
        self.final_gradient = self.weight[0].grad.clone()


def recorded(model: nn.Module, config: TrainConfig) -> tuple[list[str], Recorder]:
    calls: list[str] = []
    method = Recorder(calls)
    method.attach(model)
    run = start(model, config, methods=[method])
    model.register_forward_pre_hook(lambda module, inputs: calls.append("forward"))
    model[0].register_full_backward_hook(lambda module, grads, outputs: calls.append("backward"))
    step = run.optimizer.step
    run.optimizer.step = lambda: (calls.append("step"), step())  # type: ignore[method-assign]
    run.train_step()
    return calls, method


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_are_called_in_the_promised_order() -> None:
    calls, _ = recorded(network(), TrainConfig(batch_size=8, accumulation=2, epochs=2))
    passes = ["forward", "backward"] * 2
    assert calls == [*passes, "after_backward", "penalty", "step", "after_step 0/10"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_penalty_counts_once_whatever_the_accumulation() -> None:
    for accumulation in (1, 4):
        _, method = recorded(network(dropout=0), TrainConfig(batch_size=8, accumulation=accumulation))
        torch.testing.assert_close(method.final_gradient - method.task_gradient, torch.full((3, 64), 3.0))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_clipping_comes_after_the_penalty() -> None:
    _, method = recorded(network(), TrainConfig(batch_size=8, gradient_clip=0.5))
    assert method.final_gradient.norm() <= 0.5 + 1e-6


def test_clipping_limits_the_norm_over_all_parameters_and_keeps_the_direction() -> None:
    gradients = []
    for clip in (0.0, 0.01):
        run = start(network(dropout=0), TrainConfig(batch_size=8, gradient_clip=clip))
        run.train_step()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in run.parameters]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0] * 0.01 / gradients[0].norm(), rtol=1e-3, atol=1e-8)


def test_accumulation_equals_the_big_batch() -> None:
    # Without BatchNorm, whose statistics are those of a micro-batch; 40 rows leave a ragged last batch of 4.
    models = [nn.Sequential(nn.Flatten(), nn.Linear(36, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, accumulation in zip(models, (1, 3), strict=True):
        run = start(model, TrainConfig(batch_size=12, epochs=3, optimizer="sgd", accumulation=accumulation))
        while run.step < run.steps:
            run.train_step()
            if run.epoch_is_over:
                run.finish_epoch(None)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_that_of_torchs_plain_optimizer(optimizer: str) -> None:
    ours, plain = network(dropout=0), network(dropout=0)
    config = TrainConfig(batch_size=8, optimizer=optimizer, learning_rate=0.01, weight_decay=0.0, warmup=0.0)
    run = start(ours, config)
    twin = (
        torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    )
    plain.train()
    for step in range(2):
        batch = run.batches.step(step)[0]
        run.train_step()
        for group in twin.param_groups:
            group["lr"] = run.learning_rate
        twin.zero_grad()
        nn.functional.cross_entropy(plain(batch.x), batch.y).backward()
        twin.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_decay_spares_biases_norms_logits_and_ranges() -> None:
    model = network()
    prepare(model, weights=Scheme(bits=4, granularity="channel"), activations=Scheme(bits=8))
    model.register_parameter("width_logits", nn.Parameter(torch.zeros(2, 2)))
    run = start(model, TrainConfig(weight_decay=0.1, learning_rate=0.01, range_learning_rate_factor=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(p)] for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {"0.weight", "5.weight"}
    rates = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    ranges = {name for name in rates if name.endswith("range")}
    assert len(ranges) == 4
    assert {rates.pop(name) for name in ranges} == {0.005}
    assert set(rates.values()) == {0.01}
    assert len(run.parameters) == len(list(model.parameters()))


def test_the_average_is_taken_after_every_step() -> None:
    model = network()
    run = start(model, TrainConfig(batch_size=8, ema=0.5))
    expected = model[-1].bias.detach().clone()
    for step in (1, 2, 3):
        run.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[-1].bias.detach()
    assert run.average is not None
    torch.testing.assert_close(run.average.values["5.bias"], expected)


class Repeater(Method):
    """Calls the closure without having changed anything."""

    def attach(self, model: nn.Module) -> None:
        self.model = [model]

    def after_backward(self, closure) -> None:
        parameters = list(self.model[0].parameters())
        first = [parameter.grad.clone() for parameter in parameters]
        buffers = {name: value.clone() for name, value in self.model[0].named_buffers()}
        self.loss = closure()
        self.same = all(torch.equal(p.grad, g) for p, g in zip(parameters, first, strict=True))
        self.still = all(torch.equal(v, buffers[n]) for n, v in self.model[0].named_buffers())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_second_pass_repeats_the_first_and_moves_no_statistics(accumulation: int) -> None:
    model = network(dropout=0.5)
    method = Repeater()
    method.attach(model)
    run = start(model, TrainConfig(batch_size=8, accumulation=accumulation), methods=[method])
    run.train_step()
    assert method.same
    assert method.still
    assert method.loss.item() == pytest.approx(run.last_loss)
    assert model[1].track_running_stats


def test_a_second_pass_does_not_change_the_draws_that_follow() -> None:
    models = [network(dropout=0.5), network(dropout=0.5)]
    repeater = Repeater()
    repeater.attach(models[1])
    for model, methods in zip(models, ([], [repeater]), strict=True):
        torch.manual_seed(0)
        run = start(model, TrainConfig(batch_size=8), methods=methods)
        for _ in range(3):
            run.train_step()
    assert same_state(*models)


def test_two_methods_with_a_second_pass_are_refused() -> None:
    model = network()
    other = Repeater()
    other.attach(model)
    run = start(model, TrainConfig(batch_size=8), methods=[attached(model), other])
    with pytest.raises(
        RecipeError, match=r"only one method of a run can make a second pass.*got Anchor and Rep"
    ):
        run.train_step()


def test_the_base_method_changes_nothing() -> None:
    models = [network(dropout=0), network(dropout=0)]
    method = Method()
    method.attach(models[1])
    for model, methods in zip(models, ([], [method]), strict=True):
        start(model, TrainConfig(batch_size=8), methods=methods).train_step()
    assert same_state(*models)
    assert method.plan() is None


def test_the_traces_of_a_method_are_its_single_numbers() -> None:
    model = network()
    run = start(model, TrainConfig(batch_size=40, epochs=2), methods=[attached(model)])
    run.train_step()
    assert run.finish_epoch(0.5) == {
        "step": 1,
        "epoch": 1,
        "loss": pytest.approx(run.last_loss),
        "learning_rate": run.learning_rate,
        "validation_accuracy": 0.5,
        "methods": {"Anchor.strength": pytest.approx(0.05)},
    }
    assert isinstance(run.methods[0], Anchor)
