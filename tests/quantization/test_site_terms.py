"""A term at a site is the plain sum, however the model is run; and outputs are found where they are."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitsmith.errors import SiteError
from bitsmith.numerics.output_error import output_error
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.quantization.layers import QuantTransposedLinear
from bitsmith.quantization.site_terms import (
    approximate,
    block_outputs,
    float_copy,
    float_output,
    layer_outputs,
    watch,
)
from bitsmith.tasks.models import build

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
STRENGTH = torch.tensor(0.7)


class Halves(nn.Module):
    """a = W x; y = round(a); the sum of squares of V y."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def inner(self, x: Tensor, plain: list[Tensor] | None) -> Tensor:
        a = self.first(x)
        y = a + (a.round() - a).detach()
        if plain is None:
            return self.second(approximate(y, a, y, STRENGTH, "mse"))
        plain.append(STRENGTH * output_error(a, y, a))
        return self.second(y)

    def forward(self, x: Tensor, how: str = "eager", plain: list[Tensor] | None = None) -> Tensor:
        if how == "eager":
            return self.inner(x, plain).square().sum()
        again: Tensor = checkpoint(self.inner, x, plain, use_reentrant=how == "reentrant")
        return again.square().sum()


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def test_it_is_the_plain_sum_eager_compiled_and_checkpointed() -> None:
    net = Halves()
    plain: list[Tensor] = []
    loss = net(X, plain=plain)
    wanted = gradients(net, loss + plain[0])
    x = X.clone().requires_grad_()  # the reentrant kind needs an input that does
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    losses = {"eager": net(X), "compiled": compiled(X)}
    losses |= {how: net(x, how=how) for how in ("non-reentrant", "reentrant")}
    for how, value in losses.items():
        assert value == loss, how
        for found, expected in zip(gradients(net, value), wanted, strict=True):
            torch.testing.assert_close(found, expected, msg=how)


def test_the_value_is_the_tensor_itself() -> None:
    y = torch.randn(4, 3, requires_grad=True)
    assert torch.equal(approximate(y, y, y.detach() + 1, STRENGTH, "mse"), y)


FOUR = Scheme(bits=4)


def prepared(name: str = "digits_vit", activations: Scheme | None = FOUR) -> nn.Module:
    net = build(name, seed=0)
    prepare(net, Scheme(bits=2, granularity="channel", calibration="minmax"), activations)
    return net


def test_the_float_copy_is_the_model_before_it_was_prepared() -> None:
    images = torch.rand(2, 1, 8, 8)
    net = build("digits_vit", seed=0).eval()
    wanted = net(images)
    copied = float_copy(prepared())
    assert torch.equal(copied(images), wanted)
    assert not list(copied.parameters()), "no optimizer may find it"
    assert set(copied.state_dict()) == set(net.state_dict())


def test_tied_weights_stay_tied_in_the_float_copy() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    prepare(net, Scheme(bits=4), None)
    copied = float_copy(net)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight is not net[0].weight


def test_outputs_of_layers_are_their_consumers_inputs_or_their_own_where_weights_alone_are_quantized() -> (
    None
):
    both, weights = prepared("digits_cnn"), prepared("digits_cnn", None)
    assert list(layer_outputs(both)) == [f"{n}.input" for n in ("conv1", "conv2", "conv3", "conv4", "fc")]
    assert list(layer_outputs(weights)) == [f"{n}.output" for n in ("conv1", "conv2", "conv3", "conv4", "fc")]


@pytest.mark.parametrize("name", ["digits_vit", "resnet20"])
def test_blocks_are_found(name: str) -> None:
    found = list(block_outputs(prepared(name)))
    assert (
        found
        == {
            "digits_vit": ["blocks.0", "blocks.1"],
            "resnet20": [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)],
        }[name]
    )


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(SiteError, match="has no blocks"):
        block_outputs(prepared("digits_cnn"))


def test_a_layer_in_float_is_a_function_of_its_weight_alone() -> None:
    net = prepared("digits_cnn")
    calibrate(net, [torch.rand(4, 1, 8, 8)])
    x = torch.rand(3, 12, 8, 8, requires_grad=True)
    y = float_output(net.conv2, x)
    assert torch.equal(y, torch.nn.functional.conv2d(x, net.conv2.weight, padding=1))
    y.sum().backward()
    assert x.grad is None
    assert net.conv2.weight.grad is not None


def test_an_output_that_comes_twice_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.append(net[0])
    prepare(net, Scheme(bits=4), Scheme(bits=4))
    teacher = float_copy(net)
    outputs = list(layer_outputs(net).values())
    watch(teacher, outputs, [None] * len(outputs))
    with pytest.raises(SiteError, match="several times"):
        teacher(torch.rand(2, 4))


class Transposed(nn.Module):
    """x @ W + b with W (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Embedding(9, 4), torch.tensor([[0, 3], [8, 3]])), (Transposed(), X), (nn.Linear(6, 4), X)],
    ids=["embedding", "transposed", "linear"],
)
def test_the_float_output_is_that_of_the_layer_that_was_prepared(layer: nn.Module, x: Tensor) -> None:
    net = nn.Sequential(layer)
    expected = layer(x).detach()
    swaps = {Transposed: QuantTransposedLinear}
    prepare(net, Scheme(bits=2, granularity="channel"), None, first_last_bits=None, swaps=swaps)
    y = float_output(net[0], x)
    assert torch.equal(y.detach(), expected)
    y.sum().backward()
    assert net[0].weight.grad.abs().sum() > 0
