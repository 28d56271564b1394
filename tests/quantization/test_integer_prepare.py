"""From float models to integer ones and back: nothing in float is left, and no code changes on the way."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsmith as bs
from bitsmith.errors import SchemeError, SiteError
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD
from bitsmith.quantization.integer_layers import packed_layers
from bitsmith.quantization.integer_packed import finalize_integer, resume_integer
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import IntConv2d, IntLinear, int_layers
from tests.quantization.integers import Taken, assert_same, codes_of, drawn, network, stepped


def floats_alive() -> list[Tensor]:
    """All float tensors that the garbage collector knows, but those of torch.compile."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def test_no_float_tensor_of_a_weights_shape_is_alive_after_preparation_and_after_a_step() -> None:
    others = floats_alive()  # of other tests; held, so that no id is given twice
    known = {id(tensor) for tensor in others}

    def alive() -> set[tuple[int, ...]]:
        return {tuple(tensor.shape) for tensor in floats_alive() if id(tensor) not in known}

    model = network()
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim >= 2}
    shapes |= {(s[0], int(torch.Size(s).numel() // s[0])) for s in shapes}
    assert len(shapes & alive()) >= 4  # the walk sees what it must not find below
    prepare_integer(model)
    assert not shapes & alive()
    optimizer = IntegerSGD(model, lr=0.1)
    for _ in range(2):
        F.cross_entropy(model(drawn(6, 1, 8, 8)), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not shapes & alive()


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
            "weights: this value is out of range; got 1, expected a whole number of bits",
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
    assert {"1.weight", "7.bias"} <= {name for name, p in loaded.named_parameters() if p.requires_grad}
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
