"""Output approximation: what the term adds to gradients, and the widths that it allocates."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import BudgetError, SchemeError, SiteError
from bitsmith.methods.output_approximation import MEASURED, OutputApproximation
from bitsmith.numerics.output_error import output_error
from bitsmith.quantization import Scheme, calibrate, plan_of, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.layers import QuantLinear
from bitsmith.quantization.quantizer import Quantizer
from bitsmith.quantization.sensitivity import output_errors
from bitsmith.quantization.site_terms import float_copy
from bitsmith.tasks.models import build
from bitsmith.train import TrainConfig, train

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(24, 1, 8, 8, generator=GENERATOR), torch.randint(0, 10, (24,), generator=GENERATOR)
SMALL = {"width": 8, "depth": 1, "heads": 2, "hidden": 16}
BUDGET = {"average_weight_bits": 3.5, "average_activation_bits": 3.5}


def start(name: str = "digits_vit", *, activations: int | None = 2, bits: int = 2, **options):
    """A prepared model with the method attached, calibrated, past its warm-up."""
    arguments = SMALL if name == "digits_vit" else {}
    net = build(name, seed=0, **arguments)
    weights = Scheme(bits=bits, granularity="channel", calibration="minmax")  # quick
    inputs = Scheme(bits=activations, calibration="minmax") if activations else None
    prepare(net, weights, inputs, first_last_bits=None)
    method = OutputApproximation(X[:2], **{"warm_up": 0.0, "strength": 0.5, **options})
    method.attach(net)
    if activations:
        calibrate(net, [X])
    return net.train(), method


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=2e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- the term


class Layer(nn.Module):
    """One layer, whose input is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(16, 32))
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a * x)


def gradient_of_the_term_alone(calibration: str = "mse", **options) -> tuple[Tensor, nn.Module]:
    net = Layer()
    prepare(net, Scheme(bits=4), Scheme(bits=2, calibration=calibration), first_last_bits=None)
    method = OutputApproximation(strength=1.0, warm_up=0, **options)
    method.attach(net)
    calibrate(net, [torch.ones(1)])
    (0 * net.train()(torch.ones(1)).sum()).backward()
    return net.a.grad, net


@pytest.mark.parametrize("loss", ["mse", "cosine", "huber"])
def test_more_than_99_percent_of_the_activations_get_a_gradient(loss: str) -> None:
    gradient, _ = gradient_of_the_term_alone(loss=loss)
    assert (gradient != 0).float().mean() > 0.99


def test_the_gradient_leads_from_an_activation_to_its_level() -> None:
    gradient, net = gradient_of_the_term_alone()
    a, y = net.a.detach(), net.fc.input_quantizer(net.a).detach()
    torch.testing.assert_close(gradient, 2 * (a - y) / a.square().mean(1, keepdim=True) / a.numel())
    assert net.fc.input_quantizer.range.grad == 0, "the range is detached"


def test_the_literal_loss_trains_no_activation_but_the_range() -> None:
    gradient, net = gradient_of_the_term_alone("minmax", trains="ranges")  # which clips nothing
    assert (gradient == 0).all()
    a, quantizer = net.a.detach(), net.fc.input_quantizer
    found = quantizer.range.grad.clone()
    quantizer.range.grad = None
    output_error(quantizer(a), a, a).backward()  # Q is trained against a constant
    torch.testing.assert_close(found, quantizer.range.grad)


def collected(net: nn.Module, method: OutputApproximation) -> tuple[Tensor, Tensor]:
    """Task loss, and the sum of all errors as plain autograd sees it, from a copy without the method."""
    plain = copy.deepcopy(net)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    teacher, errors, wanted = float_copy(plain), [], {}

    def remember(name: str):
        return lambda module, arguments, y: wanted.update({name: (arguments, y)})

    for name, module in teacher.named_modules():
        module.register_forward_hook(remember(name))
    teacher(X)

    def add(name: str, place: int | None):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            if method.against == "self" and isinstance(module, Quantizer):
                errors.append(output_error(arguments[0], y, arguments[0]))
            elif method.against == "self":
                a = F.linear(arguments[0].detach()[::4], module.weight, module.bias.detach())
                errors.append(output_error(a, y[::4], a))
            else:
                inputs, output = wanted[name]
                reference = output if place is None else inputs[place]
                errors.append(output_error(y, reference, reference))

        return hook

    for name, module in plain.named_modules():
        if method.layers == "block":
            if name == "blocks.0":
                module.register_forward_hook(add(name, None))
            continue
        for place, operand in enumerate(
            ("left", "right") if hasattr(module, "left_quantizer") else ("input",)
        ):
            quantizer = getattr(module, f"{operand}_quantizer", None)
            if quantizer is not None and (name != "patch_embedding" or method.against == "teacher"):
                quantizer.register_forward_hook(add(name, place))
        if isinstance(module, QuantLinear) and module.input_quantizer is None:
            module.register_forward_hook(add(name, None))
    loss = F.cross_entropy(plain(X), Y)
    return plain, loss, torch.stack(errors).sum()


@pytest.mark.parametrize(
    ("activations", "options"),
    [
        (2, {}),
        (2, {"against": "teacher"}),
        (2, {"against": "teacher", "layers": "block"}),
        (None, {"sites": ["blocks*", "head*"]}),
        (None, {"against": "teacher", "sites": ["blocks*", "head*"]}),
    ],
    ids=["self", "teacher", "block", "weights alone", "weights alone, teacher"],
)
def test_gradients_are_those_of_the_loss_with_the_errors_added(
    activations: int | None, options: dict
) -> None:
    net, method = start(activations=activations, **options)
    plain, loss, errors = collected(net, method)
    assert_same(gradients(net, F.cross_entropy(net(X), Y)), gradients(plain, loss + 0.5 * errors))


@pytest.mark.parametrize("against", ["self", "teacher"])
def test_micro_batches_add_up_to_the_step(against: str) -> None:
    states = []
    for accumulation in (1, 3):
        net, method = start(against=against)
        config = TrainConfig(
            epochs=2,
            batch_size=16,  # and a last one of 8
            accumulation=accumulation,
            optimizer="sgd",
            learning_rate=0.05,
            device="cpu",
        )
        train(net, X, Y, config, methods=[method])
        states.append({name: p.detach() for name, p in net.named_parameters()})
    assert_same(*states)


def test_without_saying_its_share_a_micro_batch_is_a_whole_step() -> None:
    _, method = start()
    method.micro_batch(0.25)
    method.after_step(0, 10)
    assert method.coefficient == method.strength == 0.5


def test_a_second_pass_has_the_same_gradients() -> None:
    net, _ = start(against="teacher")
    first = gradients(net, F.cross_entropy(net(X), Y))
    assert_same(first, gradients(net, F.cross_entropy(net(X), Y)))


def test_in_the_warm_up_training_is_plain() -> None:
    net, method = start(warm_up=0.5)
    bare, _ = start(strength=0.0)
    assert_same(gradients(net, F.cross_entropy(net(X), Y)), gradients(bare, F.cross_entropy(bare(X), Y)))
    strengths = []
    for step in range(4):
        method.after_step(step, 4)
        strengths.append(float(method.strength))
    assert strengths == [0.0, 0.5, 0.5, 0.5]


def test_the_teacher_is_the_float_model_until_another_is_given() -> None:
    float_model = build("digits_vit", seed=0, **SMALL).eval()
    _, method = start(against="teacher")
    assert torch.equal(method.teacher(X), float_model(X))
    other = build("digits_vit", seed=5, **SMALL).eval()
    net = build("digits_vit", seed=0, **SMALL)
    prepare(net, Scheme(bits=2), Scheme(bits=2))
    given = OutputApproximation(against="teacher")
    given.attach(net, other)
    assert torch.equal(given.teacher(X), other(X))


@pytest.mark.parametrize("against", ["self", "teacher"])
def test_inference_equals_the_training_forward_bit_for_bit(against: str) -> None:
    net, _ = start(against=against)
    trained = net(X).detach()
    assert torch.equal(trained, net.eval()(X))
    assert torch.equal(trained, finalize(net, X[:2])(X))


def test_after_the_last_step_nothing_is_left_of_it() -> None:
    net, method = start(against="teacher")
    method.after_step(9, 10)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_copy_of_the_model_copies_no_method() -> None:
    net, _ = start(against="teacher")
    copied = copy.deepcopy(net)
    hook = next(iter(copied.blocks[0].mlp.up.input_quantizer._forward_hooks.values()))
    assert hook is next(iter(net.blocks[0].mlp.up.input_quantizer._forward_hooks.values()))


# ---- widths


def test_output_errors_are_those_of_one_operand_alone() -> None:
    net, _ = start(budget=BUDGET, candidates=(2, 4, 8))
    found = output_errors(net, X)
    assert all((row[:-1] > row[1:]).all() for name, row in found.items() if len(row) > 1)
    layer, seen = net.blocks[0].mlp.up, []
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    net.eval()(X)
    y = F.linear(seen[0], layer.weight, layer.bias)
    rough = F.linear(seen[0], layer.weight_quantizer.at_row(layer.weight, 1), layer.bias)
    wanted = (rough - y).square().sum() / y.square().sum()
    torch.testing.assert_close(found["blocks.0.mlp.up.weight"][1], wanted)


def trained_in_a_budget(steps: int = 10, **options) -> tuple[nn.Module, list[dict]]:
    """The plan after every step."""
    net, method = start(
        bits=8, activations=8, **{"budget": BUDGET, "warm_up": 0.2, "candidates": (2, 4, 8), **options}
    )
    plans = [plan_of(net).bits]
    for step in range(steps):
        net(X)
        method.after_step(step, steps)
        plan = method.plan()
        assert all(entry["used"] <= entry["limit"] for entry in plan.budget.values())
        plans.append(plan.bits)
    return net, plans


@pytest.mark.parametrize("allocation", ["exact", "greedy", "evolutionary"])
def test_a_plan_is_never_over_its_budget(allocation: str) -> None:
    _, plans = trained_in_a_budget(allocation=allocation, every=0.2)
    assert plans[0] != plans[-1], "what was measured changed nothing"


def test_widths_move_after_the_warm_up_and_where_asked_for_until_they_settle() -> None:
    def moments(**options) -> set[int]:
        net, method = start(bits=8, activations=8, budget=BUDGET, warm_up=0.2, **options)
        chosen, measured = [], []
        method.allocation.choose = lambda: chosen.append(step)
        method.allocation.measure = lambda *inputs: measured.append(step)
        for step in range(20):
            net(X)
            method.after_step(step, 20)
        assert all({at, at - MEASURED + 1} <= set(measured) for at in chosen)
        return {step + 1 for step in chosen}

    assert moments() == {4}
    assert moments(every=0.2, settle=0.65) == {4, 8, 12}


def test_the_operands_of_a_layer_share_a_width_unless_told_otherwise() -> None:
    _, plans = trained_in_a_budget()
    assert all(plans[-1][n] == plans[-1][n.replace("weight", "input")] for n in plans[-1] if "weight" in n)
    _, apart = trained_in_a_budget(share_widths=False)
    assert any(apart[-1][n] != apart[-1][n.replace("weight", "input")] for n in apart[-1] if "weight" in n)


def test_a_new_width_takes_the_learned_factor_of_the_scale_along() -> None:
    net, method = start(bits=8, activations=8, budget=BUDGET)
    for quantizer in sites(net).values():
        quantizer.range.data.normal_(generator=GENERATOR)
    before = {name: q.range[int(q.bits.rows)].clone() for name, q in sites(net).items()}
    net(X)
    method.allocation.measure(*method.inputs)
    method.allocation.choose()
    assert all(torch.equal(q.range[int(q.bits.rows)], before[name]) for name, q in sites(net).items())


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "techer"}, "teacher"),
        ({"loss": "l1"}, "no such loss"),
        ({"layers": "blocks"}, "block"),
        ({"allocation": "exat"}, "exact"),
        ({"strength": -1}, "at least 0"),
        ({"strength": float("nan")}, "at least 0"),
        ({"warm_up": 1.5}, "share of the steps"),
        ({"every": -0.1}, "share of the steps"),
        ({"settle": "half"}, "share of the steps"),
        ({"candidates": (2, 9)}, "1 to 8"),
        ({"candidates": (4,)}, "at least two"),
        ({"layers": "block"}, "no grid of its own"),
        ({"trains": "ranges", "against": "teacher"}, "train together"),
        ({"budget": BUDGET}, "counted on a batch"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        OutputApproximation(**options)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(SiteError, match=r"blocks\.0\.mlp\.up\.input"):
        start(sites=["blocks.0.mlp.up.inputs"])
    with pytest.raises(SiteError, match="has no blocks"):
        start("digits_cnn", against="teacher", layers="block")
    with pytest.raises(BudgetError):
        start(budget={"average_weight_bits": 1.0})
