"""Whole runs of `train`: it learns, reports, distills, and says where it diverged."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import Interrupted, RecipeError, SiteError, TrainingDiverged
from bitsmith.methods.method import Method
from bitsmith.train import Progress, TrainConfig, train
from tests.train.problem import data, network, same_state, shift

CONFIG = TrainConfig(epochs=4, batch_size=8, learning_rate=0.02, device="cpu")


def accuracy(model: nn.Module) -> float:
    x, y = data(60, seed=9)
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def test_it_learns_and_reports_an_epoch_at_a_time() -> None:
    model = network()
    result = train(model, *data(), CONFIG, augment=shift, validate=lambda: accuracy(model))
    assert accuracy(model) > 0.9
    assert not model.training
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4]
    assert [record["step"] for record in result.history] == [5, 10, 15, 20]
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    assert result.history[-1]["validation_accuracy"] == pytest.approx(accuracy(model))
    assert result.steps == 20
    assert result.resumed_at is None
    assert (result.device, result.precision, result.notes) == ("cpu", "float32", [])


def test_validation_does_not_change_the_training() -> None:
    models = [network(), network()]
    train(models[0], *data(), CONFIG)
    train(models[1], *data(), CONFIG, validate=lambda: accuracy(models[1]))
    assert same_state(*models)


def test_one_seed_makes_one_result_whatever_was_drawn_before() -> None:
    models = [network() for _ in range(3)]
    for index, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.manual_seed(100 + index)
        before = torch.get_rng_state()
        train(model, *data(), TrainConfig(epochs=2, batch_size=8, seed=seed, device="cpu"), augment=shift)
        assert torch.equal(torch.get_rng_state(), before)
    assert same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_progress_is_told_after_every_step_and_every_epoch() -> None:
    seen: list[Progress] = []
    train(network(), *data(), CONFIG, progress=seen.append)
    steps = [told for told in seen if told.record is None]
    epochs = [told for told in seen if told.record is not None]
    assert [told.step for told in steps] == list(range(1, 21))
    assert [told.epoch for told in epochs] == [1, 2, 3, 4]
    assert {told.steps for told in seen} == {20}
    assert steps[0].epoch == 1
    assert all(math.isfinite(told.loss) and told.learning_rate > 0 for told in seen)


def test_averaged_weights_are_what_remains() -> None:
    raw, averaged = network(), network()
    train(raw, *data(), CONFIG)
    train(averaged, *data(), TrainConfig(**{**vars(CONFIG), "ema": 0.9}))
    assert not torch.equal(raw[-1].weight, averaged[-1].weight)
    assert torch.equal(raw[1].running_mean, averaged[1].running_mean)


def test_a_student_learns_from_its_teacher_without_labels() -> None:
    teacher, student = network(), network(seed=5)
    train(teacher, *data(), CONFIG)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x, y = data()
    config = TrainConfig(epochs=6, batch_size=8, learning_rate=0.02, distillation=1.0, device="cpu")
    train(student, x, torch.zeros_like(y), config, teacher=teacher, augment=shift)
    assert accuracy(student) > 0.9
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.distillation: there is no teacher"):
        train(network(), *data(), TrainConfig(distillation=0.5, device="cpu"))


def test_a_loss_of_ones_own_replaces_cross_entropy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    x, _ = data()
    config = TrainConfig(**{**vars(CONFIG), "epochs": 30})
    train(model, x, x.mean((1, 2, 3)), config, loss=lambda out, target: (out[:, 0] - target).square().mean())
    with torch.no_grad():
        assert (model(x)[:, 0] - x.mean((1, 2, 3))).abs().mean() < 0.1


def test_label_smoothing_raises_the_loss_of_a_sure_model() -> None:
    plain = train(network(), *data(), CONFIG).history[-1]["loss"]
    config = TrainConfig(**{**vars(CONFIG), "label_smoothing": 0.3})
    assert train(network(), *data(), config).history[-1]["loss"] > plain + 0.2


class Owner(Method):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))


def test_a_parameter_that_no_optimizer_would_see_is_an_error() -> None:
    with pytest.raises(SiteError, match="Owner: parameter logits of this method is not in the model"):
        train(network(), *data(), CONFIG, methods=[Owner()])


class Breaks(nn.Module):
    """Divides by zero from a given forward on."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def forward(self, x: Tensor) -> Tensor:
        self.good -= 1
        return x if self.good >= 0 else x / 0.0


def test_divergence_names_the_step_and_the_module() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(36, 8), Breaks(7)), nn.Linear(8, 3))
    with pytest.raises(TrainingDiverged) as error:
        train(model, *data(), CONFIG)
    assert "train step 8 of 20: the loss is nan; the first module whose output is not finite is 1.1" in str(
        error.value
    )
    assert error.value.exit_code == 1


def test_divergence_blames_the_input_where_it_is_to_blame() -> None:
    x, y = data()
    x[3] = math.nan
    with pytest.raises(TrainingDiverged, match="the input batch itself is not finite"):
        train(network(), x, y, CONFIG)


def test_divergence_blames_the_loss_where_all_outputs_are_finite() -> None:
    with pytest.raises(TrainingDiverged, match=r"step 1 of 20.*so the loss function made it"):
        train(network(), *data(), CONFIG, loss=lambda out, target: out.sum() * math.inf)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    # the loss of the only step is fine, its gradient is not
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out * 0).abs().sqrt().sum()

    config = TrainConfig(epochs=1, batch_size=40, device="cpu")
    with pytest.raises(TrainingDiverged, match=r"parameter 5.weight is not finite|parameter 0.weight"):
        train(network(), *data(), config, loss=loss, checkpoint=tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_a_stop_without_a_checkpoint_says_that_nothing_is_saved() -> None:
    with pytest.raises(Interrupted, match="stopped after step 1 of 20; nothing is saved"):
        train(network(), *data(), CONFIG, stop=lambda: True)


def test_bfloat16_trains_float32_weights() -> None:
    model = network()
    config = TrainConfig(**{**vars(CONFIG), "precision": "bfloat16"})
    result = train(model, *data(), config)
    assert result.precision == "bfloat16"
    assert "precision bfloat16 as asked for: a 128 matrix product takes" in result.notes[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert accuracy(model) > 0.9


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_a_language_model_learns_from_tokens_and_its_history_names_what_was_validated(
    distillation: float,
) -> None:
    tokens = torch.arange(64).view(8, 8) % 7  # after each token comes the next of seven

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 7))

    student, teacher = model(), model()
    config = TrainConfig(
        epochs=40, batch_size=4, learning_rate=0.05, label_smoothing=0.01, distillation=distillation
    )
    train(teacher, tokens[:, :-1], tokens[:, 1:], TrainConfig(epochs=40, batch_size=4, learning_rate=0.05))
    result = train(
        student, tokens[:, :-1], tokens[:, 1:], config, teacher=teacher, validate=lambda: {"loss": 0.25}
    )
    assert torch.equal(student(tokens[:, :-1]).argmax(-1), tokens[:, 1:])
    assert result.history[-1]["validation_loss"] == 0.25
    assert "validation_accuracy" not in result.history[-1]
