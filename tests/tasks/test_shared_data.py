"""The readers of image sheets, against what is known of those sets. Skipped where the sheets are absent."""

import pytest
import torch

from benchmarks import _shared_data
from bitsmith.tasks import build, evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _shared_data.root().is_dir(), reason="the image sheets are not on this machine"),
]


def test_cifar10_has_the_known_mean_and_standard_deviation():
    images, labels, test_images, test_labels = _shared_data.load_arrays("cifar10")
    assert images.shape == (49833, 3, 32, 32)
    assert test_images.shape == (4983, 3, 32, 32)
    assert labels.bincount(minlength=10).min() > 4700
    assert len(test_labels) == 4983
    sample = images[:10000].float() / 255
    assert torch.allclose(sample.mean((0, 2, 3)), torch.tensor([0.4914, 0.4820, 0.4462]), atol=0.004)
    assert torch.allclose(sample.std((0, 2, 3)), torch.tensor([0.2470, 0.2435, 0.2616]), atol=0.004)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("fashion_mnist", 20000, 5000), ("mnist", 10000, 2000), ("cifar10", 49833, 4983)],
)
def test_every_set_loads_as_checked_data(name, train, test):
    data = _shared_data.load(name)
    assert len(data.train_x) + len(data.val_x) == train
    assert len(data.test_x) == test
    assert (data.augment is not None) == (name == "cifar10")


@pytest.mark.parametrize(("depth", "correct"), [(20, 4594)])
def test_pretrained_resnets_reach_their_known_accuracy(depth, correct):
    """92.19 % of 4,983 images; one image more or less may flip between machines."""
    model = build(f"resnet{depth}", weights=_shared_data.resnet_weights(depth))
    images, labels = _shared_data.load_part("cifar10", "test_a", 32, 3)
    assert evaluate(model, images, labels)["accuracy"] * len(images) == pytest.approx(correct, abs=1)


@pytest.mark.parametrize("name", _shared_data.HANDS)
def test_digits_of_every_hand_come_at_one_size(name):
    train_x, train_y, test_x, test_y = _shared_data.digits_as(name, 28, 1)
    assert train_x.shape[1:] == test_x.shape[1:] == (1, 28, 28)
    assert train_x.dtype == test_x.dtype == torch.uint8
    assert set(train_y.tolist()) == set(test_y.tolist()) == set(range(10))


def test_pacs_leaves_one_style_out():
    data = _shared_data.pacs("sketch", side=32)
    assert data.shape == (3, 32, 32)
    assert len(data.shifted_x) == 2946
    assert len(data.train_x) + len(data.val_x) + len(data.test_x) == 1252 + 1536 + 1758
    light = [(part.float().mean() / 255).item() for part in (data.shifted_x, data.train_x)]
    assert light[0] > 0.9 > light[1]  # sketches are lines on white
