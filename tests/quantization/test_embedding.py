"""Quantized embeddings: rows of a table on a grid, looked up as cheaply as the batch needs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import SchemeError
from bitsmith.export import load, save
from bitsmith.export.native import stored_tensors
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import (
    Budget,
    BudgetCost,
    Plan,
    Scheme,
    allocate,
    calibrate,
    collapse,
    commit,
    measure,
    plan_of,
    prepare,
    set_bits,
    sites,
)
from bitsmith.quantization.bits import FixedBits
from bitsmith.quantization.categorical import MODES, Categorical, GroupCategorical
from bitsmith.quantization.coverage import coverage
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import IntegerEmbedding
from bitsmith.quantization.layers import QuantEmbedding, layer_operands, weights_of
from bitsmith.quantization.sensitivity import sensitivity
from bitsmith.quantization.target import TARGETS, Target
from tests.quantization.widths import Mixed, Sampled

TOKENS = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(0))
EACH = (1, 2, 3, 8, 4, 5, 6, 7, 2, 2, 3)
SCHEMES = [
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=4, granularity="channel"),
    Scheme(bits=2, granularity="channel"),
    Scheme(bits=3, granularity="channel", grid="asymmetric"),
    Scheme(bits=EACH, granularity="channel"),
    Scheme(bits=EACH, granularity="channel", grid="asymmetric"),
    Scheme(bits=3, granularity="group", group_size=4),
    Scheme(bits=5, granularity="group", group_size=4, grid="asymmetric"),
    Scheme(bits=4, granularity="tensor", grid="asymmetric"),
    Scheme(bits=2, granularity="channel", range="dorefa"),
    Scheme(bits=4, granularity="channel", range="dynamic"),
    Scheme(bits=4, granularity="group", group_size=4, range="dynamic", grid="asymmetric"),
    Scheme(bits=4, granularity="channel", estimator="stochastic"),
    Scheme(bits=32),
]


class Language(nn.Module):
    """Tokens (N, T) -> logits (N, T, vocabulary)."""

    def __init__(self, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 10), nn.Linear(10, 10)
        self.head = nn.Linear(10, 11, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.hidden(self.embedding(tokens))))
        return logits


def language(
    weights: Scheme, activations: Scheme | None = None, *, tied: bool = False, **arguments: Any
) -> Language:
    torch.manual_seed(0)
    model = Language(tied)
    prepare(model, weights, activations, **{"first_last_bits": None, **arguments})
    calibrate(model, [TOKENS])
    return model.eval()


def table(scheme: Scheme) -> QuantEmbedding:
    torch.manual_seed(0)
    layer: Any = nn.Embedding(11, 10, padding_idx=3)
    prepare(layer, scheme, None, first_last_bits=None)
    return layer


# ---- the layer


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_looks_up_rows_of_the_quantized_table(scheme: Scheme) -> None:
    layer = table(scheme).eval()
    quantizer = layer.weight_quantizer
    whole = layer.weight if quantizer is None else quantizer(layer.weight)
    for tokens in (TOKENS, TOKENS[0, 0], TOKENS[:0]):
        assert torch.equal(layer(tokens), F.embedding(tokens, whole))


def gradients(layer: QuantEmbedding, y: Tensor) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), list(layer.parameters()), allow_unused=True))


WIDTHS = {
    "fixed": lambda: None,
    "rows": lambda: FixedBits(3, [2, 3, 8]),
    "sampled": lambda: Sampled([2, 4, 8]),
    "mixed": lambda: Mixed([2, 4, 8]),
    "each": lambda: FixedBits(EACH),
    "real": lambda: Categorical([2, 4, 8], "real"),
    **{f"{mode} by channel": lambda m=mode: GroupCategorical([2, 4, 8], (4, 4, 3), m) for mode in MODES},
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("group_size", [None, 4])
def test_gradients_are_those_of_the_whole_table_but_for_the_padding_row(
    width: str, group_size: int | None
) -> None:
    if ("each" in width or "by channel" in width) and group_size:
        return
    scheme = Scheme(bits=4, granularity="channel")
    layer = table(scheme if group_size is None else scheme.replace(granularity="group", group_size=4))
    made = WIDTHS[width]()
    if made is not None:
        set_bits(layer, {"weight": made})
    rows = gradients(layer, layer(TOKENS))
    whole = gradients(layer, F.embedding(TOKENS, layer.weight_quantizer(layer.weight), 3))
    assert len(rows) == len(list(layer.parameters()))
    assert all((a is None) == (b is None) for a, b in zip(rows, whole, strict=True))
    for a, b in zip(rows, whole, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not rows[0][3].any(), "padding has no gradient"
    assert rows[0][TOKENS[TOKENS != 3]].any()


def test_a_step_quantizes_the_rows_that_it_needs_and_no_others() -> None:
    layer, seen = table(Scheme(bits=4, granularity="channel")), []
    layer.weight_quantizer.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    layer(TOKENS[:1])
    assert seen == [(3, 10)]


def test_one_with_max_norm_stays_float_and_says_why() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2))
    report = prepare(model, Scheme(bits=4), None)
    assert type(model[0]) is nn.Embedding
    assert any(left.name == "0.weight" and "max_norm" in left.reason for left in report.leftovers)


def test_it_has_one_operand() -> None:
    model = language(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    found = [tuple(operand.site for operand in layer) for layer in layer_operands(model)]
    assert found == [
        ("embedding.weight",),
        ("hidden.weight", "hidden.input"),
        ("head.weight", "head.input"),
    ]
    assert weights_of(model)["embedding.weight"] is model.embedding.weight


# ---- prepare, plan, cost


def test_it_is_the_first_layer_and_has_eight_bits_by_default() -> None:
    model = Language()
    report = prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    bits = {site.name: site.bits for site in report.sites}
    assert (bits["embedding.weight"], bits["hidden.weight"], bits["head.weight"]) == (8, 4, 8)
    assert report.quantized_share == (2 * 110 + 100) / (2 * 110 + 110)
    assert report.parameters == sum(p.numel() for p in Language().parameters())


def test_it_multiplies_nothing_but_its_bytes_and_bits_count() -> None:
    model = language(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    report = measure(model, TOKENS).report()
    assert report["bops"] == 3 * (100 + 110) * 4 * 8
    assert report["float_macs"] == 0
    first = report["layers"][0]
    assert (first["kind"], first["macs"], first["bops"]) == ("Embedding", 0, 0)
    assert (first["weight_bits"], first["activation_bits"]) == (4, None)
    assert first["weight_bytes"] == 110 * 4 // 8 + 11 * 4
    assert report["average_weight_bits"] == 4


def test_its_rows_are_no_activation_at_the_width_of_the_table() -> None:
    """The rows live in float, as in the float model, until the hidden layer's codes are made of them."""
    model = language(Scheme(bits=2, granularity="channel"), None)
    live = measure(model, TOKENS).live
    assert all(not tensor.sites for tensor in live.tensors)
    model = language(Scheme(bits=2, granularity="channel"), Scheme(bits=8))
    read = {tensor.sites for tensor in measure(model, TOKENS).live.tensors}
    assert ("embedding.weight",) not in read
    assert ("hidden.input",) in read


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_plan_bytes_are_file_bytes_and_the_file_computes_what_was_trained(
    scheme: Scheme, tmp_path: Path
) -> None:
    model = language(Scheme(bits=4, granularity="channel"), overrides={"embedding.weight": fields(scheme)})
    for quantizer in sites(model).values():
        if quantizer.range.requires_grad:
            nn.init.normal_(quantizer.range, std=0.1)
    packed = finalize(model, TOKENS)
    assert torch.equal(packed(TOKENS), model(TOKENS))
    payload = sum(t.numel() * t.element_size() for t in stored_tensors(packed).values())
    assert measure(model, TOKENS).report()["weight_bytes"] == payload
    loaded = load(save(packed, tmp_path), into=Language(), kernels=False)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def fields(scheme: Scheme) -> dict[str, Any]:
    return {k: v for k, v in vars(scheme).items() if k != "group_size" or v is not None}


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 13), st.integers(1, 8), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_packed_rows_are_the_table_for_every_shape_and_width(
    rows: int, width: int, group_size: int, bits: int, asymmetric: bool, data: st.DataObject
) -> None:
    torch.manual_seed(rows * 100 + width)
    layer: Any = nn.Embedding(rows, width)
    grid: Any = "asymmetric" if asymmetric else "auto"
    scheme = Scheme(bits=bits, granularity="group", group_size=group_size, grid=grid, calibration="minmax")
    if data.draw(st.booleans()):
        each = tuple(data.draw(st.lists(st.integers(1, 8), min_size=rows, max_size=rows)))
        scheme = Scheme(bits=each, granularity="channel", grid=grid, calibration="minmax")
    prepare(layer, scheme, None, first_last_bits=None)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    packed = finalize(layer, tokens)
    assert isinstance(packed, IntegerEmbedding)
    assert torch.equal(packed(tokens), packed.weight()[tokens])
    assert torch.equal(packed(tokens), layer.eval()(tokens))
    for wrong in (rows, -1):
        with pytest.raises(IndexError):
            packed(torch.tensor([wrong]))


def test_a_plan_and_a_budget_of_bytes_reach_it(tmp_path: Path) -> None:
    model = language(Scheme(bits=8, granularity="channel"), Scheme(bits=8))
    widths = {name: [2, 4, 8] for name in sites(model)}
    cost = BudgetCost(measure(model, TOKENS), Budget(weight_bytes=350), widths)
    value = {name: [0.0, 1.0, 1.5] for name in cost.sites}
    found = allocate(cost, {**value, "embedding.weight": [0.0, 9.0, 99.0]})
    assert found.bits["embedding.weight"] == 8
    assert found.used["weight_bytes"] <= 350
    commit(model, found.bits)
    plan_of(model).save(tmp_path / "plan.json")
    fresh = Language()
    prepare(fresh, Scheme(bits=8, granularity="channel"), Scheme(bits=8))
    calibrate(fresh, [TOKENS])
    commit(fresh, Plan.load(tmp_path / "plan.json"))
    assert measure(fresh, TOKENS).report()["weight_bytes"] == found.used["weight_bytes"]


def test_a_budget_of_products_leaves_its_width_alone_and_a_target_of_pairs_holds_it() -> None:
    pairs = Target(**{**vars(TARGETS["native"]), "name": "pairs", "pairs": ((8, 8), (4, 8))})
    model = language(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    widths = {**{name: [8] for name in sites(model)}, "embedding.weight": [2, 3], "hidden.weight": [2, 4, 8]}
    cost = BudgetCost(measure(model, TOKENS, pairs), Budget(bops=0.05), widths)
    found = allocate(cost, {"embedding.weight": [0.0, 1.0], "hidden.weight": [0.0, 1.0, 2.0]})
    assert found.bits["embedding.weight"] == 3
    prepare(Language(), Scheme(bits=8), Scheme(bits=8), target=pairs, overrides={"emb*": {"bits": 3}})


def test_sensitivity_of_its_rows_sums_to_that_of_the_table() -> None:
    model = language(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    batches = [(TOKENS, torch.zeros(5, dtype=torch.int64))]

    def loss(y: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(y.mean(1), targets)

    whole = sensitivity(model, batches, loss)["embedding.weight"]
    assert whole.shape == (1,)
    assert whole > 0
    set_bits(model, {"embedding.weight": FixedBits([4] * 10 + [3])})
    each = sensitivity(model, batches, loss)["embedding.weight"][0]
    assert each.shape == (11,)
    unseen = [token for token in range(11) if token not in TOKENS]
    assert not each[unseen].any()
    if 10 not in TOKENS:
        torch.testing.assert_close(each.sum(), whole[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_search_within_bytes_decides_its_width_like_any_other(groups: int) -> None:
    model = Language(tied=True)
    prepare(model, Scheme(bits=8, granularity="channel", grid="asymmetric"), None, first_last_bits=None)
    budget = {"weight_bytes": 0.35}
    search = BudgetSearch(budget, TOKENS, candidates=(2, 4, 8), channel_groups=groups, search_share=0.75)
    search.attach(model)
    calibrate(model, [TOKENS])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(8):
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        if step < 6:  # decided afterwards
            search.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
        search.after_step(step, 8)
    assert any("embedding.weight" in name for name in search.cost.sites)
    commit(model, search.plan())
    collapse(model)
    packed = finalize(model.eval(), TOKENS)
    payload = sum(t.numel() * t.element_size() for t in stored_tensors(packed).values())
    report = measure(model, TOKENS).report()
    assert report["weight_bytes"] == payload <= 0.35 * report["weight_bytes_float"]
    assert torch.equal(packed(TOKENS), model(TOKENS))


# ---- tied to the head


def test_a_tied_table_is_one_site_and_stored_once(tmp_path: Path) -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=4)
    model = language(scheme, Scheme(bits=8), tied=True)
    assert model.head.weight_quantizer is model.embedding.weight_quantizer
    assert list(sites(model)) == ["embedding.weight", "hidden.weight", "hidden.input", "head.input"]
    report = measure(model, TOKENS).report()
    assert report["average_weight_bits"] == 4
    assert [entry["weight_elements"] for entry in report["layers"]] == [110, 100, 0]
    assert report["bops"] == 3 * (100 + 110) * 4 * 8
    packed = finalize(model, TOKENS)
    assert packed.head.weight is packed.embedding.weight
    assert torch.equal(packed(TOKENS), model(TOKENS))
    stored = stored_tensors(packed)
    assert sum(name.endswith(".codes") for name in stored) == 2
    assert report["weight_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    loaded = load(save(packed, tmp_path), into=Language(tied=True), kernels=False)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(TOKENS), packed(TOKENS))


def test_tied_layers_stay_tied_through_copies_and_checkpoints() -> None:
    model = language(Scheme(bits=4, granularity="channel"), Scheme(bits=8), tied=True)
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embedding.weight
    assert twin.head.weight_quantizer is twin.embedding.weight_quantizer
    nn.init.normal_(twin.embedding.weight_quantizer.range, std=0.2)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(TOKENS), twin(TOKENS))
    other = Language(tied=True)
    other.load_state_dict({k: v for k, v in twin.state_dict().items() if "quantizer" not in k})
    assert torch.equal(other.head.weight, twin.embedding.weight)
    assert coverage(model).parameters == 110 + 110


def test_gradients_of_both_uses_meet_in_the_one_scale() -> None:
    model = language(Scheme(bits=4, granularity="channel"), None, tied=True)
    model(TOKENS).square().sum().backward()
    assert model.embedding.weight_quantizer.range.grad.abs().min() > 0


def test_eight_bits_at_the_end_reach_the_tied_table_once() -> None:
    model = Language(tied=True)
    report = prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    assert {s.name: s.bits for s in report.sites} == {
        "embedding.weight": 8,
        "hidden.weight": 4,
        "hidden.input": 4,
        "head.input": 8,
    }


def test_groups_of_a_table_in_float_are_refused_by_a_channel_list() -> None:
    with pytest.raises(SchemeError, match="one for each output channel"):
        prepare(nn.Embedding(4, 3), Scheme(bits=(2, 3), granularity="channel"), None, first_last_bits=None)
