"""Greedy and evolutionary choices keep to the budget and come near the exact one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitsmith.errors import BudgetError
from bitsmith.quantization import Budget, BudgetCost, Scheme, measure, prepare
from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.allocate_roughly import evolutionary, greedy
from bitsmith.quantization.candidates import free_sites

CANDIDATES = (2, 3, 4, 8)
ROUGHLY = (greedy, evolutionary)


def cost_of(budget: dict, sizes=(6, 8, 5, 7), target: str = "native") -> BudgetCost:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    prepare(net, Scheme(bits=4), Scheme(bits=4), first_last_bits=None, target=target)
    cost = measure(net, torch.rand(2, sizes[0]))
    names = free_sites(net, None, "test")
    return BudgetCost(cost, Budget.from_dict(budget), dict.fromkeys(names, CANDIDATES))


BUDGETS = (
    {"bops": 0.02},
    {"average_weight_bits": 3.1, "average_activation_bits": 4.3},
    {"weight_bytes": 0.75, "activation_bytes": 31},
)
COSTS = [cost_of(budget) for budget in BUDGETS]


@pytest.mark.parametrize("choose", ROUGHLY)
@pytest.mark.parametrize("cost", COSTS, ids=["bops", "averages", "bytes"])
@given(seed=st.integers(0, 10**6), in_pairs=st.booleans())
@settings(max_examples=3, deadline=None)
def test_a_plan_is_within_every_budget_and_no_better_than_the_exact_one(choose, cost, seed, in_pairs) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = {
        name: (-torch.rand(len(CANDIDATES), generator=generator)).sort().values.tolist()
        for name in cost.sites
    }
    shared = [[f"{i}.weight", f"{i}.input"] for i in range(3)] if in_pairs else []
    found, best = choose(cost, value, shared=shared), allocate(cost, value, shared=shared)
    assert all(found.used[kind] <= limit for kind, limit in found.limits.items())
    assert found.used == cost.exact(found.bits)
    assert found.value <= best.value + 1e-9
    assert all(found.bits[a] == found.bits[b] for a, b in shared)


@pytest.mark.parametrize("choose", ROUGHLY)
def test_where_all_sites_are_alike_and_gains_fall_it_is_the_exact_one(choose) -> None:
    cost = cost_of({"average_weight_bits": 3.2, "average_activation_bits": 3.2}, sizes=(8, 8, 8, 8, 8, 8))
    value = {name: [-(4.0**-b) for b in CANDIDATES] for name in cost.sites}
    assert choose(cost, value).value == pytest.approx(allocate(cost, value).value)


def test_the_evolution_repeats_itself_with_its_generator() -> None:
    cost = COSTS[0]
    value = {name: torch.rand(4, generator=torch.Generator().manual_seed(3)).tolist() for name in cost.sites}
    first, second = (evolutionary(cost, value, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("choose", ROUGHLY)
def test_a_budget_that_nothing_fits_is_refused(choose) -> None:
    cost = cost_of({"average_weight_bits": 1.5})
    with pytest.raises(BudgetError):
        choose(cost, {name: [0.0] * 4 for name in cost.sites})
