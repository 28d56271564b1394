"""Budget search: what its distribution is, what it promises, and how it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitsmith.errors import BudgetError, SchemeError, SiteError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import (
    Scheme,
    calibrate,
    measure,
    parameter_groups,
    prepare,
    set_bits,
    sites,
)
from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.categorical import Categorical, draw
from bitsmith.quantization.quantizer import Quantizer

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


def searching(budget: dict[str, float], **options: object) -> tuple[nn.Module, BudgetSearch]:
    model = network()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    search = BudgetSearch(budget, X[:1], **options)
    search.attach(model)
    calibrate(model, [X])
    return model, search


def fit(model: nn.Module, search: BudgetSearch, steps: int, rate: float = 2e-2) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=rate))
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        penalty = search.penalty()
        if penalty.requires_grad:
            penalty.backward()
        optimizer.step()
        search.after_step(step, steps)


def quantizer_of(mode: str, candidates: tuple[int, ...] = (2, 4, 8)) -> tuple[Quantizer, Categorical]:
    net = nn.Linear(6, 5)
    prepare(net, Scheme(bits=4, granularity="channel"), None, first_last_bits=None)
    width = Categorical(candidates, mode)
    set_bits(net, {"weight": width})
    return sites(net)["weight"], width


def draw_rows(widths: list[Categorical], rows: list[int]) -> None:
    """Draw these rows, without noise where the forward would see it."""
    count = len(widths[0].candidates)
    noise = torch.ones(len(rows), count)
    if widths[0].mode == "sampled":
        noise[torch.arange(len(rows)), rows] = 1e-9
    draw(widths, noise, torch.ones(1), torch.zeros(len(rows), count))


def test_uniform_logits_expect_the_mean_of_the_candidates() -> None:
    assert Categorical((2, 4, 6)).expected().item() == pytest.approx(4.0)


def test_expected_bits_are_differentiable() -> None:
    width = Categorical((1, 2, 8), gain=3.0).double()
    width.logits.data = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    (grad,) = torch.autograd.grad(width.expected(), width.logits)
    for k in range(3):
        ends = []
        for sign in (1, -1):
            moved = width.logits.detach().clone()
            moved[k] += sign * 1e-5
            ends.append(torch.softmax(3.0 * moved, 0) @ width.candidates)
        assert grad[k].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-6)


def test_the_entropy_is_that_of_the_candidates_and_differentiable() -> None:
    width = Categorical((1, 2, 8), gain=3.0).double()
    assert width.entropy().item() == pytest.approx(math.log(3))
    width.logits.data = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=3.0 * width.logits)
    assert width.entropy().item() == pytest.approx(expected.entropy().item())
    (found,) = torch.autograd.grad(width.entropy(), width.logits)
    torch.testing.assert_close(found, torch.autograd.grad(expected.entropy(), width.logits)[0])


def test_draws_have_the_probabilities_of_the_logits() -> None:
    _, search = searching({"bops": 0.02}, candidates=(2, 4, 8), temperature=(0.7, 0.7), logit_rate=1.0)
    width = next(iter(search.widths.values()))
    width.logits.data = torch.tensor([1.0, 0.0, -1.0])
    counts = torch.zeros(3)
    for _ in range(3000):
        search._draw()
        counts[int(width.rows)] += 1
    wanted = torch.softmax(torch.tensor([1.0, 0.0, -1.0]) / 0.7, 0)
    assert (counts / 3000 - wanted).abs().max() < 3 * math.sqrt(0.25 / 3000)


def test_a_sampled_site_is_quantized_at_the_width_drawn() -> None:
    quantizer, width = quantizer_of("sampled")
    x = torch.randn(5, 6)
    for row in range(3):
        width.rows.fill_(row)
        torch.testing.assert_close(quantizer(x), quantizer.at_row(x, row))


def test_a_mixed_site_is_the_mean_of_its_widths() -> None:
    quantizer, width = quantizer_of("mixed")
    width.logits.data = torch.tensor([0.05, 0.0, -0.02])
    x, p = torch.randn(5, 6), width.probabilities().detach()
    expected = sum(p[k] * quantizer.at_row(x, k) for k in range(3))
    torch.testing.assert_close(quantizer(x), expected)


def test_a_real_valued_site_certain_of_a_width_is_at_that_width() -> None:
    quantizer, width = quantizer_of("real", (3, 4, 8))  # without the grid of 1 and 2 bits
    x = torch.randn(5, 6)
    for row in range(3):
        width.logits.data = torch.full((3,), -10.0)
        width.logits.data[row] = 10.0
        torch.testing.assert_close(quantizer(x), quantizer.at_row(x, row), rtol=1e-4, atol=1e-5)


def test_a_real_valued_site_has_a_step_between_those_of_its_neighbours() -> None:
    quantizer, _ = quantizer_of("real", (3, 4))
    x = torch.linspace(-1, 1, 4001).repeat(5, 1)
    steps = [
        len(torch.unique(quantizer.at_row(x, 0)[0])),
        len(torch.unique(quantizer(x)[0].round(decimals=4))),
        len(torch.unique(quantizer.at_row(x, 1)[0])),
    ]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize("mode", ["sampled", "mixed", "real"])
def test_the_logits_receive_a_gradient(mode: str) -> None:
    quantizer, width = quantizer_of(mode)
    quantizer(torch.randn(5, 6)).square().sum().backward()
    assert width.logits.grad is not None
    assert bool(width.logits.grad.any())


def test_the_sampled_gradient_is_the_error_against_the_input_times_that_of_log_p() -> None:
    quantizer, width = quantizer_of("sampled")
    draw_rows([width], [0])
    x, g = torch.randn(5, 6), torch.randn(5, 6)
    q = quantizer(x)
    q.backward(g)
    inner = (g * (q.detach() - x)).sum()
    p = width.probabilities().detach()
    expected = inner * width.gain * (torch.tensor([1.0, 0.0, 0.0]) - p)
    torch.testing.assert_close(width.logits.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sampled", "mixed", "real"])
@pytest.mark.parametrize("share", [0.02, 0.008])
def test_the_plan_is_never_over_the_budget_and_uses_it(mode: str, share: float) -> None:
    model, search = searching({"bops": share}, mode=mode, search_share=0.5)
    fit(model, search, 60)
    plan = search.plan()
    cost = measure(model, X[:1])
    used = cost.bops(plan.bits) / cost.bops_float
    wide = {name: [float(b) for b in search.cost.candidates[name]] for name in search.cost.sites}
    dearest = allocate(search.cost, wide, fill=1.0)
    assert 0.98 * dearest.used["bops"] / cost.bops_float <= used <= share
    assert plan.budget["bops"]["used"] == cost.bops(plan.bits)
    assert not search.is_searching()


def test_several_budgets_hold_at_once() -> None:
    model, search = searching({"bops": 0.02, "average_weight_bits": 3.0}, search_share=0.5)
    fit(model, search, 40)
    cost, bits = measure(model, X[:1]), search.plan().bits
    assert cost.bops(bits) <= 0.02 * cost.bops_float
    assert cost.average_bits(bits, "weight") <= 3.0


def test_it_brings_expected_cost_to_the_budget_before_it_decides() -> None:
    """The Lagrangian does the work, not only the projection: from 4.0 expected bits of (2, 3, 4, 6, 8)."""
    model, search = searching({"average_weight_bits": 3.0}, candidates=(2, 3, 4, 6, 8), search_share=1.0)
    fit(model, search, 150)
    assert 0.9 < float(search.scalars()["used_average_weight_bits"]) < 1.05


def test_starting_values_are_followed() -> None:
    _, search = searching({"bops": 0.02}, candidates=(2, 4, 8))
    values = {name: torch.tensor([0.0, 1.0, 1.1]) for name in search.cost.sites}
    search.start_at(values, confidence=0.7)
    best = search.plan().bits
    for name, width in search.widths.items():
        p = width.probabilities()
        assert int(width.candidates[p.argmax()]) == best[name]
        assert p.max().item() == pytest.approx(0.7, abs=0.02)


def test_a_decided_search_costs_nothing_more() -> None:
    model, search = searching({"bops": 0.02}, search_share=0.1)
    fit(model, search, 20)
    assert not search.penalty().requires_grad
    assert all(q.bits.share is None for q in sites(model).values())


def test_state_goes_on_where_it_was_taken() -> None:
    model, search = searching({"bops": 0.02}, search_share=0.1)
    fit(model, search, 20)
    fresh_model, fresh = searching({"bops": 0.02}, search_share=0.1)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(search.state_dict())
    assert fresh.plan().bits == search.plan().bits
    assert not fresh.is_searching()
    assert torch.equal(fresh_model(X), model(X))


def test_pinned_sites_keep_their_width() -> None:
    model = network()
    prepare(model, Scheme(bits=4), Scheme(bits=4), overrides={"2.input": {"bits": 5}}, first_last_bits=8)
    search = BudgetSearch({"bops": 0.05}, X[:1])
    search.attach(model)
    assert set(search.widths) == {"2.weight"}
    bits = search.plan().bits
    assert (bits["0.weight"], bits["4.input"], bits["2.input"]) == (8, 8, 5)


def test_a_limit_on_the_bytes_of_activations_is_searched_under() -> None:
    model, search = searching({"activation_bytes": 0.3}, candidates=(2, 4, 8))
    fit(model, search, 20)
    (entry,) = search.plan().budget.values()
    assert entry["used"] <= entry["limit"]


def test_an_impossible_budget_says_what_the_cheapest_plan_costs() -> None:
    with pytest.raises(BudgetError, match="cheapest"):
        searching({"bops": 1e-5})


@pytest.mark.parametrize("candidates", [(0, 2), (2, 9), (2, 16), (3,), (2.5, 3)])
def test_bad_candidates_are_refused(candidates: tuple[int, ...]) -> None:
    with pytest.raises(SchemeError, match="candidates"):
        searching({"bops": 0.02}, candidates=candidates)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "mixd"),
        ("channel_groups", 0),
        ("channel_groups", 2.5),
        ("search_share", 0.0),
        ("search_share", 1.1),
        ("temperature", (0.1, 1.0)),
        ("multiplier_rate", 0.0),
        ("damping", -1.0),
        ("logit_rate", 0.0),
    ],
)
def test_bad_options_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(SchemeError, match=option):
        searching({"bops": 0.02}, **{option: value})


def test_nothing_free_is_an_error() -> None:
    model = network()
    prepare(model, Scheme(bits=4), Scheme(bits=4), overrides={"2.*": {"bits": 4}})
    with pytest.raises(SiteError, match="free"):
        BudgetSearch({"bops": 0.5}, X[:1]).attach(model)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model = network()
    prepare(model, Scheme(bits=4), Scheme(bits=4), first_last_bits=None)
    with pytest.raises(SiteError, match="nearest"):
        BudgetSearch({"bops": 0.5}, X[:1], sites=["3.weight"]).attach(model)


def test_a_site_with_one_width_that_its_grid_holds_is_fixed_there() -> None:
    model = network()
    prepare(model, Scheme(bits=4, grid="balanced"), Scheme(bits=4), first_last_bits=None)
    search = BudgetSearch({"bops": 0.02}, X[:1], candidates=(1, 2), sites=["2.*", "0.input"])
    search.attach(model)  # a balanced grid has no width of one bit
    calibrate(model, [X])
    assert search.cost.sites == ("0.input", "2.input") == tuple(search.widths)
    fit(model, search, 10)
    assert search.plan().bits["2.weight"] == 2
    model = network()
    prepare(model, Scheme(bits=4, grid="balanced"), None, first_last_bits=None)
    with pytest.raises(SchemeError, match="no site is left with two widths"):
        BudgetSearch({"bops": 0.5}, X[:1], candidates=(1, 2)).attach(model)
