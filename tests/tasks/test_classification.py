"""The metric: equal to a hand count, and without side effects on the model."""

import pytest
import torch
from torch import nn

from bitsmith.errors import DataError
from bitsmith.tasks import build, evaluate, load, predict


class Brightness(nn.Module):
    """Logits (mean, 1 - mean): class 0 for bright images."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1)


def test_accuracy_and_loss_are_those_counted_by_hand():
    images = torch.tensor([0.9, 0.8, 0.1, 0.2]).view(4, 1, 1, 1)
    result = evaluate(Brightness(), images, torch.tensor([0, 1, 1, 1]), batch_size=3)
    logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]], dtype=torch.float64)
    chosen = logits.log_softmax(1)[range(4), [0, 1, 1, 1]]
    assert result["accuracy"] == 0.75
    assert result["loss"] == pytest.approx(-chosen.mean().item(), rel=1e-6)


def test_uint8_and_float_images_give_the_same_logits():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    model = build("digits_cnn", seed=0)
    assert torch.equal(predict(model, images), predict(model, images.float() / 255))


def test_predicting_changes_neither_modes_nor_statistics():
    model = build("digits_cnn", seed=0).train()
    model.bn2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = predict(model, torch.rand(9, 1, 8, 8), batch_size=4)
    assert not logits.requires_grad
    assert model.training
    assert not model.bn2.training
    assert model.bn3.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modes_come_back_when_the_model_fails():
    model = build("digits_cnn").train()
    with pytest.raises(RuntimeError):
        predict(model, torch.rand(2, 3, 8, 8))
    assert model.training


def test_nothing_to_predict_is_an_error():
    with pytest.raises(DataError, match="nothing to predict"):
        predict(Brightness(), torch.zeros(0, 1, 8, 8))


def float_accuracy(name, learning_rate, epochs, seed=0):
    """Test accuracy after plain float training on fold ``seed`` of the digits."""
    data = load("digits", fold=seed, validation=0)
    model = build(name, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 23)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for x, y in data.batches("train", 64, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return evaluate(model, data.test_x, data.test_y)["accuracy"]


def test_the_digits_cnn_learns_in_three_epochs():
    assert float_accuracy("digits_cnn", 5e-3, epochs=3) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "learning_rate", "least"), [("digits_cnn", 5e-3, 0.983), ("digits_vit", 5e-3, 0.97)]
)
def test_digits_models_reach_their_accuracy_in_twenty_epochs(name, learning_rate, least):
    accuracies = [float_accuracy(name, learning_rate, 20, seed) for seed in range(5)]
    assert sum(accuracies) / 5 >= least
