"""The table: its splits lie below the quantile, its shift above; errors name the nearest feature."""

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from bitsmith.errors import DataError
from bitsmith.tasks import build, load


@pytest.mark.parametrize("feature", ["mean texture", "worst area"])
def test_rows_are_split_at_the_quantile_of_the_feature(feature):
    data = load("breast_cancer", feature=feature, quantile=0.6)
    at = list(load_breast_cancer().feature_names).index(feature)
    seen = torch.cat([data.train_x, data.val_x, data.test_x])
    assert seen[:, at].max() < data.shifted_x[:, at].min()
    assert len(seen) + len(data.shifted_x) == 569
    assert len(seen) / 569 == pytest.approx(0.6, abs=0.01)
    assert len(data.test_x) / len(seen) == pytest.approx(0.2, abs=0.01)
    (shift,) = data.shifts()
    assert (shift.name, shift.suite, shift.graded) == ("covariate", "covariate", False)
    assert data.facts()["shifted_feature"] == feature
    assert torch.equal(shift.rows(1, 0, None)[0], data.shifted_x)


def test_splits_depend_on_the_seed_and_the_shift_does_not():
    one, two = load("breast_cancer"), load("breast_cancer", seed=1)
    assert not torch.equal(one.test_x, two.test_x)
    assert torch.equal(one.shifted_x, two.shifted_x)


def test_the_mlp_takes_a_row_to_a_logit_a_class():
    model, data = build("mlp", seed=0), load("breast_cancer")
    assert model(data.example(4)).shape == (4, 2)
    assert sum(p.numel() for p in model.parameters()) == 6334
    assert set(data.evaluate(model, data.test_x, data.test_y)) == {"accuracy", "loss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature": "mean textur"}, "no such feature; got mean textur. Did you mean mean texture?"),
        ({"quantile": 1.0}, "this is no quantile; got 1.0, expected 0 < q < 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(DataError, match=message.replace("?", "\\?")):
        load("breast_cancer", **arguments)
