"""Budget search by groups of output channels: each group draws, pays and learns by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from bitsmith.errors import SchemeError, TargetError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import Scheme, collapse, measure, plan_of, prepare, set_bits, sites
from bitsmith.quantization.categorical import Categorical, GroupCategorical
from bitsmith.quantization.sensitivity import after_training, sensitivity
from tests.methods.test_budget_search import X, Y, draw_rows, fit, network, searching


def test_groups_of_channels_draw_pay_and_learn_by_themselves() -> None:
    model, search = searching({"bops": 0.02}, candidates=(2, 4, 8), channel_groups=3)
    assert [w.logits.shape for w in search.widths.values()] == [(3, 3), (3,)] * 3
    assert len(search.cost.sites) == 3 * 4 == len(search.probabilities())
    first = search.widths["0.weight"]
    first.logits.data = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    search._draw()
    assert first.rows.tolist() == [[0] * 4 + [1] * 4 + [2] * 4]
    assert first.expected().tolist() == pytest.approx([2.0] * 4 + [4.0] * 4 + [8.0] * 4)
    weight = model[0].weight
    for group, bits in enumerate((2, 4, 8)):
        uniform = sites(model)["0.weight"].at_row(weight, (2, 4, 8).index(bits))
        part = slice(4 * group, 4 * group + 4)
        assert torch.equal(sites(model)["0.weight"](weight)[part], uniform[part])


@pytest.mark.parametrize("mode", ["sampled", "mixed", "real"])
def test_the_logits_of_a_group_see_its_channels_alone(mode: str) -> None:
    net = nn.Linear(6, 5)
    prepare(net, Scheme(bits=4, granularity="channel"), None, first_last_bits=None)
    grouped, single = GroupCategorical((3, 4, 8), (2, 3), mode), Categorical((3, 4, 8), mode)
    set_bits(net, {"weight": grouped})
    quantizer, x = sites(net)["weight"], torch.randn(5, 6)
    values = torch.tensor([[0.03, -0.05, 0.0], [0.01, 0.0, 0.02]])
    grouped.logits.data = values.clone()
    draw_rows([grouped], [2, 0])
    g = torch.randn(5, 6)
    y = quantizer(x)
    y.backward(g)
    found = grouped.logits.grad.clone()
    quantizer.bits = single
    for group, (part, row) in enumerate(((slice(0, 2), 2), (slice(2, 5), 0))):
        single.logits.data = values[group].clone()
        draw_rows([single], [row])
        single.logits.grad = None
        own, mask = quantizer(x), torch.zeros(5, 1)
        mask[part] = 1
        own.backward(g * mask)
        torch.testing.assert_close(y[part], own[part])
        torch.testing.assert_close(found[group], single.logits.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sampled", "mixed", "real"])
def test_a_plan_of_groups_is_within_the_budget_and_trains_on(mode: str) -> None:
    budget = {"bops": 0.02, "weight_bytes": 600}
    model, search = searching(budget, mode=mode, search_share=0.5, channel_groups=4)
    fit(model, search, 40)
    plan, cost = search.plan(), measure(model, X[:1])
    assert not search.is_searching()
    assert cost.bops(plan.bits) <= 0.02 * cost.bops_float
    assert cost.weight_bytes(plan.bits) <= 600
    assert plan.budget["bops"]["used"] == cost.bops(plan.bits)
    assert any(isinstance(bits, tuple) for bits in plan.bits.values())
    before = model(X)
    collapse(model)
    assert torch.equal(model(X), before)
    assert plan_of(model).bits == plan.bits

    fresh = network()
    overrides = {name: {"bits": bits} for name, bits in plan.bits.items()}
    prepare(fresh, Scheme(bits=4, granularity="channel"), Scheme(bits=4), overrides=overrides)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), before)


def test_one_group_is_the_search_of_whole_tensors() -> None:
    results = []
    for options in ({}, {"channel_groups": 1}):
        model, search = searching({"bops": 0.02}, search_share=0.5, **options)
        fit(model, search, 20)
        results.append((search.plan().bits, model(X)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_groups_start_where_their_channels_are_sensitive() -> None:
    """Scores of each channel sum to the tensor's; a group that is worth more gets more bits."""
    model, search = searching({"bops": 0.02}, candidates=(2, 4, 8), channel_groups=2)
    whole, _ = searching({"bops": 0.02}, candidates=(2, 4, 8))
    scores, sums = (
        sensitivity(model, [(X, Y)], F.cross_entropy),
        sensitivity(whole, [(X, Y)], F.cross_entropy),
    )
    for name, score in scores.items():
        if name.endswith("weight"):
            assert score.shape == (3, sites(model)[name].range.shape[1])
            torch.testing.assert_close(score.sum(1), sums[name])
        else:
            torch.testing.assert_close(score, sums[name])
    ready, weights = after_training(scores, ["2.weight"]), after_training(sums, ["2.weight"])
    torch.testing.assert_close(ready["2.weight"].sum(1), weights["2.weight"])
    values = {name: -score for name, score in scores.items()}
    values["2.weight"] = torch.stack([torch.zeros(12), torch.ones(12), torch.ones(12)])
    values["2.weight"][1:, :6] = 1e6
    search.start_at(values)
    p = search.widths["2.weight"].probabilities()
    assert p[0, 0] < 0.2
    assert p.max(1).values.tolist() == pytest.approx([0.9] * 2, abs=0.03)
    search.start_at({name: -score for name, score in sums.items()})  # of whole tensors: an even share each


def test_a_searched_state_of_groups_goes_on_where_it_was_taken() -> None:
    model, search = searching({"bops": 0.02}, search_share=0.1, channel_groups=3)
    fit(model, search, 20)
    fresh_model, fresh = searching({"bops": 0.02}, search_share=0.1, channel_groups=3)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(search.state_dict())
    assert fresh.plan().bits == search.plan().bits
    assert torch.equal(fresh_model(X), model(X))


def test_groups_are_refused_where_nothing_can_hold_them() -> None:
    model = network()
    prepare(
        model,
        Scheme(bits=4, granularity="channel"),
        Scheme(bits=4),
        target="onnxruntime",
        first_last_bits=None,
    )
    with pytest.raises(TargetError, match=r"channel_groups: .*Choose one width for each tensor"):
        BudgetSearch({"bops": 0.02}, X[:1], channel_groups=2).attach(model)
    model = network()
    prepare(model, Scheme(bits=4), Scheme(bits=4), first_last_bits=None)
    with pytest.raises(SchemeError, match=r"0\.weight\.granularity: .*got tensor.*Set granularity: channel"):
        BudgetSearch({"bops": 0.02}, X[:1], channel_groups=2).attach(model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sampled", "mixed", "real"])
def test_one_graph_serves_all_draws_and_computes_what_eager_does(mode: str) -> None:
    model, search = searching({"bops": 0.02}, mode=mode, channel_groups=3)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(X).sum().backward()
        search._draw()
    assert counter.frame_count == 1
    torch.compiler.reset()
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        logits = forward(X)
        F.cross_entropy(logits, Y).backward()
        results.append({"": logits} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(name.endswith("weight_quantizer.bits.logits") for name in results[0])
    for name, eager in results[0].items():
        torch.testing.assert_close(results[1][name], eager, rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0][""], results[1][""])
