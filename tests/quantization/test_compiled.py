"""Under torch.compile a quantizer gives the values and gradients of eager, bit for bit."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bitsmith.quantization import FixedBits, Scheme, calibrate, prepare, set_bits, sites

WEIGHT, INPUT = Scheme(bits=4, granularity="channel"), Scheme(bits=4)
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
CASES = {
    "channel, asymmetric input": (WEIGHT, INPUT),
    "seq, learned zero point": (WEIGHT.replace(bits=2), INPUT.replace(range="lsq+")),
    "ragged groups, tokens": (
        Scheme(bits=3, granularity="group", group_size=4, estimator="ewgs"),
        Scheme(bits=8, granularity="token", range="dynamic"),
    ),
    "noise, one scale": (Scheme(bits=3, estimator="stochastic"), INPUT.replace(estimator="smooth")),
    "dorefa, pact": (Scheme(bits=2, range="dorefa"), INPUT.replace(range="pact")),
    "learned levels": (WEIGHT.replace(grid="levels"), INPUT),
    "asymmetric tokens": (WEIGHT, Scheme(bits=4, granularity="token", range="dynamic", grid="asymmetric")),
}


def layer(weights: Scheme, activations: Scheme) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(10, 5)
    prepare(net, weights, activations, first_last_bits=None)
    calibrate(net, [X + 0.8])
    return net.train()


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_eager(case: str) -> None:
    net = layer(*CASES[case])
    torch.compiler.reset()
    results: list[dict[str, Tensor]] = []
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        x = (X + 0.7).requires_grad_()
        y = forward(x)
        y.backward(X[:, :5])
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": x.grad, **grads})
    assert len(results[0]) >= 4
    for name, eager in results[0].items():
        if name.endswith(
            (".range", ".zero_shift", ".table_shift")
        ):  # sums, which a compiler orders its own way
            torch.testing.assert_close(eager, results[1][name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(eager, results[1][name]), name


def test_layers_of_all_widths_share_one_graph() -> None:
    """Level bounds are buffers, not numbers: one graph for each kind of row, not one for each width."""
    layers = [layer(WEIGHT.replace(bits=bits), Scheme(bits=bits)) for bits in (3, 4, 5, 6, 7, 8)]
    torch.compiler.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net(x)

    for net in layers:
        forward(net, X).sum().backward()
    assert counter.frame_count == 1


def test_committing_a_row_recompiles_nothing() -> None:
    net = layer(WEIGHT, INPUT)
    for quantizer in sites(net).values():
        quantizer.set_bits(FixedBits(4, [2, 4, 8]), net.weight if quantizer.kind == "weight" else None)
    calibrate(net, [X + 0.8])
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    seen = []
    for bits in (2, 4, 8):
        for quantizer in sites(net).values():
            assert quantizer.commit(bits)
        assert torch.equal(compiled(X), net(X))
        seen.append(compiled(X))
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_site_decided_for_float_compiles_to_float() -> None:
    net = layer(WEIGHT, INPUT)
    for quantizer in sites(net).values():
        quantizer.set_bits(FixedBits(4, [2, 4, 32]), net.weight if quantizer.kind == "weight" else None)
    calibrate(net, [X + 0.8])
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), net(X))
    for quantizer in sites(net).values():
        quantizer.commit(32)
    assert torch.equal(compiled(X), nn.functional.linear(X, net.weight, net.bias))


@pytest.mark.parametrize("weights", [WEIGHT, CASES["ragged groups, tokens"][0]], ids=["channel", "group"])
def test_a_table_has_one_graph_for_all_its_widths_and_lookups(
    weights: Scheme,
) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 6)
    prepare(table, weights, None, first_last_bits=None)
    set_bits(table, {"weight": FixedBits(3, [3, 8])})
    torch.compiler.reset()
    counter = CompileCounter()
    forward = torch.compile(table, backend=counter, fullgraph=True)
    for bits in (3, 8):
        sites(table)["weight"].bits.commit(bits)
        for start in range(3):
            tokens = torch.arange(start, start + 6).view(2, 3)
            assert torch.equal(forward(tokens), table(tokens))
    assert counter.frame_count == 1
