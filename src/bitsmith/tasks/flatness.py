"""How flat a minimum is: sharpness in a radius, the Hessian's top eigenvalue, a picture of the loss surface.

All three move the weights that training moved (every parameter but those of quantizers), and look at the loss
of some batches; a quantized model is looked at through its quantizers:

    sharpness       max of L(theta + e) - L(theta),  |e_l| <= rho |theta_l| for each tensor l
    top_eigenvalue  of the Hessian of L at theta, relative: of D H D with D = |theta_l| / sqrt(n_l), so that a
                    tensor's scale, which the next BatchNorm takes away, counts for nothing
    loss_surface    L(theta + x d_1 + y d_2), d random, each filter as long as the model's own (1712.09913)

A rounded weight has a derivative of 0 or none. `top_eigenvalue` takes the surrogate that training takes:
inside the range a quantizer adds a constant, Q(x) = x + c, outside it is one. The other two compute the real
loss.

How far to look, RADIUS and SPAN, is where models differ and none is at its ceiling yet: the digits CNN, 10
epochs, seeds 0 and 1, 512 training images, whose guessing loss is ln 10 = 2.3:

    sharpness at radius   0.002         0.005         0.01        0.02          0.05
    float                 0.02  0.02    0.10  0.08    0.51 0.41   4.5   3.1     29.8  25.6
    W4A4                  0.01  0.01    0.10  0.14    0.59 0.90   6.5   4.9     14.2  19.0
    W2A2                  0.21  0.19    1.39  1.46    4.45 6.06   10.7  8.9     17.7  13.0

From 0.01 on 2 bits are worse than guessing, at 0.05 all models are, in an order that says how large their
logits can become. The edge of the surface has a mean loss of 0.8 to 1.3 at a span of 0.25 (digits ViT: 0.7 to
1.3), and of 3 to 8 at 0.5.

A flat minimum need not hold better under shift, and a sharp one may (1703.04933 rescales one into the other,
which is why radii are relative here): whether it does is measured, see docs/methods/flatness.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsmith.errors import DataError, check_value
from bitsmith.quantization import sites
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.train.distillation import Loss, cross_entropy

Batches = Sequence[tuple[Tensor, Tensor]]  # (inputs as the model takes them, targets)
TINY = 1e-12
RADIUS = 0.005
SPAN = 0.25


def sharpness(
    model: nn.Module, batches: Batches, *, radius: float = RADIUS, steps: int = 5, loss: Loss = cross_entropy
) -> float:
    """By how much the mean loss rises within a relative radius, found by ``steps`` of gradient ascent.

    A lower bound of the maximum, at least 0: each step goes to the edge of the radius along the gradient
    where it is, and the best point seen counts. Weights have their own bits again afterwards. Raises
    DataError without batches, SchemeError for a radius or number of steps out of range.
    """
    check_value("sharpness.radius", radius, 0 < radius < 1, "a share of each tensor's norm between 0 and 1")
    check_value("sharpness.steps", steps, steps >= 1, "at least 1")
    with _ready(model, batches) as weights:
        sizes = [radius * p.detach().norm() for p in weights]
        start, gradient = _loss_and_gradient(model, batches, loss, weights)
        best = start
        with _restored(weights) as before:
            for step in range(steps):
                moves = [g * (size / (g.norm() + TINY)) for g, size in zip(gradient, sizes, strict=True)]
                _place(weights, before, moves)
                if step + 1 < steps:
                    now, gradient = _loss_and_gradient(model, batches, loss, weights)
                else:
                    now = _mean_loss(model, batches, loss)
                best = max(best, now)
    return best - start


def top_eigenvalue(
    model: nn.Module,
    batches: Batches,
    *,
    iterations: int = 20,
    relative: bool = True,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> float:
    """The eigenvalue of the Hessian with the greatest magnitude, by power iteration through the surrogate.

    It ends early once the estimate changes by less than 0.1 %. Raises DataError without batches.
    """
    check_value("top_eigenvalue.iterations", iterations, iterations >= 1, "at least 1")
    with _ready(model, batches) as weights, _surrogate(model), sdpa_kernel(SDPBackend.MATH):
        scale = [p.detach().norm() / p.numel() ** 0.5 if relative else p.new_ones(()) for p in weights]
        generator = torch.Generator().manual_seed(seed)
        v = [torch.randn(p.shape, generator=generator).to(p) for p in weights]
        found = 0.0
        for _ in range(iterations):
            length = _length(v) + TINY
            v = [part / length for part in v]
            product = _hessian_product(model, batches, loss, weights, torch._foreach_mul(v, scale))
            product = list(torch._foreach_mul(product, scale))
            before, found = found, sum((a * b).sum().item() for a, b in zip(v, product, strict=True))
            v = product
            if abs(found - before) < 1e-3 * abs(found):
                break
    return found


def loss_surface(
    model: nn.Module,
    batches: Batches,
    *,
    span: float = SPAN,
    points: int = 21,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Tensor:
    """Mean losses (points, points) at -span..span along two random directions; in the middle is the model.

    ``span`` is relative to the norm of each filter. Models with the same parameters share the directions of a
    seed. Raises DataError without batches, SchemeError for an even number of points or a span out of range.
    """
    check_value("loss_surface.span", span, span > 0, "more than 0")
    check_value("loss_surface.points", points, points >= 3 and points % 2 == 1, "an odd number from 3 up")
    with _ready(model, batches) as weights:
        generator = torch.Generator().manual_seed(seed)
        first, second = (_direction(weights, generator) for _ in range(2))
        at = torch.linspace(-span, span, points).tolist()
        found = torch.empty(points, points)
        with _restored(weights) as before:
            for i, y in enumerate(at):
                for j, x in enumerate(at):
                    moves = [x * d + y * e for d, e in zip(first, second, strict=True)]
                    _place(weights, before, moves)
                    found[i, j] = _mean_loss(model, batches, loss)
    return found


def measure_flatness(
    model: nn.Module, batches: Batches, *, radius: float = RADIUS, loss: Loss = cross_entropy
) -> dict[str, float]:
    """{"loss", "sharpness", "top_eigenvalue"} on these batches. Raises DataError, SchemeError as they do."""
    with _ready(model, batches):
        now = _mean_loss(model, batches, loss)
    return {
        "loss": now,
        "sharpness": sharpness(model, batches, radius=radius, loss=loss),
        "top_eigenvalue": top_eigenvalue(model, batches, loss=loss),
    }


# ---- inside


@contextlib.contextmanager
def _ready(model: nn.Module, batches: Batches) -> Iterator[list[nn.Parameter]]:
    """The weights that move, in eval mode: BatchNorm's statistics stand still."""
    if not batches:
        raise DataError("there is nothing to measure a loss on", where="flatness", got="no batches")
    own = {id(p) for q in sites(model).values() for p in q.parameters()}
    weights = [
        p for p in model.parameters() if p.requires_grad and p.is_floating_point() and id(p) not in own
    ]
    if not weights:
        raise DataError(
            "this model has no weight that could move",
            where="flatness",
            remedy="Measure the trained model, before its weights become integer codes",
        )
    with in_eval_mode(model):
        yield weights


@contextlib.contextmanager
def _restored(weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Copies of the weights, which have these bits again afterwards."""
    before = [p.detach().clone() for p in weights]
    try:
        yield before
    finally:
        _place(weights, before, None)


@torch.no_grad()
def _place(weights: Sequence[Tensor], before: Sequence[Tensor], moves: Sequence[Tensor] | None) -> None:
    torch._foreach_copy_(list(weights), list(before))
    if moves is not None:
        torch._foreach_add_(list(weights), list(moves))


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    count = sum(len(x) for x, _ in batches)
    return sum(loss(model(x), y).item() * len(x) / count for x, y in batches)


def _loss_and_gradient(
    model: nn.Module, batches: Batches, loss: Loss, weights: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The mean loss and its gradient, a zero where a weight has none."""
    count, total = sum(len(x) for x, _ in batches), 0.0
    gradient = [torch.zeros_like(p) for p in weights]
    for x, y in batches:
        with torch.enable_grad():
            now = loss(model(x), y) * (len(x) / count)
            parts = torch.autograd.grad(now, list(weights), allow_unused=True)
        total += now.item()
        for whole, part in zip(gradient, parts, strict=True):
            if part is not None:
                whole += part
    return total, gradient


def _hessian_product(
    model: nn.Module, batches: Batches, loss: Loss, weights: Sequence[Tensor], v: Sequence[Tensor]
) -> list[Tensor]:
    """H v of the mean loss."""
    count = sum(len(x) for x, _ in batches)
    product = [torch.zeros_like(p) for p in weights]
    for x, y in batches:
        with torch.enable_grad():
            now = loss(model(x), y) * (len(x) / count)
            gradient = torch.autograd.grad(now, list(weights), create_graph=True, materialize_grads=True)
            along = torch.stack([(g * part).sum() for g, part in zip(gradient, v, strict=True)]).sum()
            parts = torch.autograd.grad(along, list(weights), materialize_grads=True)
        for whole, part in zip(product, parts, strict=True):
            whole += part
    return product


@contextlib.contextmanager
def _surrogate(model: nn.Module) -> Iterator[None]:
    """Quantizers are x + constant where they pass a gradient, constant elsewhere: twice differentiable."""

    def replace(quantizer: nn.Module, arguments: tuple[Any, ...], y: Tensor) -> Tensor:
        x = arguments[0]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            passed = quantizer.forward(leaf, *arguments[1:])
            (slope,) = torch.autograd.grad(passed.sum(), leaf)
        return slope * x + (y - slope * x).detach()

    hooks = [q.register_forward_hook(replace) for q in sites(model).values() if not q.bits.in_float]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _direction(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random, each filter (row) as long as the weight's own; biases and norms stay (1712.09913, 4)."""
    found = []
    for p in weights:
        d = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            found.append(torch.zeros_like(p))
            continue
        own, drawn = (t.detach().flatten(1).norm(dim=1) for t in (p, d))
        found.append(d * (own / (drawn + TINY)).view(-1, *[1] * (p.ndim - 1)))
    return found


def _length(parts: Sequence[Tensor]) -> float:
    return torch.stack([part.norm() for part in parts]).norm().item()
