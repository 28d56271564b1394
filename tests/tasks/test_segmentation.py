"""Metrics of segmentation against scikit-learn's, and the losses of maps against loops over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks import segmentation
from bitsmith.train.distillation import IGNORED, combined_loss, cross_entropy, distillation_loss


def problem(seed: int, classes: int = 4, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Logits (3, classes, 5, 6), and targets without the last class, some of them IGNORED."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, 5, 6, generator=generator)
    targets = torch.randint(0, max(classes - 1, 1), (3, 5, 6), generator=generator)
    targets[torch.rand(3, 5, 6, generator=generator) < ignored] = IGNORED
    return logits, targets


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_mean_iou_is_scikit_learns_over_the_classes_that_occur(seed: int, classes: int) -> None:
    logits, targets = problem(seed, classes)
    found = segmentation.score(logits, targets)
    kept = targets != IGNORED
    truth, answer = targets[kept].numpy(), logits.argmax(1)[kept].numpy()
    present = np.unique(np.concatenate([truth, answer]))
    each = jaccard_score(truth, answer, labels=present, average=None, zero_division=0)
    assert found["mean_iou"] == pytest.approx(each.mean())
    assert found["accuracy"] == pytest.approx((truth == answer).mean())
    assert found["loss"] == pytest.approx(
        F.cross_entropy(logits, targets, ignore_index=IGNORED).item(), rel=1e-5
    )


def test_iou_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [0, 2, IGNORED, IGNORED]]])
    answer = torch.tensor([[[0, 1, 1, 1], [0, 0, 3, 2]]])
    counts = segmentation.confusion(answer, truth, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    each = segmentation.class_iou(counts).tolist()
    assert each[:3] == pytest.approx([2 / 4, 2 / 3, 0])
    assert math.isnan(each[3])  # answered only where nothing counts
    logits = F.one_hot(answer, 4).movedim(-1, 1).float()
    assert segmentation.score(logits, truth)["mean_iou"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_a_split_is_counted_as_a_whole_whatever_the_batches() -> None:
    model, x = nn.Conv2d(1, 4, 3, padding=1).train(), torch.rand(7, 1, 5, 6)
    y = torch.randint(0, 4, (7, 5, 6))
    whole = segmentation.evaluate(model, x, y, batch_size=7)
    assert segmentation.evaluate(model, x, y, batch_size=2) == pytest.approx(whole)
    figures, each, pictures = segmentation.answers(model, x, y, shown=3, batch_size=2)
    assert figures == pytest.approx(whole)
    assert each.nanmean().item() == pytest.approx(whole["mean_iou"])
    assert torch.equal(pictures, model(x[:3]).argmax(1))
    assert model.training


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(DataError, match="0 pixels with a label"):
        segmentation.score(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), IGNORED))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_maps_is_the_mean_over_pixels_with_a_label(smoothing: float) -> None:
    logits, targets = problem(0)
    each = [
        F.cross_entropy(logits[n, :, i, j][None], targets[n, i, j][None], label_smoothing=smoothing)
        for n, i, j in (targets != IGNORED).nonzero().tolist()
    ]
    assert cross_entropy(logits, targets, smoothing).item() == pytest.approx(torch.stack(each).mean().item())


def test_distillation_of_maps_is_the_mean_over_pixels_with_a_label() -> None:
    (logits, targets), (teacher, _), t = problem(0), problem(1), 2.0
    each = [
        (q.exp() * (q - p)).sum() * t**2
        for n, i, j in (targets != IGNORED).nonzero().tolist()
        for p, q in [((logits[n, :, i, j] / t).log_softmax(0), (teacher[n, :, i, j] / t).log_softmax(0))]
    ]
    settings = {"task_loss": cross_entropy, "temperature": t}
    found = combined_loss(logits, targets, teacher, weight=1.0, **settings)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    assert distillation_loss(logits, logits, t).item() == pytest.approx(0, abs=1e-6)
