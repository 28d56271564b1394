"""Integer layers against float products of what their codes stand for."""

import copy
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsmith as bs
from bitsmith.errors import SchemeError, SiteError, TrainingDiverged
from bitsmith.kernels import choose
from bitsmith.numerics.hadamard import hadamard_tokens
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD
from bitsmith.quantization import integer_training
from bitsmith.quantization.integer_codes import read_rows, write_rows
from bitsmith.quantization.integer_gradients import WeightGradient, stochastic_codes
from bitsmith.quantization.integer_layers import PackedWeight, packed_layers
from bitsmith.quantization.integer_packed import finalize_integer, resume_integer
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import IntConv2d, IntEmbedding, IntLinear, int_layers


class Taken:
    """A sink that keeps the whole gradient of a layer's weight."""

    def __init__(self, layer: integer_training.IntLayer) -> None:
        layer.sink, self.rows, self.shape = self, None, layer.weight.shape

    def __call__(self, gradient: WeightGradient) -> None:
        count = self.shape[0] if gradient.rows is None else len(gradient.rows)
        middle = count // 2
        self.gradient = torch.cat([gradient.block(0, middle), gradient.block(middle, count)])
        self.rows = gradient.rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(layer: nn.Module, bits: int = 4, **options: object) -> integer_training.IntLayer:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    prepare_integer(model, bits, first_last_bits=None, **options)  # type: ignore[arg-type]
    return model[0]  # type: ignore[return-value]


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
    sums, squares, rounds = [0.0, 0.0], [0.0, 0.0], 400
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
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(drawn(10, 64).requires_grad_())
        assert sorted(t.numel() * t.element_size() for t in saved) == [10 * 4, 10 * expected]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 3 * 3, 33),
        nn.ReLU(),
        nn.Linear(33, 10),
    )


def floats_alive() -> set[tuple[int, ...]]:
    """Shapes of all float tensors that the garbage collector knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return {tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()}


def test_no_float_tensor_of_a_weights_shape_is_alive_after_preparation_and_after_a_step() -> None:
    model = network()
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim >= 2}
    shapes |= {(s[0], int(torch.Size(s).numel() // s[0])) for s in shapes}
    assert len(shapes & floats_alive()) >= 4  # the walk sees what it must not find below
    prepare_integer(model)
    assert not shapes & floats_alive()
    optimizer = IntegerSGD(model, lr=0.1)
    for _ in range(2):
        F.cross_entropy(model(drawn(6, 1, 8, 8)), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not shapes & floats_alive()


class Largest(TorchDispatchMode):
    """The most elements of a float tensor that any operator has made."""

    floats = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.floats = max(self.floats, tensor.numel())
        return made


@pytest.mark.parametrize("kind", [IntegerSGD, IntegerAdam])
def test_no_float_of_a_weights_size_is_made_even_for_a_moment(kind: type[IntegerOptimizer]) -> None:
    model = nn.Sequential(nn.Linear(1024, 1000), nn.ReLU(), nn.Linear(1000, 1024))
    prepare_integer(model, first_last_bits=None)
    optimizer = kind(model, lr=0.1)
    with Largest() as seen:
        model(drawn(8, 1024)).square().sum().backward()
        optimizer.step()
    assert 8 * 1000 < seen.floats < 150_000


def test_first_and_last_have_eight_bits_and_the_rest_what_was_asked_for() -> None:
    model = network()
    report = prepare_integer(model, 3, 4, 4, overrides={"5": {"weights": 2, "gradients": 8}})
    widths = {n: (m.weight.form.bits, m.input.form.bits, m.gradients) for n, m in int_layers(model).items()}
    assert widths == {"0": (8, 8, 4), "3": (3, 4, 4), "5": (2, 4, 8), "7": (8, 8, 4)}
    assert "2 bits, seq, per channel" in str(report)


def test_inputs_that_are_never_negative_in_the_example_get_the_finer_grid() -> None:
    model = network()
    prepare_integer(model, example=drawn(4, 1, 8, 8))
    grids = {name: layer.input.form.grid for name, layer in int_layers(model).items()}
    assert grids == {"0": "symmetric", "3": "unsigned", "5": "symmetric", "7": "unsigned"}
    assert model.training
    x = drawn(4, 1, 8, 8)
    expected = finalize_integer(model)
    torch.testing.assert_close(model.eval()(x), expected(x), rtol=1e-4, atol=1e-4)


def test_what_has_no_integer_form_is_refused_with_its_name_and_kept_if_asked_for() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(4, 4), nn.Conv2d(1, 1, 3, padding_mode="circular"))
    with pytest.raises(SiteError) as error:
        prepare_integer(model)
    assert "0.weight (no integer form of Conv1d); 2.weight (padding circular)" in str(error.value)
    assert isinstance(model[1], nn.Linear)
    with pytest.raises(SiteError, match="keep_float: linear"):
        prepare_integer(model, keep_float=["linear*"])
    report = prepare_integer(model, keep_float=["0.*", "2.weight"])
    assert report.in_float == ("0.weight", "2.weight")
    assert isinstance(model[1], IntLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": 1},
            "weights: this value is out of range; got 1, expected a whole number of bits from 2",
        ),
        ({"gradients": 3}, "gradients: .*from 4 to 8"),
        ({"grid": "asymmetric"}, "no such grid"),
        ({"calibration": "max"}, "no such calibration"),
        ({"overrides": {"0": {"bits": 4}}}, "no such 0"),
    ],
)
def test_choices_that_there_are_not_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        prepare_integer(network(), **options)  # type: ignore[arg-type]


def test_a_layer_that_nothing_updates_says_so_and_a_frozen_one_passes_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prepare_integer(model)
    x = drawn(2, 8).requires_grad_()
    with pytest.raises(SiteError, match="1: nothing takes the gradient of this layer's codes"):
        model(x).sum().backward()
    for layer in int_layers(model).values():
        layer.trainable = False
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
    model[2].weight = model[0].weight
    prepare_integer(model)
    assert model[0].weight is model[2].weight
    before = model[0].weight.integers()
    optimizer = IntegerSGD(model, lr=3.0)
    F.cross_entropy(model(torch.arange(16)), torch.arange(16).flip(0)).backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight.integers())
    packed = finalize_integer(model)
    assert packed[0].weight is packed[2].weight


def stepped(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = IntegerSGD(model, lr=0.5)
    for seed in range(steps):
        F.cross_entropy(model(drawn(6, 1, 8, 8, seed=seed)), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    return model


def codes_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    assert found
    return {name: (weight.codes.clone(), weight.scale.clone()) for name, weight in found.items()}


def assert_same(left: dict[str, tuple[Tensor, Tensor]], right: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert left.keys() == right.keys()
    for a, b in zip(left.values(), right.values(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_saved_and_loaded_are_the_trained_codes_bit_for_bit_and_back(
    tmp_path: Path, bits: int
) -> None:
    model = network()
    prepare_integer(model, bits)
    stepped(model)
    trained = codes_of(model)
    packed = finalize_integer(model)
    assert_same(trained, codes_of(packed))
    assert len(packed_layers(packed)) == 4
    bs.save(packed, tmp_path)
    loaded = bs.load(tmp_path, into=network())
    assert_same(trained, codes_of(loaded))
    x = drawn(5, 1, 8, 8)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-4)

    resume_integer(loaded)
    assert [type(m) for m in int_layers(loaded).values()] == [IntConv2d, IntConv2d, IntLinear, IntLinear]
    assert_same(trained, codes_of(loaded))
    stepped(loaded.train(), 1)
    again = codes_of(loaded)
    assert any(not torch.equal(again[name][0], trained[name][0]) for name in trained)
    assert_same(again, codes_of(finalize_integer(loaded)))


def test_a_model_of_ordinary_training_trains_on_with_its_own_ranges(tmp_path: Path) -> None:
    model, x = network(), drawn(16, 1, 8, 8)
    bs.prepare(model, bs.Scheme(bits=4, granularity="channel"), bs.Scheme(bits=8))
    bs.calibrate(model, [x])
    bs.save(bs.finalize(model, x), tmp_path)
    loaded = bs.load(tmp_path, into=network())
    before, expected = codes_of(loaded), loaded(x)
    resume_integer(loaded)
    assert_same(before, codes_of(loaded))
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    stepped(loaded, 1)
    torch.testing.assert_close(loaded(x), finalize_integer(loaded)(x), rtol=1e-4, atol=1e-4)


def test_gradients_pass_where_a_stored_range_holds_x_and_not_where_it_clips() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), drawn(64, 4)
    bs.prepare(model, bs.Scheme(bits=8, granularity="channel"), bs.Scheme(bits=8))
    bs.calibrate(model, [x])
    packed = bs.finalize(model, x)
    resume_integer(packed)
    for layer in int_layers(packed).values():
        layer.trainable = False
    given = (x[:1] * torch.tensor([[1.0, 100.0, 1.0, -100.0]])).requires_grad_()
    packed[0](given).sum().backward()
    assert (given.grad[0, [1, 3]] == 0).all()
    assert (given.grad[0, [0, 2]] != 0).all()


def test_packed_layers_without_an_integer_form_are_refused_or_stay_and_pass_gradients() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), drawn(16, 8)
    scheme = bs.Scheme(bits=4, granularity="channel")
    tables = {"1.weight": {"grid": "powers_of_two"}}
    bs.prepare(model, scheme, bs.Scheme(bits=8), overrides=tables, first_last_bits=None)
    bs.calibrate(model, [x])
    packed = bs.finalize(model, x)
    with pytest.raises(SiteError, match=r"1 \(weights of 4 bits, powers_of_two"):
        resume_integer(packed)
    resume_integer(packed, keep_float=["1"])
    taken = Taken(packed[0])
    packed(x).sum().backward()
    assert taken.gradient.abs().sum() > 0


def test_copies_do_not_hold_on_to_an_optimizer() -> None:
    model = network()
    prepare_integer(model)
    IntegerSGD(model, lr=0.1)
    assert all(layer.sink is None for layer in int_layers(copy.deepcopy(model)).values())
    assert all(layer.sink is not None for layer in int_layers(model).values())


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
