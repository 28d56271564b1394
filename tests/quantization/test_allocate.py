"""Allocation against brute force: the same value, the same feasibility, and never over a budget."""

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import BudgetError, SiteError, TargetError
from bitsmith.quantization import TARGETS, Budget, BudgetCost, allocate, uniform_plan
from bitsmith.quantization.bits import one_or_each
from bitsmith.quantization.cost_kinds import used as cost_of
from bitsmith.quantization.liveness import Liveness, LiveTensor
from tests.quantization.networks import network, random_network, total

CHAIN = [("a.weight", "a.input", 100, 50), ("b.weight", "b.input", 200, 80), ("c.weight", "c.input", 50, 20)]
WIDTHS = {site: (2, 4, 8) for layer in CHAIN for site in layer[:2]}
NPU = dataclasses.replace(TARGETS["native"], name="npu", pairs=((2, 4), (4, 4), (4, 8), (8, 8), (3, 6)))


def plans(cost: BudgetCost, shared: Sequence[Sequence[str]] = ()) -> list[dict[str, int]]:
    """Every plan that the target and the shared groups admit, whatever it costs."""
    sites = list(cost.cost.present)
    found = []
    for bits in itertools.product(*(cost.widths(site) for site in sites)):
        plan = dict(zip(sites, bits, strict=True))
        pairs = all(
            cost.cost.target.multiplies(*(plan[s] for s in layer.operands)) for layer in cost.cost.layers
        )
        if pairs and all(len({plan[site] for site in group}) == 1 for group in shared):
            found.append(plan)
    return found


def fits(cost: BudgetCost, plan: Mapping[str, int]) -> bool:
    limits = cost.limits.tolist()
    return all(used <= limit for used, limit in zip(cost.exact(plan).values(), limits, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    target=st.sampled_from(["native", "onnxruntime", NPU]),
    kinds=st.sets(
        st.sampled_from(["bops", "weight_bytes", "activation_bytes", "average_weight_bits", "table"]),
        min_size=1,
        max_size=2,
    ),
    level=st.floats(0.0, 1.0),
    share=st.booleans(),
)
def test_the_value_is_that_of_the_best_of_all_plans(
    seed: int, target: str, kinds: set[str], level: float, share: bool
) -> None:
    model, choices, values = random_network(seed, 3, target)
    draw = random.Random(seed)
    shared = [draw.sample(sorted(model.present), 2)] if share else []
    everything: dict[str, float] = {kind: 1e12 for kind in kinds if kind != "table"}
    tables = [{"table": "energy_45nm", "limit": 1e12}] if "table" in kinds else []
    try:
        cost = BudgetCost(model, Budget(**everything, tables=tables), choices)
    except TargetError:
        return
    possible = plans(cost, shared)
    if possible:  # a limit that some plan meets exactly, or that is just too low
        for b, kind in enumerate(cost.kinds):
            costs = sorted(float(cost.exact(plan)[kind]) for plan in possible)
            cost.limits[b] = max(
                costs[int(level * (len(costs) - 1) * draw.random())] - draw.choice((0, 0.5)), 0.1
            )
    best = max((total(p, choices, values) for p in possible if fits(cost, p)), default=None)
    if best is None:
        with pytest.raises(BudgetError):
            allocate(cost, values, shared=shared)
        return
    found = allocate(cost, values, shared=shared)
    assert found.value == pytest.approx(best, abs=1e-7)
    assert total(found.bits, choices, values) == pytest.approx(found.value)
    assert found.bits in possible
    assert found.gap <= 1e-9
    assert found.used == cost.exact(found.bits)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_plans_never_exceed_their_budgets(count: int) -> None:
    over = []
    for seed in range(count):
        draw = random.Random(seed)
        model, choices, values = random_network(seed, 4, draw.choice(["native", "onnxruntime"]), candidates=4)
        cost = BudgetCost(model, Budget(bops=1e9, activation_bytes=1e9, average_weight_bits=9), choices)
        plan = {site: draw.choice(cost.widths(site)) for site in model.present}
        for b, used in enumerate(cost.exact(plan).values()):  # met exactly, and by 1e-8 not
            cost.limits[b] = float(used) * draw.choice((1, 1, 1 + 1e-8, 1 - 1e-8))
        try:
            found = allocate(cost, values)
        except BudgetError:
            continue
        over += [] if fits(cost, found.bits) else [seed]
        assert found.gap <= 1e-9
    assert over == []


def test_a_limit_is_met_exactly_where_a_plan_does() -> None:
    cost = BudgetCost(network(CHAIN), Budget(average_weight_bits=4, average_activation_bits=4), WIDTHS)
    value = {site: [0.0, 1.0, 1.5] for site in WIDTHS}
    assert allocate(cost, value).bits == dict.fromkeys(WIDTHS, 4)


def test_sites_that_are_fixed_keep_their_widths_and_are_in_the_plan() -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=0.99), {"b.weight": (2, 4), "c.input": (3,)})
    found = allocate(cost, {"b.weight": [0, 1]})
    assert found.bits == {**dict.fromkeys(WIDTHS, 8), "b.weight": 4, "c.input": 3}


def test_sites_share_a_width_where_the_target_says_so_for_each_block() -> None:
    target = dataclasses.replace(TARGETS["native"], shared=(("*.q", "*.k"), "x*"))
    layers = [(f"{block}.{p}", f"x{block}", 10, 10) for block in (0, 1) for p in "qk"]
    cost = BudgetCost(
        network(layers, target=target),
        Budget(bops=1e9),
        {"0.q": (2, 4), "0.k": (8, 4), "1.q": (2, 8), "1.k": (2, 8), "x0": (4, 8), "x1": (4, 8)},
    )
    value = {"0.q": [9, 0], "0.k": [9, 0], "1.q": [0, 2], "1.k": [1, 0], "x0": [0, 1], "x1": [3, 0]}
    bits = allocate(cost, value).bits
    assert bits == {"0.q": 4, "0.k": 4, "1.q": 8, "1.k": 8, "x0": 4, "x1": 4}


def test_only_pairs_that_the_target_multiplies_are_chosen() -> None:
    npu = dataclasses.replace(TARGETS["native"], name="npu", pairs=((4, 8), (8, 8)))
    cost = BudgetCost(network(CHAIN, target=npu), Budget(bops=0.05), WIDTHS)
    bits = allocate(cost, {site: [5, 1, 0] for site in WIDTHS}).bits
    assert {bits[f"{layer}.input"] for layer in "abc"} == {8}
    assert {bits[f"{layer}.weight"] for layer in "abc"} == {4}


# ---- errors


def test_what_holds_a_plan_above_its_budget_is_named() -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=2000), {"b.weight": (2, 4), "b.input": (2, 4)})
    with pytest.raises(BudgetError) as error:
        allocate(cost, {"b.weight": [0, 1], "b.input": [0, 1]})
    assert str(error.value) == (
        "budget: the cheapest plan costs 10400 bops, the budget is 2000; held up by a.weight x a.input "
        "(8 x 8 bits): 62%, c.weight x c.input (8 x 8 bits): 31%. "
        "Raise the limit, add narrower candidates, or free sites that are fixed."
    )
    assert error.value.exit_code == 2
    with pytest.raises(BudgetError, match="the cheapest plan costs 10400 bops"):
        uniform_plan(cost)


def test_two_budgets_that_contradict_each_other_are_both_named() -> None:
    npu = dataclasses.replace(TARGETS["native"], name="npu", pairs=((2, 8), (8, 2)))
    layers = [("a.weight", "a.input", 10, 100)]
    budget = Budget(average_weight_bits=3, average_activation_bits=3, bops=1e6)
    cost = BudgetCost(network(layers, target=npu), budget, {"a.weight": (2, 8), "a.input": (2, 8)})
    with pytest.raises(BudgetError, match="contradict each other") as error:
        allocate(cost, {"a.weight": [0, 1], "a.input": [0, 1]})
    assert error.value.where == "budget: average_weight_bits and average_activation_bits"


def test_sites_that_must_share_a_width_and_cannot_are_named() -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=0.5), {"a.weight": (2, 3), "b.weight": (4, 8)})
    value = {"a.weight": [0, 1], "b.weight": [0, 1]}
    with pytest.raises(BudgetError, match=r"a\.weight = b\.weight: .*no candidate in common"):
        allocate(cost, value, shared=[["a.weight", "b.weight"]])
    with pytest.raises(SiteError, match=r"b\.weigth: .*nearest are b\.weight"):
        allocate(cost, value, shared=[["a.weight", "b.weigth"]])


@pytest.mark.parametrize("numbers", [None, [1.0], [0.0, float("nan"), 1.0]])
def test_a_value_is_needed_for_each_candidate(numbers: list[float] | None) -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=0.5), WIDTHS)
    value = {site: [0.0, 1.0, 2.0] for site in WIDTHS} | {"b.input": numbers}
    with pytest.raises(SiteError, match=r"value\.b\.input: .*3 finite numbers"):
        allocate(cost, value)  # type: ignore[arg-type]


# ---- the uniform plan


def test_the_uniform_plan_is_the_widest_that_fits() -> None:
    cost = BudgetCost(network(CHAIN), Budget(average_weight_bits=5.0), {**WIDTHS, "a.weight": (3, 5)})
    assert uniform_plan(cost) == {**dict.fromkeys(WIDTHS, 4), "a.weight": 5}


def test_the_uniform_plan_says_that_mixed_widths_would_fit() -> None:
    npu = dataclasses.replace(TARGETS["native"], name="npu", pairs=((4, 8), (8, 8)))
    cost = BudgetCost(network(CHAIN, target=npu), Budget(average_weight_bits=5.0), WIDTHS)
    with pytest.raises(BudgetError, match="Use allocate"):
        uniform_plan(cost)


# ---- groups of channels


def grouped(seed: int, target: str = "native", ragged: bool = True) -> tuple[Any, ...]:
    """(cost model, candidates, groups, draw): three layers, the weights of two in groups of channels."""
    draw = random.Random(seed)
    layers, groups = [], {}
    for i in range(3):
        sizes = [draw.randint(1, 3) for _ in range(draw.choice((2, 2, 3) if i else (2,)))]
        channels = sum(sizes)
        each = draw.randint(1, 9) if ragged else 8
        layers.append((f"w{i}", f"x{i}", channels * draw.randint(1, 20), channels * each))
        if i < 2:
            groups[f"w{i}"] = sizes
    model = network(layers, Liveness((LiveTensor(9, ("x0", "x1")), LiveTensor(5, ())), ((0, 1),)), target)
    choices = {site: sorted(draw.sample((2, 3, 4, 8), draw.randint(2, 3))) for site in ("w0", "w1", "x0")}
    return model, choices, groups, draw


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    kinds=st.sets(
        st.sampled_from(["bops", "weight_bytes", "activation_bytes", "average_weight_bits", "table"]),
        min_size=1,
        max_size=2,
    ),
    level=st.floats(0.0, 1.0),
    share=st.booleans(),
)
def test_groups_of_channels_are_chosen_one_by_one_as_well_as_by_brute_force(
    seed: int, kinds: set[str], level: float, share: bool
) -> None:
    """Plans by site, each group a decision, counted by the cost of the whole model."""
    model, choices, groups, draw = grouped(seed)
    budget = Budget(
        **{kind: 1e12 for kind in kinds if kind != "table"},
        tables=[{"table": "energy_45nm", "limit": 1e12}] if "table" in kinds else [],
    )
    cost = BudgetCost(model, budget, choices, groups)
    values = {name: [round(draw.uniform(-5, 5), 3) for _ in cost.candidates[name]] for name in cost.sites}
    shared = [["w0", "w1"]] if share and set(choices["w0"]) & set(choices["w1"]) else []
    possible = []
    for bits in itertools.product(*(cost.candidates[name] for name in cost.sites)):
        plan = dict(zip(cost.sites, bits, strict=True))
        first, second = (cost.names(site) for site in ("w0", "w1"))
        tied = list(zip(first, second, strict=True)) if len(first) == len(second) else [(*first, *second)]
        if shared and any(len({plan[name] for name in names}) > 1 for names in tied):
            continue
        worth = sum(values[n][cost.candidates[n].index(plan[n])] for n in cost.sites)
        whole = dict.fromkeys(model.present, 8) | {"x0": plan["x0"]}
        for site, sizes in groups.items():
            whole[site] = tuple(
                plan[name] for name, n in zip(cost.names(site), sizes, strict=True) for _ in range(n)
            )
        amounts = [float(cost_of(model, kind, whole, cost.tables.get(kind))) for kind in cost.kinds]
        possible.append((worth, amounts, whole))
    for b in range(len(cost.kinds)):
        amounts = sorted(amounts[b] for _, amounts, _ in possible)
        cost.limits[b] = max(amounts[int(level * (len(amounts) - 1))] - draw.choice((0, 0.5)), 0.1)
    limits = cost.limits.tolist()
    fitting = [w for w, amounts, _ in possible if all(u <= m for u, m in zip(amounts, limits, strict=True))]
    if not fitting:
        with pytest.raises(BudgetError):
            allocate(cost, values, shared=shared)
        return
    found = allocate(cost, values, shared=shared)
    assert found.value == pytest.approx(max(fitting), abs=1e-7)
    assert found.gap <= 1e-9
    assert set(found.bits) == set(model.present)
    assert any(
        list(found.used.values()) == amounts
        for _, amounts, plan in possible
        if {site: one_or_each(bits) for site, bits in plan.items()} == found.bits
    )


def test_a_plan_of_groups_is_a_list_of_widths_or_one() -> None:
    cost = BudgetCost(
        network([("w", "x", 80, 80)]), Budget(average_weight_bits=5), {"w": (2, 4, 8)}, {"w": (3, 5)}
    )
    assert cost.sites == ("w[0:3]", "w[3:8]")
    value = {"w[0:3]": [0.0, 1.0, 9.0], "w[3:8]": [0.0, 1.0, 1.5]}
    assert allocate(cost, value).bits == {"w": (8, 8, 8, 2, 2, 2, 2, 2), "x": 8}
    assert allocate(cost, {**value, "w[3:8]": [0.0, 20.0, 1.5]}).bits == {"w": 4, "x": 8}
    assert uniform_plan(cost) == {"w": 4, "x": 8}


def test_a_byte_that_two_groups_share_is_counted_once() -> None:
    """3 + 5 channels of one element at 3 and 5 bits: 34 bits are 5 bytes, 9 and 25 bits by themselves 2 +
    4."""
    model = network([("w", "x", 8, 8)])
    rest = model.weight_bytes({"w": 8}) - 8
    cost = BudgetCost(model, Budget(weight_bytes=rest + 5), {"w": (3, 5)}, {"w": (3, 5)})
    found = allocate(cost, {"w[0:3]": [1.0, 0.0], "w[3:8]": [0.0, 1.0]})
    assert found.bits["w"] == (3, 3, 3, 5, 5, 5, 5, 5)
    assert found.used == {"weight_bytes": rest + 5}
    cost = BudgetCost(model, Budget(weight_bytes=rest + 4), {"w": (3, 5)}, {"w": (3, 5)})
    assert allocate(cost, {"w[0:3]": [1.0, 0.0], "w[3:8]": [0.0, 1.0]}).bits["w"] == 3


def test_groups_are_counted_in_the_containers_of_the_target() -> None:
    wide = dataclasses.replace(TARGETS["native"], name="wide", weight_containers={2: 4, 4: 4, 8: 8})
    model = network([("w", "x", 8, 8)], target=wide)
    rest = model.weight_bytes({"w": 8}) - 8
    assert model.weight_bytes({"w": (2, 2, 4, 4, 4, 4, 8, 8)}) == rest + 5
    cost = BudgetCost(model, Budget(weight_bytes=rest + 6), {"w": (2, 4, 8)}, {"w": (4, 4)})
    assert cost.expected(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])).item() == rest + 6
    found = allocate(cost, {"w[0:4]": [0.0, 1.0, 1.5], "w[4:8]": [0.0, 1.0, 2.0]})
    assert (found.bits["w"], found.used["weight_bytes"]) == ((4, 4, 4, 4, 8, 8, 8, 8), rest + 6)


def test_groups_are_named_where_a_budget_is_overspent() -> None:
    cost = BudgetCost(network(CHAIN), Budget(bops=100), {"a.weight": (2, 4)}, {"a.weight": (20, 30)})
    with pytest.raises(BudgetError, match=r"a\.weight\[20:50\] x a\.input \(2 x 8 bits\)"):
        allocate(cost, {"a.weight[0:20]": [0, 1], "a.weight[20:50]": [0, 1]})
