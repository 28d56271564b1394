"""Rows by channel: a weight whose output channels have widths of their own is, channel by channel, the
weight at each of these widths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bitsmith.errors import SchemeError, SiteError
from bitsmith.quantization import BitWidth, FixedBits, Scheme, prepare, sites
from bitsmith.quantization.bits import in_words, one_or_each
from bitsmith.quantization.quantizer import Quantizer
from bitsmith.quantization.rows import observe_weight

CHANNELS = 6
EACH = (2, 8, 3, 1, 4, 2)
X = torch.randn(CHANNELS, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7).view(
    -1, 1, 1
)


def weight(bits: int | tuple[int, ...], x: Tensor = X, **fields: object) -> Quantizer:
    scheme = Scheme(bits=bits, granularity="channel", **fields)  # type: ignore[arg-type]
    quantizer = Quantizer("w.weight", "weight", scheme, channels=len(x), view=(-1, 1, 1))
    quantizer.calibrate(*observe_weight(quantizer, x))
    return quantizer


class PerChannel(BitWidth):
    """Rows of its own for each channel, the first ``count`` beside the one it points to, with even shares."""

    def __init__(self, candidates: list[int], rows: list[list[int]], blended: bool = False) -> None:
        super().__init__()
        self.blended = blended
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.register_buffer("rows", torch.tensor(rows))
        self.weights = nn.Parameter(torch.full((len(rows), len(rows[0])), 1 / len(rows)))

    @property
    def share(self) -> Tensor:  # type: ignore[override]
        return self.weights

    def expected(self) -> Tensor:
        return (self.weights * self.candidates[self.rows]).sum(0)

    def commit(self, bits: int | tuple[int, ...]) -> None:
        each = (bits,) * self.rows.shape[1] if isinstance(bits, int) else bits
        self.rows[0] = torch.tensor([self.candidates.tolist().index(b) for b in each])


RULES = ("lsq", "pact", "static", "dynamic", "dorefa")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", ["auto", "seq", "asymmetric"])
def test_a_fixed_width_per_channel_is_each_channel_at_its_width(rule: str, grid: str) -> None:
    """Values, gradients of weight and range, codes."""
    if grid == "asymmetric" and rule in ("dynamic", "dorefa"):
        return
    fields = {"range": rule, "grid": grid}
    mixed, g = weight(EACH, **fields), X.cos()
    x = X.clone().requires_grad_()
    (mixed(x) * g).sum().backward()
    for c, bits in enumerate(EACH):
        uniform = weight(bits, **fields)
        leaf = X.clone().requires_grad_()
        (uniform(leaf) * g).sum().backward()
        assert torch.equal(mixed(X)[c], uniform(X)[c])
        assert torch.equal(x.grad[c], leaf.grad[c])
        assert torch.equal(mixed.codes(X)[c], uniform.codes(X)[c])
        if mixed.range.grad is not None:
            assert torch.equal(mixed.range.grad[0, c], uniform.range.grad[0, c])
    assert mixed.range.shape == (1, CHANNELS)
    assert mixed.levels().bits == EACH
    assert mixed.bits.expected().tolist() == list(EACH)


@pytest.mark.parametrize("rule", ["lsq", "dynamic"])
def test_rows_of_each_channel_are_those_of_the_width(rule: str) -> None:
    candidates = [1, 2, 3, 4, 8]
    rows = [candidates.index(b) for b in EACH]
    quantizer = weight(4, range=rule)
    quantizer.set_bits(PerChannel(candidates, [rows]), X)
    assert torch.equal(quantizer(X), weight(EACH, range=rule)(X))
    assert torch.equal(quantizer.codes(X), weight(EACH, range=rule).codes(X))
    assert quantizer.levels().bits == EACH
    assert quantizer.grids() == {1: "seq", 2: "seq", 3: "symmetric", 4: "symmetric", 8: "symmetric"}
    assert quantizer.grid_name() == "auto"


def test_a_share_of_each_channel_gets_what_choosing_its_row_is_worth() -> None:
    quantizer = weight(4)
    quantizer.set_bits(PerChannel([2, 4, 8], [[0, 1, 2, 0, 1, 2]]), X)
    g = X.cos()
    y = quantizer(X)
    (y * g).sum().backward()
    torch.testing.assert_close(quantizer.bits.weights.grad, (g * (y - X)).sum((1, 2))[None])


@pytest.mark.parametrize("pair", [(2, 3), (4, 8)])
def test_two_rows_of_each_channel_are_their_weighted_sum(pair: tuple[int, int]) -> None:
    """What fractional bits per channel are made of."""
    low, high = pair
    quantizer = weight(4)
    quantizer.set_bits(PerChannel([low, high], [[0] * CHANNELS, [1] * CHANNELS]), X)
    fraction = torch.linspace(0, 1, CHANNELS)
    with torch.no_grad():
        quantizer.bits.weights.copy_(torch.stack([1 - fraction, fraction]))
    f = fraction.view(-1, 1, 1)
    torch.testing.assert_close(quantizer(X), (1 - f) * weight(low)(X) + f * weight(high)(X))


def test_one_grid_between_rows_is_at_a_row_where_a_channel_is_certain_of_it() -> None:
    quantizer = weight(4)
    quantizer.set_bits(
        PerChannel([3, 4, 8], [[0] * CHANNELS, [1] * CHANNELS, [2] * CHANNELS], blended=True), X
    )
    each = [0, 1, 2, 2, 1, 0]
    with torch.no_grad():
        quantizer.bits.weights.copy_(torch.nn.functional.one_hot(torch.tensor(each), 3).T)
    expected = weight(tuple([3, 4, 8][k] for k in each))(X)
    torch.testing.assert_close(quantizer(X), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 8), min_size=CHANNELS, max_size=CHANNELS))
def test_committed_and_collapsed_it_is_what_was_prepared_at_these_widths(widths: list[int]) -> None:
    each = tuple(widths)
    searched = weight(4)
    searched.set_bits(PerChannel(list(range(1, 9)), [[3] * CHANNELS]), X)
    with torch.no_grad():
        searched.range.fill_(0.0)
    assert searched.commit(each, X) is True
    searched.collapse()
    fixed, post_training = weight(each), weight(4)
    assert post_training.commit(each, X) is (each == (4,) * CHANNELS)
    assert {n: t.shape for n, t in searched.state_dict().items()} == {
        n: t.shape for n, t in fixed.state_dict().items()
    }
    for other in (searched, post_training):
        assert torch.equal(other(X), fixed(X))
        for name, tensor in fixed.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def test_a_width_per_channel_is_given_up_for_one_and_back() -> None:
    quantizer = weight(EACH)
    assert quantizer.commit(4, X) is False
    assert torch.equal(quantizer(X), weight(4)(X))
    assert quantizer.state_dict().keys() == weight(4).state_dict().keys()
    assert quantizer.commit(EACH, X) is False
    assert quantizer.commit(list(EACH), X) is True
    assert torch.equal(quantizer(X), weight(EACH)(X))


@pytest.mark.parametrize(
    ("bits", "fields", "words"),
    [
        ((2, 4), {}, r"w\.weight\.bits: .*2 widths, expected 6"),
        ((2, 9, 2, 2, 2, 2), {}, r"no such bit-width; got 9"),
        ((2, 32, 2, 2, 2, 2), {}, r"no such bit-width; got 32"),
        ((2, 1, 2, 2, 2, 2), {"grid": "symmetric"}, r"symmetric grid of one bit"),
        ((), {}, r"no such bit-width; got an empty list"),
    ],
)
def test_widths_that_do_not_fit_are_refused(bits: tuple[int, ...], fields: dict, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        weight(bits, **fields)
    quantizer = weight(4, **fields)
    if bits:
        with pytest.raises(SchemeError, match=words):
            quantizer.commit(bits, X)
    assert torch.equal(quantizer(X), weight(4, **fields)(X))


def test_only_channels_with_a_scale_each_have_a_width_each() -> None:
    with pytest.raises(SchemeError, match=r"granularity: .*got group, expected channel"):
        Scheme(bits=(2, 4), granularity="group", group_size=4)
    grouped = Quantizer(
        "w.weight", "weight", Scheme(granularity="group", group_size=4), channels=6, view=(-1, 1, 1)
    )
    with pytest.raises(SchemeError, match=r"w\.weight\.bits: only weights .* got a scale per group"):
        grouped.set_bits(FixedBits(EACH), X)
    activation = Quantizer(
        "a.input", "activation", Scheme(granularity="channel"), channels=6, view=(-1,), axis=-1
    )
    with pytest.raises(SchemeError, match=r"a\.input\.bits: .*an activation.*Give it one width"):
        activation.commit(EACH)
    with pytest.raises(SchemeError, match=r"^input\.bits"):
        prepare(nn.Linear(6, 6), None, Scheme(bits=EACH, granularity="channel"), first_last_bits=None)


def test_channels_do_not_choose_among_rows_that_are_the_tensors() -> None:
    quantizer = weight(4)
    quantizer.set_bits(FixedBits(4, [2, 4, 8]), X)
    with pytest.raises(
        SiteError, match=r"w\.weight: .*2, 4 or 8, one for all channels.*Prepare a fresh model"
    ):
        quantizer.commit((2, 4, 8, 2, 4, 8), X)


def test_words_for_a_width() -> None:
    assert (in_words(4), in_words((4, 4)), in_words((2, 4, 8))) == ("4", "4", "2-8, 4.7 on average")
    assert one_or_each([3, 3]) == 3


# ---- compiled


def layer(bits: int | tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(10, 6)
    prepare(net, Scheme(bits=bits, granularity="channel"), None, first_last_bits=None)
    return net.train()


@pytest.mark.parametrize(
    "rows", [None, [[0, 1, 2, 0, 1, 2]], [[0] * 6, [2] * 6]], ids=["fixed", "one", "two"]
)
def test_compiled_it_is_what_eager_computes(rows: list[list[int]] | None) -> None:
    net, x = layer(EACH), torch.randn(3, 10)
    if rows:
        sites(net)["weight"].set_bits(PerChannel([2, 4, 8], rows), net.weight)
    torch.compiler.reset()
    results = []
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append({"y": y, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}})
    assert len(results[0]) == (4 if rows is None else 5)
    for name, eager in results[0].items():
        torch.testing.assert_close(results[1][name], eager, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0]["y"], results[1]["y"])


def test_one_graph_serves_all_widths_of_channels() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda net, x: net(x), backend=counter, fullgraph=True)
    for bits in ((2, 4, 8, 1, 3, 2), (8, 8, 2, 2, 1, 1)):
        compiled(layer(bits), torch.ones(3, 10)).sum().backward()
    assert counter.frame_count == 1
    net = layer(4)
    sites(net)["weight"].set_bits(PerChannel([2, 4, 8], [[0] * 6]), net.weight)
    for _ in range(3):
        compiled(net, torch.ones(3, 10)).sum().backward()
        sites(net)["weight"].bits.rows.random_(0, 3)
    assert counter.frame_count == 2
