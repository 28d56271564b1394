"""32 bits in plans: what they cost, which targets hold them, and what they are worth to a search."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.errors import SchemeError, SiteError, TargetError
from bitsmith.quantization import (
    FLOAT,
    Budget,
    BudgetCost,
    FixedBits,
    Scheme,
    Target,
    allocate,
    calibrate,
    commit,
    measure,
    prepare,
    set_bits,
    sites,
    uniform_plan,
)
from bitsmith.quantization.budget import limits
from bitsmith.quantization.candidates import site_candidates
from bitsmith.quantization.cost import CostModel
from bitsmith.quantization.sensitivity import after_training, sensitivity
from bitsmith.quantization.target import TARGETS, load_target
from bitsmith.tasks.models import build
from tests.quantization.test_target_json import NPU, write

W4, A4 = Scheme(bits=4, granularity="channel"), Scheme(bits=4)
IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
VIT = {"width": 8, "depth": 1, "heads": 2, "hidden": 16}
MODELS = pytest.mark.parametrize(("name", "arguments"), [("digits_cnn", {}), ("digits_vit", VIT)])


def network(name: str = "digits_cnn", **arguments: int) -> nn.Module:
    model = build(name, seed=0, **arguments)
    prepare(model, W4, A4, first_last_bits=None)
    calibrate(model, [IMAGES])
    return model.eval()


def some_in_float(model: nn.Module) -> dict[str, int]:
    """Every third site in float."""
    return {site: FLOAT if i % 3 == 1 else 4 for i, site in enumerate(sites(model))}


# ---- costs

WIDTHS = (4, 6, FLOAT)
KINDS = ("bops", "weight_bytes", "activation_bytes", "average_weight_bits", "average_activation_bits")
EVERYTHING = Budget(
    bops=1.0,
    weight_bytes=1.0,
    activation_bytes=1.0,
    average_weight_bits=32,
    average_activation_bits=32,
    tables=[{"table": "energy_45nm", "limit": 1.0}],
)


@MODELS
def test_a_candidate_of_32_bits_costs_what_the_site_in_float_costs(name: str, arguments: dict) -> None:
    """Of every kind: before the decision, as an expectation, and of the model that is prepared so."""
    model = network(name, **arguments)
    budget = BudgetCost(measure(model, IMAGES), EVERYTHING, dict.fromkeys(sites(model), WIDTHS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        drawn = torch.randint(3, (len(budget.sites),), generator=generator).tolist()
        bits = {site: WIDTHS[k] for site, k in zip(budget.sites, drawn, strict=True)}
        asked = build(name, seed=0, **arguments)
        overrides = {site: {"bits": b} for site, b in bits.items()}
        prepare(asked, W4, A4, overrides=overrides, first_last_bits=None)
        calibrate(asked, [IMAGES])
        cost = measure(asked, IMAGES)
        prepared = BudgetCost(cost, EVERYTHING, {})
        assert budget.exact(bits) == prepared.exact({})
        for kind in KINDS[:3]:
            assert getattr(budget.cost, kind)(bits) == getattr(cost, kind)(cost.present)
        one_hot = nn.functional.one_hot(torch.tensor(drawn), 3).double()
        expected = dict(zip(budget.kinds, budget.expected(one_hot).tolist(), strict=True))
        assert expected == pytest.approx(prepared.exact({}))
        assert dict(zip(budget.kinds, budget.limits.tolist(), strict=True)) == limits(EVERYTHING, cost)


def test_a_weight_in_float_with_one_scale_is_never_counted_too_low() -> None:
    """A BatchNorm behind it could be folded then; while the width is undecided, it is counted as a layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
    prepare(net, Scheme(bits=4), A4, first_last_bits=None)
    x = torch.randn(4, 8)
    calibrate(net, [x])
    undecided = measure(net, x)
    bits = dict.fromkeys(sites(net), 4) | {"0.weight": FLOAT}
    commit(net, bits)
    decided = measure(net, x)
    for kind in KINDS[:3]:
        assert getattr(decided, kind)(bits) <= getattr(undecided, kind)(bits)


def test_the_allocation_with_float_is_the_best_of_all_plans() -> None:
    model = network()
    cost = measure(model, IMAGES)
    free = ("conv1.weight", "conv2.weight", "conv2.input", "conv3.weight", "conv3.input", "fc.input")
    candidates = dict.fromkeys(free, (2, 4, FLOAT))
    generator = torch.Generator().manual_seed(1)
    values = {site: torch.rand(3, generator=generator).cumsum(0).tolist() for site in free}
    for wanted in (
        Budget(bops=0.1),
        Budget(weight_bytes=0.4),
        Budget(activation_bytes=0.5),
        Budget(bops=0.3, weight_bytes=0.3, average_activation_bits=12),
    ):
        budget = BudgetCost(cost, wanted, candidates)
        most = dict(zip(budget.kinds, budget.limits.tolist(), strict=True))
        best = -math.inf
        for drawn in itertools.product(range(3), repeat=len(free)):
            bits = {site: (2, 4, FLOAT)[k] for site, k in zip(free, drawn, strict=True)}
            if all(used <= most[kind] for kind, used in budget.exact(bits).items()):
                best = max(best, sum(values[site][k] for site, k in zip(free, drawn, strict=True)))
        found = allocate(budget, values)
        assert found.value == pytest.approx(best)
        assert all(found.used[kind] <= most[kind] for kind in most)


def test_the_dearest_uniform_plan_is_float_where_the_budget_pays_for_it() -> None:
    cost = measure(network(), IMAGES)
    free = dict.fromkeys(cost.present, (2, 4, FLOAT))
    assert set(uniform_plan(BudgetCost(cost, Budget(bops=1.0), free)).values()) == {FLOAT}
    assert set(uniform_plan(BudgetCost(cost, Budget(bops=0.9), free)).values()) == {4}


def test_the_channels_of_a_weight_are_all_in_float_or_none() -> None:
    cost = measure(network(), IMAGES)
    free = {"conv2.weight": (2, FLOAT)}
    with pytest.raises(SiteError, match=r"^conv2\.weight: .*all in float .*Leave 32 out"):
        BudgetCost(cost, Budget(bops=0.5), free, {"conv2.weight": (4, 4)})
    BudgetCost(cost, Budget(bops=0.5), free, {"conv2.weight": (8,)})


def test_the_state_of_a_committed_model_does_not_change_what_other_plans_cost() -> None:
    model = network("digits_vit", **VIT)
    before = measure(model, IMAGES)
    commit(model, some_in_float(model))
    after: CostModel = measure(model, IMAGES)
    for bits in (dict.fromkeys(sites(model), 3), some_in_float(model)):
        for kind in KINDS[:3]:
            assert getattr(after, kind)(bits) == getattr(before, kind)(bits)


# ---- targets


def test_a_target_with_pairs_has_float_where_a_pair_names_it(tmp_path: Path) -> None:
    plain = load_target(write(tmp_path, NPU))
    mixed = load_target(write(tmp_path, NPU | {"pairs": [[4, 8], [8, 8], [32, 32]]}))
    assert [target.has_float for target in (TARGETS["native"], plain, mixed)] == [True, False, True]
    assert plain.multiplies(4, FLOAT)  # left to the host
    assert not mixed.multiplies(4, FLOAT)
    assert mixed.multiplies(FLOAT, FLOAT)


def test_candidates_are_those_that_the_target_holds(tmp_path: Path) -> None:
    def candidates(target: str | Target, wanted: list[int]) -> dict[str, list[int]]:
        model = build("digits_cnn")
        prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8), target=target)
        return site_candidates(model, ["conv2.weight", "conv2.input"], wanted)

    every = {"conv2.weight": [2, 8, 32], "conv2.input": [2, 8, 32]}
    assert candidates("native", [2, 8, 32]) == candidates("onnxruntime", [2, 8, 32]) == every
    path = write(tmp_path, NPU)
    assert candidates(path, [2, 8, 32]) == {"conv2.weight": [8], "conv2.input": [2, 8]}
    with pytest.raises(
        SchemeError, match=r"stores none of these widths; got 2 or 32, expected some of 4 or 8"
    ):
        candidates(path, [2, 32])
    path = write(tmp_path, NPU | {"pairs": [[4, 8], [8, 8], [32, 32]]})
    assert candidates(path, [2, 8, 32])["conv2.weight"] == [8, 32]


def test_a_layer_is_in_float_as_a_whole_where_the_target_says_so(tmp_path: Path) -> None:
    target = write(tmp_path, NPU | {"pairs": [[8, 8], [32, 32]]})
    model = build("digits_cnn")
    prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8), target=target)
    free = dict.fromkeys(("conv2.weight", "conv2.input", "conv3.weight", "conv3.input"), (8, FLOAT))
    budget = BudgetCost(measure(model, IMAGES), Budget(bops=0.6), free)
    found = allocate(budget, {site: [0.0, 1.0] for site in free})
    assert found.bits["conv2.weight"] == found.bits["conv2.input"]
    assert FLOAT in found.bits.values()
    commit(model, found.bits)
    with pytest.raises(TargetError, match=r"got float x 8 bits, expected 8 x 8 or 32 x 32"):
        commit(model, dict.fromkeys(sites(model), 8) | {"conv2.weight": FLOAT})


# ---- sensitivity


def test_float_hurts_nothing() -> None:
    model = network()
    set_bits(model, {site: FixedBits(2, [2, 4, FLOAT]) for site in sites(model)})
    calibrate(model, [IMAGES])
    labels = torch.arange(16) % 10
    scores = sensitivity(model, [(IMAGES, labels)], nn.functional.cross_entropy)
    assert all(row[0] > row[1] > row[2] == 0 for row in scores.values())


def test_the_score_of_float_does_not_move_a_site_among_others() -> None:
    scores = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([40.0, 10.0])}
    with_float = {site: torch.cat([row, torch.zeros(1)]) for site, row in scores.items()}
    fit, wanted = after_training(with_float, []), after_training(scores, [])
    for site, row in wanted.items():
        assert torch.equal(fit[site], torch.cat([row, torch.zeros(1)]))
