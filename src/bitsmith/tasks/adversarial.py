"""Images changed against a model: FGSM and PGD within an L-infinity radius, white-box or transferred.

    FGSM  x + ε·sign(∇L(x))                                          Goodfellow et al. 2015, 1412.6572
    PGD   x ← Π(x + η·sign(∇L(x))), from a random point of the ball   Madry et al. 2018, 1706.06083

Π is the projection on the ball |x - x₀| <= ε and on 0..1. Unlike the papers' PGD, the answer is the iterate
of the greatest loss and not the last one: straight-through gradients need not lead uphill. Gradients go
through quantizers straight-through, so the model must be one that still has its estimators; a packed model
has none, and what was made against the trained model is shown to it. Rounding can mask gradients, and an
attack that fails proves nothing then: so there are also the images that were made against the float model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks.classification import device_of, to_float

RADII = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)  # by severity; MEASURED are three of them
STEPS = 10
STEP = 2.5 / STEPS  # of the radius: what is left over is enough to cross the ball

Attack = Callable[[nn.Module, Tensor, Tensor, float, torch.Generator], Tensor]


def fgsm(
    model: nn.Module, images: Tensor, labels: Tensor, radius: float, generator: torch.Generator
) -> Tensor:
    """One step of the whole radius up the loss. Draws nothing."""
    _, gradient = loss_and_gradient(model, images, labels)
    return (images + radius * gradient.sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float,
    generator: torch.Generator,
    steps: int = STEPS,
) -> Tensor:
    """``steps`` steps of a quarter of the radius from a random start; of all iterates the worst one."""
    low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=1)
    draws = 2 * torch.rand(images.shape, generator=generator).to(images.device) - 1
    now = (images + radius * draws).clamp(min=low, max=high)
    worst, most = now, torch.full((len(images),), -torch.inf, device=images.device, dtype=torch.float64)
    for _ in range(steps):
        losses, gradient = loss_and_gradient(model, now, labels)
        worst = torch.where((losses > most)[:, None, None, None], now, worst)
        most = torch.maximum(losses, most)
        now = (now + STEP * radius * gradient.sign()).clamp(min=low, max=high)
    losses, _ = loss_and_gradient(model, now, labels)
    return torch.where((losses > most)[:, None, None, None], now, worst)


def loss_and_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) float64 of each image, and its gradient with respect to that image.

    In double from the logits on: in float32, sure answers have a loss and a gradient of exactly 0.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        losses = F.cross_entropy(model(images).double(), labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach(), gradient


# name: (what makes the images, against whom)
ATTACKS: dict[str, tuple[Attack, Literal["own", "float"]]] = {
    "fgsm": (fgsm, "own"),
    "pgd": (pgd, "own"),
    "fgsm_transferred": (fgsm, "float"),
    "pgd_transferred": (pgd, "float"),
}


def attacked(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float,
    generator: torch.Generator,
    batch_size: int = 256,
) -> Tensor:
    """Images (N, C, H, W) in 0..1 that ``attack`` makes against ``model``, in eval mode, batch by batch."""
    place = device_of(model)
    parts = []
    with in_eval_mode(model):
        for x, y in zip(to_float(images).split(batch_size), labels.split(batch_size), strict=True):
            parts.append(attack(model, x.to(place), y.to(place), radius, generator).cpu())
    return torch.cat(parts)
