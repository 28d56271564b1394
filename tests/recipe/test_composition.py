"""Every pair of methods in one recipe trains and gives its plan, in either order alike, or is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from bitsmith.errors import RecipeError
from bitsmith.quantization import Scheme, calibrate, commit, plan_of, prepare
from bitsmith.recipe.composition import UNDECIDED
from bitsmith.recipe.load import parse_recipe
from bitsmith.recipe.methods import METHODS, build_methods, check_methods
from bitsmith.train import TrainConfig, train
from tests.train.problem import same_state

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(32, 1, 6, 6, generator=GENERATOR), torch.randint(0, 3, (32,), generator=GENERATOR)
OPTIONS: dict[str, dict[str, Any]] = {
    "budget_search": {"budget": {"bops": 0.03}, "candidates": [2, 4, 8], "search_share": 0.5},
    "fractional_bits": {"target": {"average_weight_bits": 4}},
    "output_approximation": {"against": "teacher"},
    "progressive_bits": {"scale_steps": 1, "schedule": [[6, 0.3], [5, 0.2]]},
    "sharpness": {"kind": "sagm", "every": 2, "freeze": "ordered", "disorder_window": 3},
    "weight_anchor": {"strength": 0.3, "schedule": "linear"},
}
PAIRS = [
    pair for pair in itertools.combinations(sorted(METHODS), 2) if sum(name in UNDECIDED for name in pair) < 2
]
SEARCHES = list(itertools.combinations(UNDECIDED, 2))


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
        )
        net.extend([nn.ReLU(), nn.Linear(8, 3)])
    weights = Scheme(bits=3, granularity="channel", calibration="minmax")
    prepare(net, weights, Scheme(bits=4, calibration="minmax"), first_last_bits=None)
    return net


def trained(entries: list[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """The model after ten steps, and the plan of the method that decides one."""
    check_methods(entries, "recipe")
    net, methods = model(), build_methods(entries, X[:2])
    for method in methods:
        method.attach(net)
    calibrate(net, [X])
    config = TrainConfig(
        epochs=5, batch_size=16, learning_rate=0.02, ema=0.9, gradient_clip=1.0, accumulation=2, device="cpu"
    )
    train(net, X, Y, config, methods=methods)
    plans = [plan for method in methods if (plan := method.plan()) is not None]
    assert len(plans) <= 1
    return net, (plans[0] if plans else plan_of(net)).bits


def entry(name: str) -> dict[str, Any]:
    return {name: OPTIONS[name]}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_pair_trains_and_its_order_decides_nothing(pair: tuple[str, str]) -> None:
    net, bits = trained([entry(name) for name in pair])
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert commit(net, plan_of(net, bits=bits)).post_training == (), "it was trained at these widths"
    other, same_bits = trained([entry(name) for name in reversed(pair)])
    commit(other, plan_of(other, bits=same_bits))
    assert same_bits == bits
    assert same_state(net, other)


def test_every_pair_is_trained_or_refused() -> None:
    assert OPTIONS.keys() == METHODS.keys()
    assert len(PAIRS) + len(SEARCHES) == len(list(itertools.combinations(METHODS, 2)))


def test_four_methods_at_once_compose() -> None:
    names = ("weight_anchor", "output_approximation", "budget_search", "sharpness")
    net, bits = trained([entry(name) for name in names])
    other, _ = trained([entry(name) for name in reversed(names)])
    assert same_state(net, other)
    assert len(set(bits.values())) > 1


REFUSED = {
    **{
        f"{one} and {other}": ([entry(one), entry(other)], [one, other, "one plan", "Keep one"])
        for one, other in SEARCHES
    },
    "one twice": (
        [entry("sharpness"), entry("weight_anchor"), entry("sharpness")],
        ["sharpness, 2 times", "once"],
    ),
    "an allocation and a search": (
        [
            entry("budget_search"),
            {"output_approximation": {"budget": {"bops": 0.05}}},
        ],
        ["budget_search and output_approximation", "Leave out output_approximation's budget"],
    ),
    "a search on requantized weights": (
        [{"weight_anchor": {"pull": "anchor", "requantize": True}}, entry("budget_search")],
        ["weight_anchor.requantize", "no error there", "requantize: false"],
    ),
    "real widths on requantized weights": (
        [{"weight_anchor": {"pull": "anchor", "requantize": True}}, entry("fractional_bits")],
        ["weight_anchor.requantize", "fractional_bits"],
    ),
}


@pytest.mark.parametrize(("entries", "fragments"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("turned", [False, True])
def test_what_cannot_be_meant_together_is_one_line(
    entries: list[dict[str, Any]], fragments: list[str], turned: bool
) -> None:
    if turned:
        entries = entries[::-1]
        fragments = [part for part in fragments if " and " not in part]
    with pytest.raises(RecipeError) as refused:
        parse_recipe({"methods": entries}, "my.yaml")
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("my.yaml, methods")
    assert all(part in message for part in fragments), message


def test_requantized_weights_go_with_a_curriculum() -> None:
    literal = {"weight_anchor": {"pull": "anchor", "requantize": True, "strength": 0.5}}
    _, bits = trained([literal, entry("progressive_bits")])
    assert set(bits.values()) == {3, 4}


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_plan_leaves_no_width_to_decide(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"a plan fixes every width, so that {name} has none left"):
        parse_recipe({"methods": [entry(name)], "plan": "plan.json"}, "my.yaml")
