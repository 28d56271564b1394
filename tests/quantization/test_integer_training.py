"""Integer layers against float products of what their codes stand for."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import TrainingDiverged
from bitsmith.kernels import choose
from bitsmith.numerics.hadamard import hadamard_tokens
from bitsmith.optim import IntegerSGD
from bitsmith.quantization.integer_codes import read_rows, write_rows
from bitsmith.quantization.integer_gradients import stochastic_codes
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import IntEmbedding
from tests.quantization.integers import Taken, assert_same, codes_of, drawn, network, one_layer, stepped


def dequantized(quantizer: nn.Module, x: Tensor) -> Tensor:
    return quantizer(x).detach()


GRIDS = [(2, "seq"), (2, "symmetric"), (2, "balanced"), (3, "symmetric"), (4, "symmetric"), (8, "symmetric")]


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@pytest.mark.parametrize("group_size", [None, 16])
def test_a_linear_layer_multiplies_what_its_codes_stand_for(
    bits: int, grid: str, group_size: int | None
) -> None:
    layer = one_layer(nn.Linear(40, 24), bits, grid=grid, group_size=group_size)
    x = drawn(3, 5, 40)
    expected = F.linear(dequantized(layer.input, x), layer.weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_activations_have_a_scale_for_each_token(activations: int, asymmetric: bool) -> None:
    layer = one_layer(nn.Linear(40, 24), 4, activations=activations, asymmetric=asymmetric)
    x = drawn(7, 40) * torch.tensor([[1e-3], [1], [50], [1], [0], [2], [1]]) + asymmetric
    expected = F.linear(dequantized(layer.input, x), layer.weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    assert (layer.input(x) - x).abs().div(x.abs().amax(1, keepdim=True) + 1e-9).max() < 1.2 / 2**activations


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (1, 1, 2), (4, 1, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_convolution_and_both_its_gradients_are_those_of_its_codes(
    groups: int, stride: int, dilation: int, bits: int
) -> None:
    layer = one_layer(nn.Conv2d(4, 8, 3, stride, 1, dilation, groups), bits)
    taken, x = Taken(layer), drawn(3, 4, 9, 8).requires_grad_()
    y = layer(x)
    codes = dequantized(layer.input, x).requires_grad_()
    weight = layer.weight().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    expected = F.conv2d(codes, weight, bias, stride, 1, dilation, groups)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    g = drawn(*y.shape, seed=1)
    y.backward(g)
    expected.backward(g)
    assert relative(x.grad, codes.grad) < 0.02
    assert relative(taken.gradient, weight.grad.flatten(1)) < 0.02
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("activations", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
def test_gradients_of_a_linear_layer_are_near_those_of_floats(
    bits: int, group_size: int | None, activations: int, asymmetric: bool, hadamard: bool
) -> None:
    options = {"activations": activations, "asymmetric": asymmetric, "hadamard": hadamard}
    layer = one_layer(nn.Linear(40, 24), bits, group_size=group_size, **options)
    taken, x = Taken(layer), (drawn(50, 40) * torch.logspace(-2, 1, 50)[:, None]).requires_grad_()
    y = layer(x)
    codes, weight = dequantized(layer.input, x).requires_grad_(), layer.weight().requires_grad_()
    g = drawn(50, 24, seed=1)
    y.backward(g)
    F.linear(codes, weight).backward(g)
    assert relative(x.grad, codes.grad) < 0.02
    assert relative(taken.gradient, weight.grad) < 0.02


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("gradients", [4, 8])
def test_the_expectation_of_gradients_is_that_of_floats(gradients: int, hadamard: bool) -> None:
    layer = one_layer(nn.Linear(20, 12), 4, gradients=gradients, hadamard=hadamard)
    taken, x = Taken(layer), drawn(18, 20).requires_grad_()
    g, codes = drawn(18, 12, seed=1), dequantized(layer.input, x)
    exact = (g @ layer.weight(), g.t() @ codes)
    sums, squares, rounds = [0.0, 0.0], [0.0, 0.0], 200
    for seed in range(rounds):
        layer.seed, x.grad = seed, None
        layer(x).backward(g)
        for i, found in enumerate((x.grad, taken.gradient)):
            error = found - exact[i]
            sums[i], squares[i] = sums[i] + error, squares[i] + error.square()
    for total, square in zip(sums, squares, strict=True):
        error_of_mean = (square / rounds).mean().sqrt() / rounds**0.5
        assert (total / rounds).square().mean().sqrt() < 1.3 * error_of_mean  # nearest: 20


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_codes_are_right_on_average_and_end_at_the_largest(bits: int) -> None:
    x, backend = drawn(4, 64), choose.best()
    rounds = [stochastic_codes(x, bits, seed, backend) for seed in range(300)]
    values = torch.stack([found.codes * found.row_scale[:, None] for found in rounds])
    step = rounds[0].row_scale.max()
    assert (values.mean(0) - x).abs().max() < 4 * step * 0.5 / 300**0.5
    assert (values - x).abs().max() <= step * 1.001
    assert int(rounds[0].codes.abs().max()) == 2 ** (bits - 1) - 1
    assert not torch.equal(rounds[0].codes, rounds[1].codes)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    layer = one_layer(nn.Linear(8, 8))
    Taken(layer)
    with pytest.raises(TrainingDiverged, match="0: the gradient is not finite"):
        layer(drawn(2, 8)).backward(torch.full((2, 8), torch.inf))


def test_what_is_not_a_number_is_passed_on_for_its_token_alone() -> None:
    layer = one_layer(nn.Linear(8, 8))
    x = drawn(3, 8)
    x[1, 2] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_the_hadamard_transform_keeps_products_and_spreads_a_token() -> None:
    a, b = drawn(37, 5), drawn(37, 6, seed=1)
    torch.testing.assert_close(hadamard_tokens(a, 3).t() @ hadamard_tokens(b, 3), a.t() @ b)
    alone = torch.zeros(16, 1)
    alone[5] = 4.0
    torch.testing.assert_close(hadamard_tokens(alone, 0).abs(), torch.ones(16, 1))


def test_an_embedding_gives_rows_and_takes_the_gradient_of_those_alone() -> None:
    layer = one_layer(nn.Embedding(11, 6, padding_idx=2), 4)
    assert isinstance(layer, IntEmbedding)
    taken, index = Taken(layer), torch.tensor([[1, 5], [5, 2]])
    y = layer(index)
    torch.testing.assert_close(y, layer.weight()[index])
    g = drawn(2, 2, 6)
    y.backward(g)
    assert taken.rows.tolist() == [1, 5]
    torch.testing.assert_close(taken.gradient, torch.stack([g[0, 0], g[0, 1] + g[1, 0]]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("inputs", [8, 13])
def test_rows_are_written_where_they_were_read(bits: int, inputs: int) -> None:
    layer, backend = one_layer(nn.Embedding(21, inputs), bits), choose.best()
    weight = layer.weight
    before = weight.integers().clone()
    for at in (slice(8, 16), slice(16, 21), torch.tensor([0, 7, 20])):
        found = read_rows(weight, backend, at)
        assert torch.equal(found.to(torch.int16), before[at])
        write_rows(weight, backend, at, found.flip(1))
        before[at] = before[at].flip(1)
        assert torch.equal(weight.integers(), before)


def test_saved_activations_are_codes_at_their_width() -> None:
    for activations, expected in ((8, 64), (4, 32)):
        layer = one_layer(nn.Linear(64, 32), 4, activations=activations)
        sizes: list[int] = []

        def seen(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            layer(drawn(10, 64).requires_grad_())
        assert sorted(sizes) == [10 * 4, 10 * expected]


@pytest.mark.parametrize(("bits", "activations", "gradients"), [(4, 8, 8), (2, 4, 4), (8, 8, 8)])
def test_torch_and_the_library_train_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, bits: int, activations: int, gradients: int
) -> None:
    found = []
    for backend in (choose.best(), choose.torch_path()):
        for module in ("quantization.integer_training", "optim.optimizer", "optim.integer"):
            monkeypatch.setattr(f"bitsmith.{module}.best", lambda backend=backend: backend)
        model = network()
        prepare_integer(model, bits, activations, gradients)
        found.append(codes_of(stepped(model, 3)))
    assert_same(*found)


def test_every_pair_of_layers_learns_in_one_direction() -> None:
    """A step along the gradient lowers the loss: signs and scales of both products are right."""
    for layer, shape in itertools.product((nn.Linear(12, 12), nn.Conv2d(12, 12, 1)), (0, 1)):
        model = nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer))
        prepare_integer(model, 8)
        x = drawn(32, 12, seed=shape) if isinstance(layer, nn.Linear) else drawn(8, 12, 2, 2, seed=shape)
        optimizer = IntegerSGD(model, lr=0.2, momentum=0.0, carry="none", float_optimizer=False)
        losses = []
        for _ in range(20):
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
