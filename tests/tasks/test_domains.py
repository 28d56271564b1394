"""Domains: what is left out is seen by its own shift alone; every source of them; errors by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmith.errors import DataError
from bitsmith.tasks import Data, load
from bitsmith.tasks.convert import LUMA, fitted, like
from bitsmith.tasks.domains import DomainData, leave_one_out

# Every domain has its own range of grey, so that a pixel tells where an image is from.
DOMAINS = {"photo": 0, "sketch": 80, "cartoon": 160}


def arrays(name, count=40, classes=4, side=6, channels=1):
    draw = np.random.default_rng(DOMAINS[name])
    images = draw.integers(DOMAINS[name], DOMAINS[name] + 80, (count, channels, side, side), dtype=np.uint8)
    return images, np.arange(count) % classes


def made(leave_out="sketch", seed=0, **changes):
    domains = {name: tuple(map(torch.from_numpy, arrays(name))) for name in DOMAINS} | changes
    return leave_one_out(domains, leave_out, tuple("abcd"), "three", seed=seed)


def origins(images):
    return {list(DOMAINS)[int(value) // 80] for value in images.flatten(1)[:, 0]}


@pytest.mark.parametrize("leave_out", sorted(DOMAINS))
def test_the_left_out_domain_is_in_no_split_and_whole_in_its_shift(leave_out):
    data = made(leave_out)
    for split in ("train", "val", "test"):
        images, labels = data.split(split)
        assert origins(images) == set(DOMAINS) - {leave_out}
        assert set(labels.tolist()) == {0, 1, 2, 3}
    assert len(data.train_x) + len(data.val_x) + len(data.test_x) == 80
    (shift,) = (one for one in data.shifts() if one.suite == "domains")
    images, labels = shift.rows(1, 0, None)
    assert shift.name == f"domain {leave_out}"
    assert not shift.graded
    assert len(images) == len(labels) == 40
    assert origins((255 * images).round()) == {leave_out}


def test_what_is_chosen_on_validation_does_not_depend_on_the_left_out_domain():
    other = (torch.zeros(40, 1, 6, 6, dtype=torch.uint8), torch.arange(40) % 4)
    one, two = made(), made(sketch=other)
    for split in ("train", "val", "test"):
        for before, after in zip(one.split(split), two.split(split), strict=True):
            assert torch.equal(before, after)
    assert not torch.equal(one.shifted_x, two.shifted_x)


def write_folder(path: Path, name: str, classes=("cat", "dog"), mode="L") -> None:
    from PIL import Image

    for label, kind in enumerate(classes):
        (path / name / kind).mkdir(parents=True)
        for index in range(8):
            image = Image.new("L", (5 + label, 7), DOMAINS[name] + index).convert(mode)
            image.save(path / name / kind / f"{index}.png")


def test_domains_come_from_folders_of_folders_at_one_size(tmp_path):
    for name in ("photo", "sketch"):
        write_folder(tmp_path, name, mode="RGB" if name == "photo" else "L")
    data = load(f"domains:{tmp_path}", leave_out="sketch", size=[4, 6])
    assert isinstance(data, DomainData)
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 4, 6)  # grey ones among coloured ones
    assert data.shifted_x.shape == (16, 3, 4, 6)
    with pytest.raises(DataError, match="Give a size"):
        load(f"domains:{tmp_path}", leave_out="sketch")


def test_domains_come_from_one_archive_or_several(tmp_path):
    every = {name: arrays(name) for name in DOMAINS}
    np.savez(
        tmp_path / "one.npz",
        x=np.concatenate([x for x, _ in every.values()]),
        y=np.concatenate([y for _, y in every.values()]),
        domain=np.repeat(list(every), 40),
    )
    (tmp_path / "several").mkdir()
    for name, (x, y) in every.items():
        np.savez(
            tmp_path / "several" / f"{name}.npz", train_x=x[:30], train_y=y[:30], test_x=x[30:], test_y=y[30:]
        )
    one = load(f"domains:{tmp_path / 'one.npz'}", leave_out="photo")
    several = load(f"domains:{tmp_path / 'several'}", leave_out="photo")
    listed = load(
        "domains", path=[str(path) for path in sorted((tmp_path / "several").iterdir())], leave_out="photo"
    )
    for data in (one, several, listed):
        assert torch.equal(data.shifted_x, torch.from_numpy(every["photo"][0]))
        assert torch.equal(data.train_x, several.train_x)


@pytest.mark.parametrize(
    ("leave_out", "changes", "message"),
    [
        ("sketsh", {}, "no such domain to leave out; got sketsh, expected photo, sketch or cartoon. Did you"),
        ("photo", {"sketch": (torch.zeros(0, 1, 6, 6), torch.zeros(0).long())}, "this domain is empty"),
        ("photo", {"sketch": (torch.zeros(4, 1, 6, 6), torch.tensor([0, 1, 2, 2]))}, "classes of the"),
        ("photo", {"sketch": (torch.zeros(4, 1, 6, 7), torch.arange(4))}, "differ in image size"),
    ],
)  # fmt: skip
def test_domains_that_do_not_fit_are_named(leave_out, changes, message):
    with pytest.raises(DataError, match=message):
        made(leave_out, **changes)


def test_a_single_domain_and_folders_of_other_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="got 1 domain \\(photo\\), expected at least two"):
        leave_one_out({"photo": (torch.zeros(4, 1, 6, 6), torch.arange(4))}, "photo", "abcd", "one")
    write_folder(tmp_path, "photo")
    write_folder(tmp_path, "sketch", classes=("cat", "horse"))
    with pytest.raises(
        DataError, match="sketch: the classes of the domains differ; got cat, horse, expected"
    ):
        load(f"domains:{tmp_path}", leave_out="photo", size=6)
    np.savez(tmp_path / "bare.npz", x=np.zeros((4, 6, 6)), y=np.arange(4))
    with pytest.raises(DataError, match="array domain is missing"):
        load(f"domains:{tmp_path / 'bare.npz'}", leave_out="photo")


def test_images_of_another_set_are_made_as_large_and_as_coloured():
    grey, coloured = torch.rand(3, 1, 16, 16), torch.rand(3, 3, 8, 8)
    assert fitted(grey, (1, 16, 16)) is grey
    assert torch.allclose(fitted(grey, (1, 8, 8)).mean((2, 3)), grey.mean((2, 3)), atol=0.02)
    assert torch.equal(fitted(grey, (3, 16, 16))[:, 2], grey[:, 0])
    luma = (coloured * torch.tensor(LUMA).view(3, 1, 1)).sum(1)
    assert torch.allclose(fitted(coloured, (1, 8, 8))[:, 0], luma)
    assert fitted((255 * grey).byte(), (3, 4, 4)).dtype == torch.uint8
    with pytest.raises(DataError, match="these channels cannot be converted; got 2 channels"):
        fitted(torch.rand(1, 2, 4, 4), (3, 4, 4))


def labelled(classes, side=6):
    x, y = torch.rand(8, 1, side, side), torch.arange(8) % 2
    return Data(x, y, x[:0], y[:0], x, y, classes=classes)


def test_another_set_has_the_classes_of_the_run():
    own = labelled(("cat", "dog"))
    found = like(labelled(("0", "1"), side=9), own)
    assert found.shape == own.shape
    assert found.classes == own.classes
    with pytest.raises(DataError, match="the classes are not those of the run; got 2 \\(cat, cow\\)"):
        like(labelled(("cat", "cow")), own)
