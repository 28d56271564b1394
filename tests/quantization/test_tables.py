"""Sites whose codes index a table of levels: trained, searched, stored and counted like any other; what is
refused, in one line."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, SchemeError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.methods.progressive_bits import ProgressiveBits
from bitsmith.methods.sharpness import Sharpness
from bitsmith.methods.weight_anchor import WeightAnchor
from bitsmith.numerics.levels import powers_of_two
from bitsmith.quantization import Scheme, calibrate, measure, parameter_groups, prepare, set_bits, sites
from bitsmith.quantization.candidates import site_candidates
from bitsmith.quantization.plan import collapse, commit, plan_of
from bitsmith.quantization.rows import observe_weight
from bitsmith.recipe import parse_recipe
from bitsmith.train import TrainConfig, train
from tests.quantization.widths import Mixed, Sampled
from tests.train.problem import data, network

X, Y = data()
GRIDS = ("powers_of_two", "levels")


def prepared(grid: Any, bits: int = 3, activations: Scheme | None = None, **changes: Any) -> nn.Module:
    """Linear layers on the grid, calibrated, ready to train."""
    net = network(0, dropout=0.0)
    scheme = Scheme(bits=bits, grid=grid, **{"granularity": "channel", **changes})
    prepare(net, scheme, activations, first_last_bits=None)
    calibrate(net, [X])
    return net.train()


def fit(net: nn.Module, steps: int = 20, methods: tuple[Any, ...] = (), rate: float = 1e-2) -> list[float]:
    """A loop of one's own; the losses."""
    optimizer = torch.optim.AdamW(parameter_groups(net, learning_rate=rate))
    losses = []
    for method in methods:
        method.optimizer_made(optimizer)
    for step in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X), Y)
            loss.backward()
            return loss.detach()

        losses.append(float(closure()))
        for method in methods:
            method.after_backward(closure)
            penalty = method.penalty()
            if penalty.requires_grad:
                penalty.backward()
        optimizer.step()
        for method in methods:
            method.after_step(step, steps)
    return losses


def table_of(net: nn.Module, site: str = "0.weight") -> Tensor:
    found = sites(net)[site].levels().table
    assert found is not None
    return found


# ---- training


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_training_learns_scales_and_learned_levels_and_stays_on_the_grid(grid: str, bits: int) -> None:
    net = prepared(grid, bits)
    before = table_of(net)
    losses = fit(net)
    assert losses[-1] < losses[0]
    quantizer, weight = sites(net)["0.weight"], net[0].weight
    assert quantizer.is_trained()
    assert bool(quantizer.range.any())
    after, scale = table_of(net), quantizer.levels().scale
    assert torch.equal(before, after) == (grid == "powers_of_two")
    assert after.diff().min() >= 0
    if grid == "powers_of_two":
        assert torch.equal(after, powers_of_two(bits))
    values, codes = quantizer(weight), quantizer.codes(weight)
    assert torch.equal(values, scale * after[codes.long()])
    distances = (weight.double()[..., None] / scale.double()[..., None] - after.double()).abs()
    chosen = distances.gather(-1, codes.long()[..., None]).squeeze(-1)
    assert bool((chosen <= distances.amin(-1) + 1e-6).all())


def test_levels_train_at_the_rate_of_ranges_without_decay() -> None:
    net = prepared("levels")
    groups = {
        g["name"]: g for g in parameter_groups(net, learning_rate=0.1, weight_decay=1.0, range_factor=0.5)
    }
    levels = sites(net)["0.weight"].table_shift
    assert any(p is levels for p in groups["ranges"]["params"])
    assert groups["ranges"]["weight_decay"] == 0


@pytest.mark.parametrize("changes", [{"granularity": "tensor"}, {"granularity": "group", "group_size": 5}])
@pytest.mark.parametrize("grid", GRIDS)
def test_one_scale_and_groups_of_scales_train_too(grid: str, changes: dict[str, Any]) -> None:
    losses = fit(prepared(grid, **changes))
    assert losses[-1] < losses[0]


def test_a_static_range_leaves_scales_where_they_are_and_trains_levels() -> None:
    net = prepared("levels", range="static")
    before = table_of(net)
    fit(net, 5)
    assert not bool(sites(net)["0.weight"].range.any())
    assert not torch.equal(table_of(net), before)


@pytest.mark.parametrize("grid", GRIDS)
def test_calibration_gives_up_what_was_learned(grid: str) -> None:
    net, fresh = prepared(grid), prepared(grid)
    weight = net[0].weight.detach().clone()
    fit(net, 5)
    quantizer = sites(net)["0.weight"]
    quantizer.calibrate(*observe_weight(quantizer, weight))
    assert not quantizer.is_trained()
    assert torch.equal(table_of(net), table_of(fresh))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_checkpoint_brings_the_levels_back(grid: str) -> None:
    net, other = prepared(grid), prepared(grid)
    fit(net, 5)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(other(X), net(X))


def test_a_model_without_tables_has_the_keys_it_always_had() -> None:
    assert not [key for key in prepared("auto").state_dict() if "table" in key]


@pytest.mark.parametrize("grid", GRIDS)
def test_looked_up_rows_are_those_of_the_whole_table(grid: Any) -> None:
    torch.manual_seed(0)
    net = nn.Embedding(12, 6)
    prepare(net, Scheme(bits=3, granularity="channel", grid=grid), first_last_bits=None)
    index = torch.tensor([3, 3, 0, 11])
    net(index).square().sum().backward()
    quantizer = sites(net)["weight"]
    assert torch.equal(net(index), quantizer(net.weight)[index])
    assert (quantizer.table_shift is not None and quantizer.table_shift.grad is not None) == (
        grid == "levels"
    )
    packed = bs.finalize(net, index)
    assert torch.equal(packed(index), net(index))


# ---- methods


@pytest.mark.parametrize(
    "method", [WeightAnchor(requantize=True, pull="anchor"), WeightAnchor(), Sharpness()]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_anchors_and_second_passes_work_on_tables(grid: str, method: Any) -> None:
    net, method = prepared(grid), copy.deepcopy(method)
    method.attach(net)
    losses = fit(net, methods=(method,))
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    if isinstance(method, Sharpness) or not method.requantize:
        assert losses[-1] < losses[0]
    else:
        weight = net[0].weight
        torch.testing.assert_close(sites(net)["0.weight"](weight), weight.detach(), rtol=1e-6, atol=0)


def test_distillation_trains_a_table() -> None:
    net, teacher = prepared("levels"), network(1)
    before = table_of(net)
    train(net, X, Y, TrainConfig(epochs=1, batch_size=16, distillation=0.5), teacher=teacher)
    assert not torch.equal(table_of(net), before)


@pytest.mark.parametrize("kind", [Sampled, Mixed])
@pytest.mark.parametrize("grid", GRIDS)
def test_widths_are_searched_each_with_its_table(grid: str, kind: Any) -> None:
    net = prepared(grid)
    width = kind([2, 3, 4])
    set_bits(net, {"0.weight": width})
    quantizer, weight = sites(net)["0.weight"], net[0].weight.detach()
    rows = [quantizer.at_row(weight, row) for row in range(3)]
    assert [len(quantizer.levels(row).table) for row in range(3)] == [
        n - (grid != "levels") for n in (4, 8, 16)
    ]
    for row, bits in enumerate((2, 3, 4)):
        alone = sites(prepared(grid, bits))["0.weight"]
        assert torch.equal(rows[row], alone(weight))
    quantizer(weight).square().sum().backward()
    assert width.logits.grad is not None
    assert bool(width.logits.grad.any())
    want = sum(rows) / 3 if kind is Mixed else rows[2]
    torch.testing.assert_close(quantizer(weight), want)
    if kind is Sampled:
        commit(net, plan_of(net, bits={"0.weight": 2}).bits)
        collapse(net)
        assert torch.equal(quantizer(weight), rows[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_budget_is_kept_to_the_byte(grid: str) -> None:
    net = prepared(grid)
    cost = measure(net, X[:1])
    limit = cost.weight_bytes(dict.fromkeys(cost.present, 3))
    search = BudgetSearch({"weight_bytes": limit}, X[:1], candidates=[2, 3, 4, 8])
    search.attach(net)
    calibrate(net, [X])
    fit(net, 8, (search,))
    plan = search.plan()
    assert {site.bits for site in plan.sites.values() if site.kind == "weight"} <= {2, 3, 4}
    assert cost.weight_bytes(plan.bits) <= limit


def test_learned_widths_move_between_tables() -> None:
    net = prepared("levels")
    method = FractionalBits(X[:1], target={"average_weight_bits": 3.0}, bits=(2, 4), mode="sampled")
    method.attach(net)
    fit(net, 8, (method,))
    assert {site.bits for site in method.plan().sites.values() if site.kind == "weight"} <= {2, 3, 4}


@pytest.mark.parametrize("grid", GRIDS)
def test_another_width_that_was_not_trained_is_fitted_anew(grid: str) -> None:
    net = prepared(grid, 3)
    report = commit(net, dict.fromkeys(sites(net), 4))
    assert "0.weight" in report.post_training
    assert torch.equal(net(X), prepared(grid, 4)(X))


def test_the_plan_names_the_grid_and_its_widths() -> None:
    site = plan_of(prepared("powers_of_two")).sites["0.weight"]
    assert (site.bits, site.grid, site.signed, site.symmetric) == (3, "powers_of_two", True, True)


def test_a_site_takes_the_candidates_that_have_tables() -> None:
    assert site_candidates(prepared("levels"), ["0.weight"], [1, 2, 3, 4, 6, 8]) == {"0.weight": [2, 3, 4]}


# ---- ends, and what is refused


def test_first_and_last_layer_have_even_levels_where_no_table_is_as_wide() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    prepare(net, Scheme(bits=3, grid="powers_of_two", granularity="channel"))
    assert [q.grid_name() for q in sites(net).values()] == ["symmetric", "powers_of_two", "symmetric"]
    assert [q.bits.whole() for q in sites(net).values()] == [8, 3, 8]


def test_first_and_last_layer_keep_the_table_at_a_width_that_has_one() -> None:
    net = network(0)
    prepare(net, Scheme(bits=3, grid="levels", granularity="channel"), first_last_bits=4)
    assert {q.grid_name() for q in sites(net).values()} == {"levels"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one bit": ({"bits": 1}, r"bits: .*got 1, expected 2, 3 or 4.*Choose one of these, or another grid"),
    "five bits": ({"bits": 5}, r"bits: .*got 5, expected 2, 3 or 4"),
    "per channel": ({"bits": [2, 3], "granularity": "channel"}, r"bits: .*got \[2, 3\], expected 2, 3 or 4"),
    "dorefa": ({"range": "dorefa"}, r"range: .*got dorefa, expected lsq, lsq\+ or static"),
    "pact": ({"range": "pact"}, r"range: .*got pact"),
    "entropy": ({"calibration": "kl"}, r"calibration: .*got kl, expected mse or minmax"),
    "noise": ({"estimator": "stochastic"}, r"estimator: .*got stochastic, expected clipped or pure"),
    "tokens": ({"granularity": "token", "range": "dynamic"}, r"granularity: .*got token"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_table_does_not_go_with_is_refused(case: str, grid: Any) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(SchemeError, match=message):
        Scheme(**{"bits": 3, "grid": grid, **changes})


def test_a_site_in_float_may_keep_the_name_of_the_grid() -> None:
    assert Scheme(bits=3, grid="levels").replace(bits=32).is_float


def test_activations_on_a_table_are_refused() -> None:
    scheme = Scheme(bits=3, grid="levels")
    with pytest.raises(SchemeError, match=r"0\.input\.grid: .*got levels.*Set grid: auto here"):
        prepare(network(0), None, scheme, first_last_bits=None)
    document = {"quantize": {"activations": {"bits": 4, "grid": "powers_of_two"}}}
    with pytest.raises(SchemeError, match=r"quantize\.activations\.grid: .*powers_of_two.*grid: auto"):
        parse_recipe(document, "my.yaml")


REFUSED_METHODS: dict[str, Any] = {
    "a grid between two widths": lambda: FractionalBits(
        X[:1], strength=0.1, bits=(2, 4), tensors="weights", mode="real"
    ),
    "fractional precisions": lambda: ProgressiveBits(schedule=[(3.5, 0.5)]),
    "float beside others": lambda: BudgetSearch({"bops": 0.5}, X[:1], candidates=[2, 4, 32]),
    "groups of channels": lambda: BudgetSearch({"bops": 0.5}, X[:1], candidates=[2, 4], channel_groups=2),
}


@pytest.mark.parametrize("case", REFUSED_METHODS)
def test_methods_that_need_even_levels_are_refused_with_the_field(case: str) -> None:
    net = prepared("levels", activations=Scheme(bits=4))
    with pytest.raises(BitsmithError, match=r"weight\.grid: .*got levels.*(Choose|Give)"):
        REFUSED_METHODS[case]().attach(net)
