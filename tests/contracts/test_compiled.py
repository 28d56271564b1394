"""Under torch.compile a method trains in one graph, whatever widths it plays, and bit for bit as eager.

By default on a few layers; on the whole contract table where slow tests run, as compiling takes seconds.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

from bitsmith.methods import Method
from bitsmith.quantization import MatMul, Scheme, calibrate, parameter_groups, prepare, sites
from tests.contracts import test_methods as contract
from tests.contracts.methods import DECIDE_NOTHING, METHODS

X, Y = contract.X[:8], contract.Y[:8]


class Few(nn.Module):
    """One layer of each kind that a method meets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.product, self.fc = MatMul(), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2)
        logits: Tensor = self.fc(self.product(x.softmax(-1), x.transpose(1, 2)) @ x).mean(1)
        return logits


def few(method: str) -> tuple[nn.Module, list[Method]]:
    torch.manual_seed(0)
    net = Few()
    prepare(net, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    methods = METHODS[method](X)
    for each in methods:
        each.attach(net)
    calibrate(net, [X])
    return net, methods


CASES = [pytest.param("few", method, id=f"few-{method}") for method in ("search", "fractional")] + [
    pytest.param(model, method, id=f"{model}-{method}", marks=pytest.mark.slow)
    for model in contract.MODELS
    for method in METHODS
]


def start(model: str, method: str) -> tuple[nn.Module, list[Method]]:
    torch.compiler.reset()
    return few(method) if model == "few" else contract.start(model, method)


@pytest.mark.parametrize(("model", "method"), CASES)
def test_one_graph_serves_every_step_and_every_width(model: str, method: str) -> None:
    net, methods = start(model, method)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(parameter_groups(net, learning_rate=0.3))
    first, played = 0, set()
    for step in range(4):
        optimizer.zero_grad()
        cross_entropy(compiled(X), Y).backward()
        first = first or counter.frame_count
        for each in methods:
            penalty = each.penalty()
            if penalty.requires_grad:
                penalty.backward()
        optimizer.step()
        for each in methods:
            each.after_step(step, 10)  # the decision, and its recompile, are not among these four
        played.add(tuple(row for q in sites(net).values() for row in q.bits.rows.flatten().tolist()))
    assert counter.frame_count == first <= 1 + any(hasattr(each, "teacher") for each in methods)
    assert len(played) > 1 or method in DECIDE_NOTHING, "the widths never changed, so this shows nothing"


@pytest.mark.parametrize(("model", "method"), CASES)
def test_it_compiles_to_what_eager_computes(model: str, method: str) -> None:
    net, _ = start(model, method)
    results: list[dict[str, Tensor]] = []
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.train().zero_grad()
        logits = forward(X)
        cross_entropy(logits, Y).backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        results.append({"logits": logits, **grads})
    assert len(results[0]) > 10
    for name, eager in results[0].items():
        if name.endswith(
            (".range", ".logits")
        ):  # a sum over the whole tensor, which a compiler orders its own way
            torch.testing.assert_close(eager, results[1][name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(eager, results[1][name]), name
