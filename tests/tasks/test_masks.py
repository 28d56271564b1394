"""Images with masks: what is checked, scenes of digits, folders, and augmentation of both alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks import MaskData, build, load
from bitsmith.tasks.augment import shift, shift_and_flip
from bitsmith.tasks.data import digits
from bitsmith.tasks.shifts import shifted
from bitsmith.tasks.suites import chosen, figures, measure_shifts
from bitsmith.train.batches import Batches
from bitsmith.train.distillation import IGNORED


def data(
    images: Tensor | None = None, masks: Tensor | None = None, classes: int = 3, **more: Any
) -> MaskData:
    x = torch.rand(4, 1, 8, 8) if images is None else images
    y = torch.arange(3).repeat(86)[: 4 * 64].view(4, 8, 8) if masks is None else masks
    return MaskData(x, y, x[:0], y[:0], x, y, tuple(map(str, range(classes))), **more)


# ---- checks


def masks_with(value: int) -> Tensor:
    masks = torch.zeros(4, 8, 8, dtype=torch.int64)
    masks[2, 1, 1] = value
    return masks


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(4, 8, 8), r"masks have the wrong form; got torch.float32"),
        (torch.zeros(4, 8, 9, dtype=torch.int64), r"expected int64 of shape \(4, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"got torch.int64 of shape \(3, 8, 8\)"),
        (masks_with(3), r"a label is out of range; got 3 in mask 2, expected 0 to 2"),
        (masks_with(-1), r"a label is out of range; got -1 in mask 2"),
        (torch.full((4, 8, 8), IGNORED), "a mask has no pixel with a label; got none in mask 0"),
    ],
)
def test_masks_that_are_amiss_are_refused(masks: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(masks=masks)


def test_pixels_may_be_ignored() -> None:
    assert int((data(masks=masks_with(IGNORED)).train_y == IGNORED).sum()) == 1


def test_a_model_of_another_form_is_refused_before_it_is_trained() -> None:
    scenes = load("digit_scenes", train=2, validation=1, test=1)
    scenes.check(build("unet", width=2), 8)
    with pytest.raises(DataError, match=r"got outputs of shape \(1, 10\), expected \(1, 11, 24, 24\)"):
        scenes.check(build("digits_cnn"), 8)
    with pytest.raises(DataError, match=r"got outputs of shape \(1, 10, 24, 24\)"):
        scenes.check(build("unet", width=2, classes=10), 8)


def test_shifts_leave_every_pixel_where_it_is() -> None:
    found, model = data(), nn.Conv2d(1, 3, 1)
    assert [shift.name for shift in chosen(found, "default")] == ["noise", "blur", "contrast"]
    assert not {"rotation", "translation", "shear", "elastic"} & {shift.name for shift in found.shifts()}
    measured = figures(measure_shifts({"it": model}, found, chosen(found, "contrast")), "it", "mean_iou")
    by_hand = [
        found.evaluate(model, shifted("contrast", found.test_x, severity), found.test_y)["mean_iou"]
        for severity in (1, 3, 5)
    ]
    assert measured["contrast"] == pytest.approx(sum(by_hand) / 3)


# ---- scenes


def test_scenes_are_the_same_for_the_same_seed() -> None:
    one, two, other = (load("digit_scenes", seed=s, train=6, validation=2, test=3) for s in (0, 0, 1))
    assert isinstance(one, MaskData)
    assert torch.equal(one.train_x, two.train_x)
    assert torch.equal(one.test_y, two.test_y)
    assert not torch.equal(one.train_x, other.train_x)
    assert one.train_x.shape == (6, 1, 24, 24)
    assert (len(one.val_x), len(one.test_x)) == (2, 3)
    assert one.classes == ("background", *"0123456789")


def test_a_scene_holds_real_digits_of_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one digit alone in a split, every scene of that split is made of it."""
    from bitsmith.tasks import scenes

    real = digits()
    one = {
        name: int((real.split(name)[1] == label).nonzero()[0])
        for name, label in zip(("train", "test"), (3, 7), strict=True)
    }
    cut = {
        f"{name}_{part}": getattr(real, f"{name}_{part}")[row : row + 1]
        for name, row in one.items()
        for part in "xy"
    }
    from dataclasses import replace

    made = scenes.compose(
        replace(real, **cut, val_x=real.val_x[:1], val_y=real.val_y[:1]),
        {"train": 5, "val": 0, "test": 5},
        24,
        0,
    )
    assert set(made.train_y.unique().tolist()) == {0, 4}
    assert set(made.test_y.unique().tolist()) == {0, 8}
    share = (made.train_y > 0).float().mean((1, 2))
    assert share.min() > 0.05
    ink = made.train_x.float().squeeze(1)
    assert ink[made.train_y > 0].mean() > 1.5 * ink[made.train_y == 0].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "data digit_scenes: size: this size of scenes is impossible; got 8"),
        ({"train": 0}, "data digit_scenes: train: this is no number of scenes; got 0"),
        ({"augment": "shft"}, "unknown augmentation 'shft'. Did you mean 'shift'"),
    ],
)
def test_impossible_scenes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("digit_scenes", **arguments)


# ---- folders


def write(folder: Path, count: int = 10, size: tuple[int, int] = (6, 8), palette: bool = False) -> Path:
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        labels = generator.integers(0, 3, size, dtype=np.uint8)
        labels[0, 0] = 255
        Image.fromarray(labels * 80).save(folder / "images" / f"{n:02d}.jpg")
        mask = Image.fromarray(labels)
        if palette:
            mask = mask.convert("P")
            mask.putdata(labels.reshape(-1).tolist())
        mask.save(folder / "masks" / f"{n:02d}.png")
    return folder


@pytest.mark.parametrize("palette", [False, True])
def test_a_folder_is_read_split_and_ignores_what_it_should(palette: bool, tmp_path: Path) -> None:
    found = load(f"masks:{write(tmp_path / 'set', palette=palette)}", validation=0.25)
    assert isinstance(found, MaskData)
    assert [len(found.split(name)[0]) for name in ("train", "val", "test")] == [6, 2, 2]
    assert found.classes == ("0", "1", "2")
    assert found.train_x.shape[1:] == (1, 6, 8)
    for name in ("train", "val", "test"):
        images, masks = found.split(name)
        assert bool((masks[:, 0, 0] == IGNORED).all())
        # The picture was painted from its mask: they were not mixed up.
        painted, kept = (masks * 80).float(), masks != IGNORED
        assert (images.squeeze(1).float() - painted)[kept].abs().mean() < 60


def test_parts_of_their_own_and_a_size(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        write(tmp_path / part, count)
    found = load(f"masks:{tmp_path}", classes=["a", "b", "c", "d"], size=4, augment="shift")
    assert [len(found.split(name)[0]) for name in ("train", "val", "test")] == [5, 2, 3]
    assert found.train_y.shape == (5, 4, 4)
    assert found.augment_both is shift
    assert found.classes == ("a", "b", "c", "d")  # type: ignore[attr-defined]


def spoil(folder: Path, what: str) -> None:
    mask = folder / "masks" / "03.png"
    if what == "no mask":
        mask.unlink()
    if what == "no image":
        (folder / "images" / "03.jpg").unlink()
    if what == "mask of another size":
        Image.fromarray(np.zeros((6, 9), np.uint8)).save(mask)
    if what == "label":
        Image.fromarray(np.full((6, 8), 7, np.uint8)).save(mask)
    if what == "colours":
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(mask)
    if what == "empty":
        for file in (folder / "images").iterdir():
            file.unlink()
    if what == "no masks folder":
        (folder / "masks").rename(folder / "labels")
    if what == "sizes":
        for file in ((folder / "images" / "03.jpg"), mask):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(file)
    if what == "damaged":
        mask.write_bytes(b"no png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", r"images/03\.jpg: this image has no mask; expected .*masks/03\.png"),
        ("no image", r"masks/03\.png: this mask has no image"),
        (
            "mask of another size",
            r"masks/03\.png: this mask has another size than its image; got 9 x 6 pixels, expected 8 x 6",
        ),
        ("label", r"masks/03\.png: a mask holds an unknown label; got 7 at row 0, column 0, expected 0 to 2"),
        ("colours", r"masks/03\.png: this mask has no label per pixel; got an image of mode RGB"),
        ("empty", r"images: this folder holds no images"),
        ("no masks folder", r"there is no folder masks/"),
        ("sizes", r"images differ in size .*got \(4, 4\), expected \(6, 8\)"),
        ("damaged", r"masks/03\.png: this image cannot be read"),
    ],
)
def test_a_spoilt_folder_is_told_apart(what: str, message: str, tmp_path: Path) -> None:
    spoil(write(tmp_path), what)
    with pytest.raises(DataError, match=message):
        load(f"masks:{tmp_path}", classes=3)


def test_no_folder_and_no_test_part(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load(f"masks:{tmp_path / 'nothing'}")
    write(tmp_path / "train")
    with pytest.raises(DataError, match="no folder test/"):
        load(f"masks:{tmp_path}")


# ---- augmentation


@pytest.mark.parametrize("augment", [shift, shift_and_flip])
def test_image_and_mask_move_alike(augment: Any) -> None:
    masks = torch.randint(1, 9, (20, 8, 6))
    images = masks.float().unsqueeze(1)
    moved, labels = augment(images, masks, torch.Generator().manual_seed(0))
    inside = labels != IGNORED
    assert torch.equal(moved.squeeze(1)[inside], labels[inside].float())
    assert bool((moved.squeeze(1)[~inside] == 0).all())
    assert bool((~inside).any())
    mirrored = sum(bool((a.diff(dim=1) != b.diff(dim=1)).any()) for a, b in zip(masks, labels, strict=True))
    assert mirrored > 0


def test_a_pair_whose_labels_would_all_be_lost_stays() -> None:
    masks = torch.full((200, 8, 8), IGNORED)
    masks[:, 0, 0] = 1
    images = torch.rand(200, 1, 8, 8)
    moved, labels = shift(images, masks, torch.Generator().manual_seed(0))
    assert bool((labels != IGNORED).any(2).any(1).all())
    stayed = (labels == masks).all(2).all(1)
    assert 0 < int(stayed.sum()) < 200
    assert torch.equal(moved[stayed], images[stayed])


def test_training_and_statistics_see_both_moved() -> None:
    found = data(augment_both=shift, masks=torch.randint(1, 3, (4, 8, 8)))
    images = found.train_y.float().unsqueeze(1) / 2
    batches = Batches(images, found.train_y, batch_size=4, augment_both=shift, seed=3)
    (part,), (again,) = batches.step(1), batches.step(1)
    assert torch.equal(part.x, again.x)
    assert torch.equal(part.y, again.y)
    inside = part.y != IGNORED
    assert not bool(inside.all())
    assert torch.equal(part.x.squeeze(1)[inside] * 2, part.y[inside].float())
    x, y = next(found.batches("train", 4, torch.Generator().manual_seed(0)))
    assert bool((y == IGNORED).any())
    assert x.shape == found.train_x.shape
