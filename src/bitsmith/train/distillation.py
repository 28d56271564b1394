"""Losses of one micro-batch: labels, a float teacher, or both.

The teacher is a callable, not a member of the student, so that it is never saved, moved or trained with it.
A target of a sequence or a picture that is IGNORED (a prompt, padding, a pixel without a label) counts in
neither term, nor in any mean. Classes are the last axis of logits, except in maps (N, classes, H, W), which
are taken as convolutions put them out: `classes_last`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100  # cross_entropy's own mark of a target that does not count


def classes_last(logits: Tensor) -> Tensor:
    """Logits (N, ..., classes): maps (N, classes, H, W), which have four axes, as (N, H, W, classes)."""
    return logits.movedim(1, -1) if logits.ndim == 4 else logits


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (N, ..., classes) or (N, classes, H, W) against targets (N, ...) that are
    not IGNORED."""
    return F.cross_entropy(
        classes_last(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def counted(targets: Tensor) -> Tensor | None:
    """Where targets (N, T, ...) count; None for labels (N,), which all do."""
    return targets != IGNORED if targets.ndim > 1 else None


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, where: Tensor | None = None
) -> Tensor:
    """T² · mean over rows of KL(softmax(teacher/T) || softmax(student/T)), logits (N, ..., classes) or
    (N, classes, H, W).

    where: (N, ...) bool, the rows that the mean is over; all of them without it. T² keeps the gradient's size
    when T changes (1503.02531, section 2).
    """
    student = F.log_softmax(classes_last(logits).flatten(0, -2) / temperature, dim=-1)
    teacher = F.log_softmax(classes_last(teacher_logits).flatten(0, -2) / temperature, dim=-1)
    if where is None:
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
    rows = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    kept = where.flatten()
    return rows.where(kept, 0.0).sum() / kept.sum() * temperature**2  # indexing by kept would wait for a GPU


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
    soft = distillation_loss(logits, teacher_logits, temperature, counted(targets))
    return soft if weight == 1 else (1 - weight) * task_loss(logits, targets) + weight * soft
