"""Budget search with 32 among the candidates: sites may be left in float."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bitsmith.errors import BudgetError, SchemeError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import (
    FLOAT,
    Scheme,
    calibrate,
    collapse,
    measure,
    parameter_groups,
    prepare,
    sites,
)
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.sensitivity import after_training, sensitivity
from bitsmith.train.average import Average
from tests.methods.test_budget_search import X, Y, fit, network


def searching(budget: dict[str, float], **options: Any) -> tuple[nn.Module, BudgetSearch]:
    model = network()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    search = BudgetSearch(budget, X[:1], **{"candidates": (2, 4, 8, FLOAT), **options})
    search.attach(model)
    calibrate(model, [X])
    return model, search


@pytest.mark.parametrize("mode", ["sampled", "mixed"])
@pytest.mark.parametrize(
    "budget",
    [
        {"bops": 0.5},
        {"weight_bytes": 0.6},
        {"activation_bytes": 0.9, "bops": 0.3},
        {"average_weight_bits": 20},
    ],
)
def test_a_generous_budget_ends_with_sites_in_float_and_is_never_exceeded(
    budget: dict[str, float], mode: str
) -> None:
    model, search = searching(budget, mode=mode, search_share=0.5)
    fit(model, search, 30)
    plan = search.plan()
    assert FLOAT in plan.bits.values()
    assert set(plan.bits.values()) <= {2, 4, 8, FLOAT}
    assert all(entry["used"] <= entry["limit"] for entry in plan.budget.values())
    collapse(model)
    assert search.plan() == plan
    cost = measure(model, X[:1])
    for kind in budget:
        assert plan.budget[kind]["used"] == pytest.approx(cost.report()[kind])
    torch.testing.assert_close(finalize(model, X)(X), model.eval()(X), rtol=1e-4, atol=1e-5)


def test_a_tight_budget_leaves_nothing_in_float() -> None:
    model, search = searching({"bops": 0.01})
    fit(model, search, 20)
    assert set(search.plan().bits.values()) <= {2, 4, 8}


def test_a_budget_for_all_leaves_all_in_float() -> None:
    model, search = searching({"bops": 1.0})
    fit(model, search, 20)
    assert set(search.plan().bits.values()) == {FLOAT}
    collapse(model)
    assert not sites(model)


def test_an_impossible_budget_is_one_with_float_too() -> None:
    with pytest.raises(BudgetError, match="cheapest"):
        searching({"bops": 1e-5})


def test_a_state_of_before_and_of_after_the_decision_is_taken_up() -> None:
    """Also by optimizer and average: every tensor keeps its shape."""
    model, search = searching({"bops": 0.4}, search_share=0.5)
    fit(model, search, 10)
    assert FLOAT in search.plan().bits.values()
    again, other = searching({"bops": 0.4}, search_share=0.5)
    average = Average(again, 0.9)
    optimizer = torch.optim.AdamW(parameter_groups(again, learning_rate=1e-3))
    again(X).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(search.state_dict())
    optimizer.load_state_dict(state)
    assert not other.is_searching()
    assert other.plan() == search.plan()
    assert torch.equal(again.eval()(X), model.eval()(X))
    optimizer.zero_grad()
    again(X).sum().backward()
    optimizer.step()
    average.update()


def test_sites_in_float_learn_no_range_and_weights_go_on_learning() -> None:
    model, search = searching({"bops": 0.4}, search_share=0.1)
    fit(model, search, 10)
    decided = sites(model)
    floats = [q for q in decided.values() if q.bits.in_float]
    assert floats
    assert all(q.range[3].abs().max() < 1e-12 for q in decided.values())
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, search, 1)
    weights = [name for name, q in decided.items() if q.kind == "weight"]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in weights)


def test_the_search_starts_from_scores_in_which_float_hurts_nothing() -> None:
    model, search = searching({"bops": 0.3})
    scores = sensitivity(model, [(X, Y)], nn.functional.cross_entropy)
    assert all(row[3] == 0 for row in scores.values())
    fitted = after_training(scores, [name for name in scores if name.endswith("weight")])
    search.start_at({name: -row for name, row in fitted.items()})
    assert search.probabilities().isfinite().all()
    assert FLOAT in search.plan().bits.values()


def test_a_site_whose_range_has_no_stand_in_is_refused_by_name() -> None:
    model = network()
    prepare(model, Scheme(bits=4, range="dorefa"), Scheme(bits=4), first_last_bits=None)
    with pytest.raises(SchemeError, match=r"^0\.weight\.range: .*got dorefa"):
        BudgetSearch({"bops": 0.5}, X[:1], candidates=(4, FLOAT)).attach(model)
    model = network()
    prepare(model, Scheme(bits=4, range="dorefa"), Scheme(bits=4), first_last_bits=None)
    BudgetSearch({"bops": 0.5}, X[:1], candidates=(4, FLOAT), sites=["*.input"]).attach(model)
