"""Cross-entropy without logits of all tokens, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.optim import IntegerSGD
from bitsmith.quantization.chunked_loss import chunked_cross_entropy
from bitsmith.quantization.integer_prepare import prepare_integer
from tests.optim.models import Largest
from tests.quantization.integers import Taken, drawn, one_layer

WIDTH, TOKENS = 1024, 60  # 128 rows of the vocabulary at once


def targets(vocabulary: int) -> Tensor:
    y = torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))
    y[5] = -100
    return y


@pytest.mark.parametrize("vocabulary", [7, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_of_an_integer_head_loss_and_gradients_are_those_of_its_codes(vocabulary: int, bias: bool) -> None:
    layer = one_layer(nn.Linear(WIDTH, vocabulary, bias=bias), 4)
    taken, y, x = Taken(layer), targets(vocabulary), drawn(TOKENS, WIDTH).requires_grad_()
    loss = chunked_cross_entropy(x, layer, y)
    torch.testing.assert_close(loss, F.cross_entropy(layer(x), y))

    codes, weight = layer.input(x).detach().requires_grad_(), layer.weight().requires_grad_()
    b = layer.bias.detach().clone().requires_grad_() if bias else None
    (3 * F.cross_entropy(F.linear(codes, weight, b), y)).backward()
    middle = vocabulary // 2 // 8 * 8
    total_x, total_w = 0, 0
    for seed in range(20):  # rounding is stochastic, and a token's gradient has one large entry
        layer.seed, x.grad = seed, None
        (3 * chunked_cross_entropy(x, layer, y)).backward()
        total_x, total_w = total_x + x.grad / 20, total_w + taken.gradient / 20
    assert middle >= 0
    assert (total_x - codes.grad).norm() < 0.04 * codes.grad.norm()
    assert (total_w - weight.grad).norm() < 0.02 * weight.grad.norm()
    if bias:
        torch.testing.assert_close(layer.bias.grad / 20, b.grad)


def test_an_integer_head_moves_once_a_step_and_a_frozen_one_passes_gradients() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 300))
    prepare_integer(model, 4, first_last_bits=None)
    optimizer, x, y = IntegerSGD(model, lr=2.0), drawn(TOKENS, WIDTH), targets(300)
    losses = []
    for _ in range(6):
        loss = chunked_cross_entropy(x, model[0], y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    optimizer.detach()
    model[0].trainable = False
    before, x = model[0].weight.codes.clone(), x.requires_grad_()
    chunked_cross_entropy(x, model[0], y).backward()
    assert torch.equal(model[0].weight.codes, before)
    assert x.grad.norm() > 0


def test_of_any_other_head_both_are_exact() -> None:
    head, x, y = nn.Linear(16, 2**18), drawn(3, 4, 16).requires_grad_(), targets(2**18)[:12].view(3, 4)
    found = []
    for loss in (chunked_cross_entropy(x, head, y), F.cross_entropy(head(x).flatten(0, 1), y.flatten())):
        x.grad = head.weight.grad = None
        loss.backward()
        found.append((loss.detach(), x.grad, head.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_no_tensor_has_the_size_of_all_logits() -> None:
    layer, y = one_layer(nn.Linear(64, 4096, bias=False), 4), targets(4096)
    Taken(layer)
    layer.trainable = False
    x = drawn(TOKENS, 64).requires_grad_()
    with Largest() as seen:
        chunked_cross_entropy(x, layer, y).backward()
    assert seen.bytes <= 2048 * 64 * 4 < TOKENS * 4096 * 4


def test_nothing_to_predict_is_an_error() -> None:
    for y in (torch.full((4,), -100), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(DataError, match="nothing to predict"):
            chunked_cross_entropy(drawn(4, 16), nn.Linear(16, 5), y)
