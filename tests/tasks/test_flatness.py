"""Flatness, against quadratics whose answers are known and against finite differences."""

import copy

import pytest
import torch
from torch import nn

from bitsmith.errors import BitsmithError, DataError
from bitsmith.quantization import Scheme, calibrate, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.tasks.flatness import (
    _surrogate,
    loss_surface,
    measure_flatness,
    sharpness,
    top_eigenvalue,
)


class Quadratic(nn.Module):
    """L = 1/2 sum of a_i w_i^2, whatever the input."""

    def __init__(self, curvature, at):
        super().__init__()
        self.a, self.w = torch.tensor(curvature), nn.Parameter(torch.tensor(at))

    def forward(self, x):
        return 0.5 * (self.a * self.w.square()).sum() + 0 * x.sum()


def as_it_is(outputs, targets):
    return outputs


ANY = [(torch.zeros(2, 1), torch.zeros(2))]


def small(bits=None, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    if bits:
        prepare(model, Scheme(bits=bits, granularity="channel"), Scheme(bits=8))
        calibrate(model, [x])
    return model, [(x[:40], y[:40]), (x[40:], y[40:])]


def test_the_eigenvalue_of_a_quadratic_is_its_greatest_curvature():
    model = Quadratic([1.0, 7.0, 3.0], [1.0, 2.0, 2.0])
    found = top_eigenvalue(model, ANY, relative=False, iterations=100, loss=as_it_is)
    assert found == pytest.approx(7.0, rel=1e-3)
    relative = top_eigenvalue(model, ANY, iterations=100, loss=as_it_is)
    assert relative == pytest.approx(7.0 * 9.0 / 3, rel=1e-3)  # |w|^2 / n


def test_a_negative_curvature_of_the_greatest_magnitude_counts():
    model = Quadratic([1.0, -5.0], [1.0, 1.0])
    assert top_eigenvalue(model, ANY, relative=False, iterations=100, loss=as_it_is) == pytest.approx(
        -5, rel=1e-3
    )


def test_the_eigenvalue_is_that_of_the_whole_hessian():
    model, batches = small(bias=False)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(values):
        first, second = values[:48].view(8, 6), values[48:].view(3, 8)
        return nn.functional.cross_entropy((x @ first.T).tanh() @ second.T, y)

    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).abs().max()
    found = top_eigenvalue(model, batches, relative=False, iterations=200)
    assert abs(found) == pytest.approx(exact.item(), rel=5e-3)


def test_through_quantizers_the_hessian_is_that_of_the_straight_through_loss():
    """Weights alone quantized, nothing clipped: the Hessian of the float model at the rounded weights."""
    model, batches = small(bias=False)
    rounded = copy.deepcopy(model)
    prepare(model, Scheme(bits=4, granularity="channel", range="static"), None)
    calibrate(model, [x for x, _ in batches])
    with torch.no_grad():
        for index in (0, 2):
            rounded[index].weight.copy_(model[index].weight_quantizer(model[index].weight))
    found = top_eigenvalue(model, batches, relative=False, iterations=200)
    assert found == pytest.approx(top_eigenvalue(rounded, batches, relative=False, iterations=200), rel=2e-3)


def test_the_surrogate_has_the_gradient_of_training():
    model, batches = small(bits=2)
    x, y = batches[0]
    weights = [model[0].weight, model[2].weight]
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights)
    with _surrogate(model):
        through = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights)
    torch.testing.assert_close(through, plain)


def test_the_sharpness_of_a_quadratic_is_reached_along_the_gradient():
    model = Quadratic([2.0, 2.0], [3.0, 4.0])  # isotropic: |w| = 5, the gradient points outwards
    found = sharpness(model, ANY, radius=0.1, loss=as_it_is)
    assert found == pytest.approx(5.5**2 - 25.0, rel=1e-5)


def test_more_steps_find_no_less():
    model, batches = small(bits=3)
    found = [sharpness(model, batches, radius=0.2, steps=steps) for steps in (1, 3, 8)]
    assert 0 <= found[0] <= found[1] <= found[2]


def test_a_rescaled_model_is_as_flat():
    """A ReLU network may shift its scale between layers (1703.04933); relative measures do not see it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    batches = [(torch.randn(50, 6), torch.randint(0, 3, (50,)))]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(10)
        other[2].weight.div_(10)
    assert sharpness(other, batches) == pytest.approx(sharpness(model, batches), rel=1e-3)
    own = top_eigenvalue(model, batches, iterations=200)
    assert top_eigenvalue(other, batches, iterations=200) == pytest.approx(own, rel=1e-2)
    bare = [top_eigenvalue(m, batches, relative=False, iterations=200) for m in (model, other)]
    assert bare[1] > 5 * bare[0]


def test_the_middle_of_the_surface_is_the_model_and_directions_are_shared():
    model, batches = small()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    surface = loss_surface(model, batches, points=5)
    assert surface.shape == (5, 5)
    assert surface[2, 2].item() == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    torch.testing.assert_close(surface, loss_surface(model, batches, points=5))
    assert not torch.allclose(surface, loss_surface(model, batches, points=5, seed=1))


def test_a_float_and_a_quantized_model_are_moved_alike():
    model, batches = small()
    quantized = copy.deepcopy(model)
    prepare(quantized, None, Scheme(bits=8, range="dynamic"))  # weights have no range that they could leave
    float_surface, surface = (loss_surface(m, batches, points=5) for m in (model, quantized))
    spread = float_surface.max() - float_surface.min()
    assert 0 < (surface - float_surface).abs().max() < 0.1 * spread
    assert (surface - loss_surface(model, batches, points=5, seed=1)).abs().max() > 0.2 * spread


def test_a_larger_radius_finds_no_less():
    model, batches = small(3)
    found = [measure_flatness(model, batches, radius=radius)["sharpness"] for radius in (0.005, 0.05)]
    assert found[0] == sharpness(model, batches) < found[1]


@pytest.mark.parametrize("bits", [None, 2, 4])
def test_every_weight_has_its_own_bits_afterwards(bits):
    model, batches = small(bits)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_flatness(model, batches)
    loss_surface(model, batches, points=3)
    assert set(found) == {"loss", "sharpness", "top_eigenvalue"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(q._forward_hooks for q in sites(model).values())


def test_attention_has_a_second_derivative_too():
    from bitsmith.tasks import build

    model = build("digits_vit", seed=0)
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    x = torch.rand(8, 1, 8, 8)
    calibrate(model, [x])
    assert top_eigenvalue(model, [(x, torch.arange(8))], iterations=2) != 0


def test_what_cannot_be_measured_is_refused():
    model, batches = small(4)
    with pytest.raises(DataError, match="no batches"):
        sharpness(model, [])
    with pytest.raises(BitsmithError, match="radius"):
        sharpness(model, batches, radius=0.0)
    with pytest.raises(BitsmithError, match="points"):
        loss_surface(model, batches, points=4)
    with pytest.raises(DataError, match="no weight that could move"):
        sharpness(finalize(model, batches[0][0]), batches)
