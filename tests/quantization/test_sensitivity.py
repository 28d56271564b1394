"""Sensitivity: the score against its definition, computed by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from bitsmith.quantization import FixedBits, MatMul, Scheme, calibrate, prepare, set_bits, sites
from bitsmith.quantization.sensitivity import after_training, sensitivity

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def prepared(widths: tuple[int, ...] = (2, 4, 8)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    set_bits(model, {name: FixedBits(widths[-1], widths) for name in sites(model)})
    calibrate(model, [X])
    return model


def test_the_score_is_the_definition_sample_by_sample() -> None:
    model = prepared()
    scores = sensitivity(model, [(X[:8], Y[:8]), (X[8:], Y[8:])], F.cross_entropy)
    quantizer = sites(model)["2.weight"]
    first, last = model[0], model[2]
    for row in range(3):
        weight = quantizer.at_row(last.weight, row).detach()
        total = 0.0
        for x, y in zip(X, Y, strict=True):
            h = F.relu(F.linear(x, first.weight, first.bias))
            out = F.linear(h, last.weight, last.bias).detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(out[None], y[None]), out)
            total += (g * (F.linear(h, weight, last.bias) - out)).square().sum().item() / len(X)
        assert abs(scores["2.weight"][row].item() - total) < 1e-4 * total + 1e-9


def test_more_bits_hurt_less() -> None:
    for score in sensitivity(prepared(), [(X, Y)], F.cross_entropy).values():
        assert score[0] > score[1] > score[2] > 0


def test_for_training_levels_come_nearer_and_weights_count_less() -> None:
    slope = torch.tensor([16.0, 4.0, 1.0])
    scores = {"a.input": 100 * slope, "b.input": slope, "b.weight": slope}
    fit = after_training(scores, ["b.weight"])
    assert torch.allclose(fit["a.input"] / fit["b.input"], torch.full((3,), 10.0))
    assert torch.allclose(fit["b.weight"] / fit["b.input"], torch.full((3,), 0.3))
    for row in fit.values():
        assert torch.allclose(row / row[-1], slope)
    assert torch.isfinite(after_training({"c": torch.tensor([1e-3, 0.0])}, [])["c"]).all()


def test_the_model_is_left_as_it_was() -> None:
    model = prepared()
    before = model(X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    sensitivity(model, [(X, Y)], F.cross_entropy)
    assert torch.equal(model(X), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_both_operands_of_a_product_have_scores() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.product = nn.Linear(6, 6), MatMul()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.product(x, self.key(x).mT)

    model = Attention()
    prepare(model, Scheme(bits=2), Scheme(bits=2), first_last_bits=None)
    calibrate(model, [X])
    scores = sensitivity(model, [(X, torch.zeros(12, 12))], F.mse_loss)
    assert {"key.weight", "key.input", "product.left", "product.right"} == set(scores)
    assert all(score.shape == (1,) and score > 0 for score in scores.values())
