"""Suites: which shifts a name means, how several models are measured, and what is shown of them."""

import pytest
import torch
from torch import nn

from bitsmith.errors import DataError
from bitsmith.tasks import build, evaluate_shifts, load
from bitsmith.tasks.shifts import CORRUPTIONS, DEFAULT
from bitsmith.tasks.suites import chosen, figures, measure_shifts, pictures, snippets


@pytest.fixture(scope="module")
def digits():
    return load("digits").limited(40)


def names(data, suite):
    return [shift.name for shift in chosen(data, suite)]


def test_suites_are_groups_names_or_several_in_the_order_of_the_data(digits):
    assert names(digits, "default") == list(DEFAULT)
    assert names(digits, "corruptions") == list(CORRUPTIONS)
    assert names(digits, "pgd, noise") == ["noise", "pgd"]
    assert names(digits, "all") == [*CORRUPTIONS, *names(digits, "adversarial")]
    assert names(digits, "none") == []
    assert names(load("breast_cancer"), "default") == names(load("breast_cancer"), "all") == ["covariate"]
    assert names(load("arithmetic", largest=9), "all") == []


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("nois", "there is no such shift; got nois, expected default, all.*Did you mean noise"),
        ("typos", "a shift of text; got typos for data digits, which are images"),
        ("covariate", "a suite of tables"),
    ],
)
def test_other_names_are_explained(digits, suite, message):
    with pytest.raises(DataError, match=message):
        chosen(digits, suite)


def test_the_default_suite_gives_the_figures_of_evaluate_shifts(digits):
    model = build("digits_cnn", seed=0)
    found = measure_shifts({"float": model}, digits, chosen(digits, "default"))
    assert figures(found, "float") == evaluate_shifts(model, digits)


def test_figures_are_means_over_the_severities_that_are_asked_for(digits):
    model = build("digits_cnn", seed=0)
    found = measure_shifts({"m": model}, digits, chosen(digits, "rotation"), severities=[1, 2, 5])
    each = [one["accuracy"] for one in found["rotation"]["m"]]
    assert figures(found, "m", over=[1, 5])["rotation"] == (each[0] + each[2]) / 2
    assert figures(found, "m")["rotation"] == pytest.approx(sum(each) / 3)


class Still(nn.Module):
    """A model whose answers nothing moves: rounded away, gradients and all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((4 * x).round() / 4)


def test_a_masked_gradient_is_found_out_by_what_was_made_against_float(digits):
    from bitsmith.train import TrainConfig, train

    model = build("digits_cnn", seed=0)
    train(model, *load("digits").split("train"), TrainConfig(epochs=3, batch_size=64, learning_rate=1e-2))
    data = load("digits").limited(200)
    still = Still(model).eval()
    shifts = chosen(data, "fgsm,fgsm_transferred")
    found = measure_shifts({"float": model, "still": still}, data, shifts, severities=[5])
    plain = data.evaluate(still, data.test_x, data.test_y)["accuracy"]
    assert found["fgsm"]["still"][0]["accuracy"] == plain  # zero gradient: the images are as they were
    assert found["fgsm_transferred"]["still"][0]["accuracy"] < plain - 0.1
    assert found["fgsm_transferred"]["float"] == found["fgsm"]["float"]
    with_trained = measure_shifts({"still": still}, data, shifts, severities=[5], trained={"still": model})
    assert list(with_trained) == ["fgsm"]  # there is no float model to transfer from
    assert with_trained["fgsm"]["still"] == found["fgsm_transferred"]["still"]


def test_pictures_show_the_first_test_image_at_each_severity(digits):
    model = build("digits_cnn", seed=0)
    found = pictures(digits, ["noise", "pgd"], {"float": model, "quantized": model})
    assert {name: tuple(images.shape) for name, images in found.items()} == {
        "": (1, 1, 8, 8), "noise": (5, 1, 8, 8), "pgd": (5, 1, 8, 8)
    }  # fmt: skip
    assert torch.equal(found[""][0], (255 * digits.test_x[0]).round().byte())
    assert snippets(digits, ["noise"]) == {}


def test_snippets_show_how_the_text_begins():
    data = load("pydoc", context=64)
    found = snippets(data, ["casing", "docstrings"])
    assert [len(texts) for texts in found.values()] == [1, 5, 1]
    assert found["casing"][-1].isupper()
    assert found["casing"][-1].lower() == found[""][0].lower()
    assert pictures(data, ["casing"], {}) == {}
