"""Losses of one micro-batch: labels, a float teacher, or both.

The teacher is a callable, not a member of the student, so that it is never saved, moved or trained with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (N, ..., classes) against targets (N, ...)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · mean over rows of KL(softmax(teacher/T) || softmax(student/T)), logits (N, ..., classes).

    T² keeps the gradient's size when T changes (1503.02531, section 2).
    """
    student = F.log_softmax(logits.flatten(0, -2) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def combined_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    *,
    task_loss: Loss,
    weight: float,
    temperature: float,
) -> Tensor:
    """(1 - weight)·task + weight·distillation; a weight of 0 or 1 does not compute the other term."""
    if teacher_logits is None or weight == 0:
        return task_loss(logits, targets)
    soft = distillation_loss(logits, teacher_logits, temperature)
    return soft if weight == 1 else (1 - weight) * task_loss(logits, targets) + weight * soft
