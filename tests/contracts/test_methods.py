"""What every method passes, on a CNN and on a transformer. A new method is one more row of METHODS."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import Interrupted, SiteError
from bitsmith.export.ties import first_differences, probe, values_of
from bitsmith.methods import Method
from bitsmith.quantization import Scheme, calibrate, commit, parameter_groups, plan_of, prepare, sites
from bitsmith.quantization.bits import Width, mean_width
from bitsmith.quantization.finalize import finalize
from bitsmith.tasks.models import build
from bitsmith.train import TrainConfig, train
from tests.contracts.methods import DECIDE_NOTHING, METHODS, Fractional, Search
from tests.train.problem import same_state

MODELS = {
    "cnn": ("digits_cnn", {}),
    "vit": ("digits_vit", {"width": 8, "depth": 1, "heads": 2, "hidden": 16}),
}
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(40, 1, 8, 8, generator=GENERATOR), torch.randint(0, 10, (40,), generator=GENERATOR)
WEIGHTS = Scheme(bits=4, granularity="channel", calibration="minmax")  # the cheapest; it is not tested here
ACTIVATIONS = Scheme(bits=4, calibration="minmax")
CONFIG = TrainConfig(epochs=2, batch_size=8, learning_rate=0.02, ema=0.9, accumulation=2, device="cpu")

ON_BOTH = (
    "budget_search",
    "fractional bits",
    "progressive bits",
    "output approximation",
    "weight anchor",
    "SAM",
)


def case(model: str, method: str):
    """Of the transformer's rows, which take most of the time, one for each method that users name."""
    slow = [pytest.mark.slow] if model != "cnn" and method not in ON_BOTH else []
    return pytest.param(model, method, marks=slow, id=f"{method}-{model}")


pytestmark = pytest.mark.parametrize(("model", "method"), [case(n, m) for n in MODELS for m in METHODS])


def start(model: str, method: str, seed: int = 0) -> tuple[nn.Module, list[Method]]:
    """A fresh model, prepared, with the methods attached, calibrated; in this order, as users do."""
    name, arguments = MODELS[model]
    net = build(name, seed=seed, **arguments)
    prepare(net, WEIGHTS, ACTIVATIONS, first_last_bits=None)
    methods = METHODS[method](X[:4])
    for each in methods:
        each.attach(net)
    calibrate(net, [X])
    return net, methods


def fit(
    net: nn.Module, methods: list[Method], path: Path | None = None, epochs: int = 2, **arguments
) -> None:
    config = dataclasses.replace(CONFIG, epochs=epochs)
    train(net, X, Y, config, methods=methods, checkpoint=path, **arguments)


def test_all_its_parameters_are_the_models_right_after_attach(model: str, method: str) -> None:
    net, methods = start(model, method)
    before = {name: id(p) for name, p in net.named_parameters()}
    known = set(before.values())
    assert all(id(p) in known for each in methods for p in each.parameters())
    held = [id(p) for group in parameter_groups(net, learning_rate=0.1) for p in group["params"]]
    assert sorted(held) == sorted(known)
    fit(net, methods, epochs=1)
    assert {name: id(p) for name, p in net.named_parameters()} == before


def test_no_state_is_born_in_training(model: str, method: str) -> None:
    net, methods = start(model, method)

    def shapes() -> list[dict]:
        return [
            {name: getattr(v, "shape", None) for name, v in m.state_dict().items()} for m in (net, *methods)
        ]

    before = shapes()
    fit(net, methods, epochs=1)
    assert shapes() == before


def test_saved_at_step_5_and_resumed_it_ends_as_ten_straight_steps_do(
    model: str, method: str, tmp_path: Path
) -> None:
    whole, methods = start(model, method)
    fit(whole, methods)
    parts, stopped = start(model, method)
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted, match="after step 5 of 10"):
        fit(parts, stopped, tmp_path / "c", stop=lambda: next(calls) == 5)
    fresh, resumed = start(model, method, seed=1)
    fit(fresh, resumed, tmp_path / "c", resume=True)
    assert same_state(whole, fresh)
    for one, other in zip(methods, resumed, strict=True):
        assert same_state(one, other)


def test_the_hooks_are_called_in_their_order(model: str, method: str) -> None:
    net, methods = start(model, method)
    calls: list[tuple[str, int]] = []

    def watch(hook: str, index: int, original) -> None:
        def watched(*arguments):
            calls.append((hook, index))
            return original(*arguments)

        setattr(methods[index], hook, watched)

    hooks = ("after_backward", "penalty", "after_step")
    for index, each in enumerate(methods):
        for hook in hooks:
            watch(hook, index, getattr(each, hook))
    fit(net, methods, epochs=1)
    assert calls == [(hook, index) for hook in hooks for index in range(len(methods))] * 5


def test_its_plan_is_committed_and_packed(model: str, method: str) -> None:
    net, methods = start(model, method)
    fit(net, methods)
    plan = methods[0].plan() or plan_of(net)
    report = commit(net, plan)
    assert report.post_training == ()
    assert plan_of(net).sites == plan.sites
    if method not in (*DECIDE_NOTHING, "progressive bits"):  # these end at the widths that they found
        assert sum(map(mean_width, plan.bits.values())) < 4 * len(plan.bits), "it was pressed to fewer bits"
    fixed = fixed_at(net, model, plan.bits)
    assert torch.equal(evaluated(net), evaluated(fixed))
    fit(net, [], epochs=1)  # fine-tuning
    assert_packed_computes_as_trained(finalize(net, X[:4]), net)


def assert_packed_computes_as_trained(packed: nn.Module, net: nn.Module) -> None:
    """Every row whose activations have the trained codes has the trained logits, but for the order of float32
    sums; folding BatchNorm may move a code only where rounding was a tie (export.ties says what one is)."""
    logits, answers = evaluated(net), evaluated(packed)
    trained = probe(net, X)
    first, tied = first_differences(trained, values_of(packed, probe(packed, X)), net)
    assert tied.all()
    same = first == len(trained.steps)
    assert same.float().mean() >= 0.9, "a tie is one activation in ten million"
    assert ((answers - logits)[same].abs() <= 1e-5 * logits.std()).all()


def evaluated(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(X)


def fixed_at(net: nn.Module, model: str, bits: dict[str, Width]) -> nn.Module:
    """A model without any method at these widths, with the weights and the rows in play of ``net``."""
    name, arguments = MODELS[model]
    fixed = build(name, **arguments)
    overrides = {site: {"bits": width} for site, width in bits.items()}
    prepare(fixed, WEIGHTS, ACTIVATIONS, overrides=overrides)
    state = {k: v for k, v in net.state_dict().items() if "_quantizer" not in k}
    fixed.load_state_dict(state, strict=False)
    for (_, ours), theirs in zip(sites(fixed).items(), sites(net).values(), strict=True):
        channels = theirs.range.shape[1]
        rows = theirs.bits.rows[0].expand(channels)  # of each channel
        for part, tensor in (*ours.named_parameters(), *ours.named_buffers(recurse=False)):
            own = getattr(theirs, part).expand(-1, channels)[rows, torch.arange(channels)]
            tensor.data.copy_(own[: tensor.shape[1]])
    return fixed


def test_bits_have_one_owner(model: str, method: str) -> None:
    net, _ = start(model, method)
    if method in DECIDE_NOTHING:
        Fractional().attach(net)
        return
    for other in (Fractional(), Search(X[:4])):
        with pytest.raises(SiteError, match="belong to another method"):
            other.attach(net)
