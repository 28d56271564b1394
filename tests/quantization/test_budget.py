"""Budgets check themselves, and the expected cost is the exact one wherever every site has one width."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmith.errors import BudgetError, FormatError, SiteError, TargetError
from bitsmith.quantization import (
    Budget,
    BudgetCost,
    CostTable,
    Scheme,
    allocate,
    measure,
    prepare,
    uniform_plan,
)
from bitsmith.quantization.budget import limits
from bitsmith.quantization.cost_kinds import float_cost, used
from bitsmith.tasks.models import build
from tests.quantization.networks import network, random_network
from tests.quantization.test_allocate import CHAIN, NPU, WIDTHS

TABLE: dict[str, Any] = {
    "version": 1,
    "name": "board",
    "unit": "us",
    "entries": [
        {"weight_bits": 4, "activation_bits": 8, "per_mac": 0.5, "per_layer": 1},
        {"weight_bits": 8, "activation_bits": 8, "per_mac": 1.0},
        {"weight_bits": 8, "activation_bits": 8, "kind": "Linear", "per_mac": 2.0},
        {"weight_bits": 8, "activation_bits": 8, "macs": 200, "per_layer": 7.0},
        {"weight_bits": 8, "activation_bits": 8, "kind": "Linear", "shape": [3, 3], "per_layer": 9.0},
    ],
}


@pytest.mark.parametrize("kind", ["bops", "weight_bytes", "activation_bytes", "average_weight_bits"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), True, "0.1"])
def test_a_limit_is_a_number_above_zero(kind: str, value: Any) -> None:
    with pytest.raises(BudgetError, match=rf"^budget\.{kind}: .*got {value!r}, expected a number above 0"):
        Budget(**{kind: value})


def test_a_budget_limits_something_and_knows_its_keys() -> None:
    with pytest.raises(BudgetError, match=r"^budget: this budget limits nothing.*bops: 0\.05"):
        Budget()
    with pytest.raises(BudgetError, match=r"^methods\.0\.budget\.bop: .*Did you mean bops\?"):
        Budget.from_dict({"bop": 1}, "methods.0.budget")
    with pytest.raises(BudgetError, match=r"^methods\.0\.budget\.bops: "):
        Budget.from_dict({"bops": 0}, "methods.0.budget")
    with pytest.raises(BudgetError, match=r"^budget\.tables\.0: "):
        Budget(tables=[{"table": "energy_45nm"}])
    with pytest.raises(BudgetError, match=r"^budget\.tables\.0\.limit: "):
        Budget(tables=[{"table": "energy_45nm", "limit": 0}])
    assert Budget.from_dict({"bops": 0.1, "average_weight_bits": 4}) == Budget(0.1, average_weight_bits=4)


def test_up_to_one_is_a_share_and_above_absolute() -> None:
    cost = network(CHAIN, float_macs=10)
    table = CostTable.from_dict(TABLE)
    budget = Budget(bops=0.5, weight_bytes=123.0, average_weight_bits=1)
    assert limits(budget, cost) == {"bops": 360 * 512, "weight_bytes": 123.0, "average_weight_bits": 1}
    dearest = 2 * 100 + 7 + 2 * 50
    shares = Budget(tables=[{"table": table, "limit": 1}])
    assert limits(shares, network(CHAIN)) == {"table:board": dearest}
    assert float_cost(network(CHAIN), "table:energy_45nm") == pytest.approx(350 * 4.6)
    assert float_cost(cost, "table:energy_45nm") == pytest.approx(360 * 4.6)


def one_hot(cost: BudgetCost, bits: dict[str, int]) -> Tensor:
    p = torch.zeros(len(cost.sites), cost.width, dtype=torch.float64)
    for i, site in enumerate(cost.sites):
        p[i, cost.candidates[site].index(bits[site])] = 1
    return p


EVERYTHING = Budget(
    bops=0.1,
    weight_bytes=0.1,
    activation_bytes=0.1,
    average_weight_bits=4,
    average_activation_bits=4,
    tables=[{"table": "energy_45nm", "limit": 0.5}],
)


@pytest.mark.parametrize("seed", range(30))
def test_expected_at_one_hot_is_exact(seed: int) -> None:
    draw = random.Random(seed)
    model, choices, _ = random_network(seed, 5, draw.choice(["native", "onnxruntime"]), candidates=5)
    cost = BudgetCost(model, EVERYTHING, choices)
    bits = {site: draw.choice(cost.widths(site)) for site in cost.sites}
    exact = torch.tensor([float(x) for x in cost.exact(bits).values()], dtype=torch.float64)
    torch.testing.assert_close(cost.expected(one_hot(cost, bits)), exact, rtol=1e-12, atol=0)


def test_expected_at_one_hot_is_exact_for_real_models() -> None:
    for name in ("digits_cnn", "digits_vit"):
        model = build(name)
        prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=6), target="onnxruntime")
        found = measure(model, torch.rand(2, 1, 8, 8))
        cost = BudgetCost(found, EVERYTHING, {s: (2, 3, 4, 8) for s, b in found.present.items() if b < 8})
        draw = random.Random(0)
        bits = {site: draw.choice((2, 3, 4, 8)) for site in cost.sites}
        exact = [float(x) for x in cost.exact(bits).values()]
        assert cost.expected(one_hot(cost, bits)).tolist() == pytest.approx(exact, rel=1e-12)
        assert cost.expected(one_hot(cost, bits).float()).tolist() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_expected_is_the_mean_over_plans_but_for_the_peak(seed: int) -> None:
    model, choices, _ = random_network(seed, 4)
    budget = Budget(bops=0.1, weight_bytes=0.1, tables=[{"table": "energy_45nm", "limit": 0.5}])
    cost = BudgetCost(model, budget, choices)
    p = torch.rand(len(cost.sites), cost.width, dtype=torch.float64)
    for i, site in enumerate(cost.sites):
        p[i, len(cost.candidates[site]) :] = 0
    p = p / p.sum(1, keepdim=True)
    mean = torch.zeros(3, dtype=torch.float64)
    columns = [range(len(cost.candidates[site])) for site in cost.sites]
    for choice in torch.cartesian_prod(*(torch.tensor(c) for c in columns)).view(-1, len(columns)).tolist():
        bits = {site: cost.candidates[site][k] for site, k in zip(cost.sites, choice, strict=True)}
        chance = torch.stack([p[i, k] for i, k in enumerate(choice)]).prod()
        mean += chance * torch.tensor([float(x) for x in cost.exact(bits).values()], dtype=torch.float64)
    torch.testing.assert_close(cost.expected(p), mean, rtol=1e-10, atol=0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, choices, _ = random_network(3, 4)
    cost = BudgetCost(model, EVERYTHING, choices)
    p = torch.rand(len(cost.sites), cost.width, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(cost.expected, (p,))


def test_bops_of_shares_are_the_product_of_expected_bits() -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=0.1), WIDTHS)
    p = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    bits = dict(zip(cost.sites, p @ torch.tensor([2.0, 4, 8], dtype=torch.float64), strict=True))
    assert cost.expected(p).item() == pytest.approx(used(cost.cost, "bops", bits).item())


def test_containers_are_steps_of_the_expected_bytes() -> None:
    cost = BudgetCost(
        network(CHAIN[:1], target="onnxruntime"), Budget(weight_bytes=1000), {"a.weight": (3, 4, 5)}
    )
    fixed = 4 + 4 + 4
    p = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5]])
    found = [cost.expected(row[None]).item() for row in p]
    assert found == [fixed + 25, fixed + 25, fixed + 50, fixed + 37.5]


# ---- tables


def test_the_most_specific_entry_counts() -> None:
    table = CostTable.from_dict(TABLE)

    def cost(kind: str, macs: int, shape: tuple[int, ...], weight_bits: int = 8) -> float:
        return table.cost("fc", kind, macs, shape, weight_bits, 8)

    assert cost("Conv2d", 10, (2, 2)) == 10
    assert cost("Linear", 10, (2, 2)) == 20
    assert cost("Linear", 200, (2, 2)) == 7
    assert cost("Linear", 200, (3, 3)) == 9
    assert cost("Linear", 10, (2, 2), weight_bits=4) == 6


def test_a_pair_that_could_be_chosen_and_is_not_listed_is_named() -> None:
    budget = Budget(tables=[{"table": CostTable.from_dict(TABLE), "limit": 500}])
    with pytest.raises(BudgetError, match=r"^l1: the table board says nothing .* 2 x 8 bits"):
        BudgetCost(network(CHAIN), budget, {"b.weight": (2, 8)})
    with pytest.raises(BudgetError, match="products outside every site"):
        BudgetCost(network(CHAIN, float_macs=1), budget, {})
    npu = BudgetCost(network(CHAIN, target=NPU), budget, {"b.weight": (2, 4, 8)})  # the NPU has no 2 x 8
    dear = npu.expected(torch.tensor([[1.0, 0, 0]]))
    assert dear == npu.expected(torch.tensor([[0, 1.0, 0]]))


def test_the_energy_table_holds_the_published_figures() -> None:
    table = CostTable.load("energy_45nm")
    assert table.cost("a", "Linear", 1, (), 8, 8) == pytest.approx(0.2 + 0.1)
    assert table.cost("a", "Conv2d", 10, (), 32, 32) == pytest.approx(10 * (3.7 + 0.9))
    assert table.cost("a", "Linear", 1, (), 4, 2) == pytest.approx(0.2 / 8 + 0.1)
    assert table.cost("a", "Linear", 1, (), 4, 32) == pytest.approx(4.6)
    assert "interpolated" in table.source
    assert "ISSCC 2014" in table.source


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "t"),
        ({"nam": "x"}, "t: nam"),
        ({"unit": ""}, "t: unit"),
        ({"name": "board.v2"}, "t: name"),
        ({"entries": []}, "t: entries"),
        ({"entries": [{"weight_bits": 9, "activation_bits": 8, "per_mac": 1}]}, "t: entries.0.weight_bits"),
        ({"entries": [{"weight_bits": 8, "activation_bits": 8}]}, "t: entries.0"),
        ({"entries": [{"weight_bits": 8, "activation_bits": 8, "per_mac": -1}]}, "t: entries.0.per_mac"),
        ({"entries": [{"weight_bits": 8, "activation_bits": 8, "kind": "LSTM"}]}, "t: entries.0.kind"),
        ({"entries": [TABLE["entries"][0]] * 2}, "t: entries.1"),
        ({"shared": "q"}, "t: shared"),
    ],
)
def test_a_wrong_table_is_refused_with_its_key(change: dict[str, Any], where: str) -> None:
    with pytest.raises(FormatError) as error:
        CostTable.from_dict(TABLE | change, "t")
    assert error.value.where == where


def test_an_unknown_table_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Did you mean energy_45nm"):
        CostTable.load("energy45")
    with pytest.raises(FormatError, match="no such cost table"):
        CostTable.load(tmp_path / "none.json")
    with pytest.raises(BudgetError, match=r"budget\.tables\.0\.table: target native has no table"):
        BudgetCost(network(CHAIN), Budget(tables=[{"table": "latency", "limit": 5}]), {})


# ---- candidates


@pytest.mark.parametrize("widths", [(), (2, 2), (0, 4), (2.5, 4), (4, 16)])
def test_candidates_are_different_widths(widths: tuple[Any, ...]) -> None:
    with pytest.raises(SiteError, match=r"^a\.weight: .*integers from 1 to 8"):
        BudgetCost(network(CHAIN), Budget(bops=0.1), {"a.weight": widths})


def test_a_site_that_is_not_there_and_a_pair_that_never_fits_are_refused() -> None:
    with pytest.raises(SiteError, match=r"a\.weigth: .*nearest are a\.weight"):
        BudgetCost(network(CHAIN), Budget(bops=0.1), {"a.weigth": (2, 4)})
    with pytest.raises(TargetError, match=r"^b\.weight x b\.input: target npu .*expected 2 x 4, "):
        BudgetCost(network(CHAIN, target=NPU), Budget(bops=0.1), {"b.weight": (2, 3)})


def test_a_width_per_channel_costs_each_pair_of_the_table_by_its_share_of_the_channels() -> None:
    model = network(CHAIN)
    bits = {**model.present, "b.weight": (4, 4, 8, 2, 4)}
    table = CostTable.load("energy_45nm")

    def layer(width: int) -> float:
        return table.cost("l1", "Linear", 200, (1, 1), width, 8)

    others = used(model, "table:energy_45nm", model.present) - layer(8)
    expected = others + 0.6 * layer(4) + 0.2 * layer(8) + 0.2 * layer(2)
    assert used(model, "table:energy_45nm", bits) == pytest.approx(expected)
    cost = BudgetCost(
        dataclasses.replace(model, present=bits),
        Budget(bops=0.5, tables=[{"table": table, "limit": 1e9}]),
        {"a.weight": (2, 4)},
    )
    assert cost.fixed["b.weight"] == (4, 4, 8, 2, 4)
    assert cost.expected(torch.tensor([[0.0, 1.0]]))[1].item() == pytest.approx(
        used(model, "table:energy_45nm", {**bits, "a.weight": 4})
    )
    found = allocate(cost, {"a.weight": [0, 1]})
    assert found.bits == {**bits, "a.weight": 4}
    assert uniform_plan(cost) == {**bits, "a.weight": 4}
