"""Losses against the formulas, written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from bitsmith.train.distillation import IGNORED, combined_loss, cross_entropy, distillation_loss

STUDENT = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0]])
TEACHER = torch.tensor([[0.2, 1.0, -1.0], [2.0, 0.0, 1.0]])
TARGETS = torch.tensor([1, 2])


def written_out(temperature: float) -> torch.Tensor:
    p = torch.softmax(TEACHER / temperature, dim=1)
    q = torch.softmax(STUDENT / temperature, dim=1)
    return temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_distillation_is_the_weighted_divergence(temperature: float) -> None:
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, temperature), written_out(temperature))


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    assert distillation_loss(TEACHER, TEACHER, 3.0).abs() < 1e-6


def test_the_gradient_keeps_its_size_at_high_temperature() -> None:
    # 1503.02531, section 2: for large T it tends to (z - v)/classes of zero-mean logits
    student = STUDENT.clone().requires_grad_()
    distillation_loss(student, TEACHER, 1000.0).backward()
    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    torch.testing.assert_close(student.grad, centred / 3 / len(STUDENT), rtol=0.02, atol=1e-3)


def test_the_gradient_is_that_of_the_loss() -> None:
    student = STUDENT.double().requires_grad_()
    assert gradcheck(lambda s: distillation_loss(s, TEACHER.double(), 2.0), (student,))


def test_rows_of_sequences_count_like_rows() -> None:
    sequences = distillation_loss(STUDENT.view(1, 2, 3), TEACHER.view(1, 2, 3), 2.0)
    torch.testing.assert_close(sequences, distillation_loss(STUDENT, TEACHER, 2.0))
    torch.testing.assert_close(
        cross_entropy(STUDENT.view(1, 2, 3), TARGETS.view(1, 2)), cross_entropy(STUDENT, TARGETS)
    )


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    logs = torch.log_softmax(STUDENT, dim=1)
    wanted = torch.full((2, 3), 0.1 / 3)
    wanted[torch.arange(2), TARGETS] += 0.9
    torch.testing.assert_close(cross_entropy(STUDENT, TARGETS, 0.1), -(wanted * logs).sum(1).mean())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_labels_and_teacher_are_mixed_by_weight(weight: float) -> None:
    loss = combined_loss(STUDENT, TARGETS, TEACHER, task_loss=cross_entropy, weight=weight, temperature=2.0)
    expected = (1 - weight) * cross_entropy(STUDENT, TARGETS) + weight * written_out(2.0)
    torch.testing.assert_close(loss, expected)


def test_a_teacher_alone_never_looks_at_the_labels() -> None:
    def refuse(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    loss = combined_loss(STUDENT, TARGETS, TEACHER, task_loss=refuse, weight=1.0, temperature=1.0)
    assert math.isfinite(loss)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_ignored_counts_in_no_term_and_in_no_mean(weight: float, smoothing: float) -> None:
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), torch.randn(2, 5, 3)
    targets = torch.tensor([[IGNORED, 1, 2, IGNORED, IGNORED], [IGNORED, IGNORED, 0, 1, 2]])

    def loss(logits: torch.Tensor, soft: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def task(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return cross_entropy(a, b, smoothing)

        return combined_loss(logits, labels, soft, task_loss=task, weight=weight, temperature=2.0)

    kept = targets != IGNORED
    masked = student.clone().requires_grad_()
    found, expected = loss(masked, teacher, targets), loss(student[kept], teacher[kept], targets[kept])
    torch.testing.assert_close(found, expected)
    found.backward()
    assert masked.grad is not None
    assert (masked.grad[~kept] == 0).all()
    assert (masked.grad[kept] != 0).any()
