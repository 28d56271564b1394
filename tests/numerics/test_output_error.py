"""Errors of outputs are what PyTorch computes, and their gradients what autograd finds."""

import pytest
import torch
import torch.nn.functional as F

from bitsmith.numerics.output_error import LOSSES, output_error, output_error_gradient

GENERATOR = torch.Generator().manual_seed(0)
A = 2 * torch.randn(6, 3, 5, generator=GENERATOR)
REFERENCE = A + torch.randn(6, 3, 5, generator=GENERATOR)


def test_without_a_level_they_are_the_usual_losses() -> None:
    assert torch.allclose(output_error(A, REFERENCE, None), F.mse_loss(A, REFERENCE))
    assert torch.allclose(output_error(A, REFERENCE, None, "huber"), 2 * F.huber_loss(A, REFERENCE))
    similarity = F.cosine_similarity(A.flatten(1), REFERENCE.flatten(1))
    assert torch.allclose(output_error(A, REFERENCE, None, "cosine"), (1 - similarity).mean())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 5), (6, 15), (90,)])
def test_the_gradient_is_autograds(loss: str, relative: bool, shape: tuple[int, ...]) -> None:
    a, reference = A.view(shape).double().float().requires_grad_(), REFERENCE.view(shape)
    level = a.detach() if relative else None
    if len(shape) == 1 and loss == "cosine":
        a = a.detach().unsqueeze(0).requires_grad_()
        reference = reference.unsqueeze(0)
    output_error(a, reference, level, loss).backward()
    slope = output_error_gradient(a.detach(), reference, level, loss, torch.tensor(3.0))
    assert slope.shape == a.shape
    torch.testing.assert_close(slope, 3 * a.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_counts_alike_whatever_its_size(loss: str) -> None:
    sizes = torch.tensor([1e-3, 1.0, 5.0, 1e3, 2.0, 0.1]).view(6, 1, 1)
    torch.testing.assert_close(
        output_error(A * sizes, REFERENCE * sizes, REFERENCE * sizes, loss),
        output_error(A, REFERENCE, REFERENCE, loss),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_their_batch(loss: str) -> None:
    whole = output_error_gradient(A, REFERENCE, A, loss)
    parts = [
        output_error_gradient(A[at], REFERENCE[at], A[at], loss, torch.tensor(share))
        for at, share in ((slice(0, 1), 1 / 6), (slice(1, 6), 5 / 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_sample_has_a_finite_gradient(loss: str) -> None:
    slope = output_error_gradient(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), loss)
    assert torch.equal(slope, torch.zeros(2, 4))
