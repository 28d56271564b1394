"""Data sets: splits are right, equal seeds give equal data, and every malformation is one clear line."""

import sys

import numpy as np
import pytest
import torch

from bitsmith.errors import DataError, MissingExtra
from bitsmith.tasks import Data, load, to_float
from bitsmith.tasks.dataset import hold_out


def arrays(**changes):
    """A valid set of 3 classes of 6x6 grey images, with changes; None drops an array."""
    rng = np.random.default_rng(0)
    valid = {
        "train_x": rng.random((48, 6, 6), dtype=np.float32),
        "train_y": np.arange(48) % 3,
        "test_x": rng.random((9, 6, 6), dtype=np.float32),
        "test_y": np.arange(9) % 3,
    }
    return {name: array for name, array in {**valid, **changes}.items() if array is not None}


@pytest.fixture
def npz(tmp_path):
    def write(**changes):
        path = tmp_path / "set.npz"
        np.savez(path, **arrays(**changes))
        return f"npz:{path}"

    return write


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image

    def write(layout, mode="RGB", size=(7, 5)):
        rng = np.random.default_rng(0)
        for folder, count in layout.items():
            (tmp_path / folder).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(tmp_path / folder / f"{index}.png")
        return tmp_path

    return write


def test_digits_are_the_known_1797_images_in_unit_range():
    data = load("digits")
    assert [len(part) for part in (data.train_x, data.val_x, data.test_x)] == [1258, 179, 360]
    assert data.shape == (1, 8, 8)
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1
    assert data.classes == tuple("0123456789")


def test_the_five_folds_of_digits_test_every_image_once():
    tests = torch.cat([load("digits", seed=3, fold=fold).test_x for fold in range(5)])
    whole = load("digits")
    everything = torch.cat([whole.train_x, whole.val_x, whole.test_x])
    assert torch.equal(tests.flatten(1).sum(1).sort().values, everything.flatten(1).sum(1).sort().values)


def test_splits_depend_on_the_seed_alone():
    first, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(first.train_x, again.train_x)
    assert torch.equal(first.val_y, again.val_y)
    assert not torch.equal(first.test_y, other.test_y)


def test_digits_without_a_validation_part_keep_all_training_images():
    data = load("digits", validation=0)
    assert len(data.train_x) == 1437
    assert len(data.val_x) == 0


def test_a_fold_that_does_not_exist_is_named():
    with pytest.raises(DataError, match="no such fold; got 5, expected 0 to 4"):
        load("digits", fold=5)


@pytest.mark.parametrize("share", [0.1, 0.125, 0.5])
def test_held_out_rows_are_a_stratified_partition(share):
    labels = torch.arange(1000) % 7
    kept, held = hold_out(labels, share, seed=0, where="test")
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1000))
    expected = labels.bincount() * share
    assert (labels[held].bincount() - expected).abs().max() <= 1


def test_npz_arrays_become_channels_first_and_keep_their_range(npz):
    grey = load(npz())
    assert grey.shape == (1, 6, 6)
    coloured = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3))
    data = load(npz(train_x=np.repeat(coloured, 6, 0)[:48], test_x=coloured))
    assert data.shape == (3, 6, 6)
    assert data.test_x.dtype == torch.uint8
    assert torch.equal(data.test_x, torch.from_numpy(coloured.transpose(0, 3, 1, 2)).byte())


def test_npz_validation_arrays_are_used_where_they_are(npz):
    source = arrays()
    data = load(npz(val_x=source["test_x"] / 2, val_y=source["test_y"]))
    assert len(data.train_x) == 48
    assert torch.equal(data.val_x * 2, data.test_x)


def test_npz_class_names_are_read(npz):
    assert load(npz(classes=np.array(["cat", "dog", "owl"]))).classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": None, "train_images": np.zeros(1)}, "array train_x is missing.*Did you mean '?train_"),
        ({"test_y": None}, "array test_y is missing"),
        ({"val_x": np.zeros((2, 6, 6))}, "val_x and val_y go together"),
        ({"train_y": np.arange(47) % 3}, "train_y: labels and images differ in number; got 47, expected 48"),
        ({"test_y": np.arange(8) % 3}, "test_y: labels and images differ in number; got 8, expected 9"),
        ({"test_y": np.full(9, 3)}, "test_y: a label is out of range; got 3 in row 0, expected 0 to 2"),
        ({"train_y": np.arange(48) % 3 - 1}, "a label is out of range; got -1 in row"),
        ({"train_y": np.arange(48) / 3}, "labels are not integers; got dtype float64"),
        ({"train_y": np.arange(96).reshape(48, 2)}, "labels have the wrong form"),
        ({"test_x": np.full((9, 6, 6), np.nan)}, "test_x: there are NaN.*values; got the first in image 0"),
        ({"test_x": np.full((9, 6, 6), 300)}, "integer images are out of range; got 300 to 300"),
        ({"test_x": np.zeros((9, 36))}, r"wrong number of dimensions; got shape \(9, 36\)"),
        ({"test_x": np.zeros((9, 5, 5))}, "the splits differ in image size"),
        ({"test_x": np.zeros((0, 6, 6)), "test_y": np.zeros(0, int)}, "there are no images"),
        ({"train_x": np.zeros((0, 6, 6)), "train_y": np.zeros(0, int)}, "there are no images"),
        ({"test_x": np.full((9, 6, 6), "a")}, "these are no images"),
    ],
)  # fmt: skip
def test_malformed_arrays_are_one_clear_line(npz, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        load(npz(**changes))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_foreign_file_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        load(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load(f"npz:{tmp_path / 'text.npz'}")
    np.savez(tmp_path / "whole.npz", **arrays())
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load(f"npz:{tmp_path / 'half.npz'}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load(f"npz:{tmp_path / 'single.npy'}")


def test_pickled_arrays_are_refused_instead_of_run(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(train_x=np.array([{}], dtype=object)))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load(f"npz:{tmp_path / 'set.npz'}")


def test_a_folder_of_class_folders_is_split_by_class(image_folder):
    data = load(f"folder:{image_folder({'cat': 20, 'dog': 20})}")
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 5, 7)
    assert torch.equal(data.test_y.bincount(), torch.tensor([4, 4]))
    assert len(data.train_x) + len(data.val_x) == 32


def test_pixels_of_a_folder_are_those_of_the_files(image_folder):
    from PIL import Image

    path = image_folder({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    data = load(f"folder:{path}", validation=0)
    expected = np.asarray(Image.open(path / "test" / "b" / "0.png")).transpose(2, 0, 1)
    assert torch.equal(data.test_x[1], torch.tensor(expected))
    assert data.test_y.tolist() == [0, 1]


def test_grey_images_have_one_channel_and_size_resizes(image_folder):
    data = load(f"folder:{image_folder({'a': 9, 'b': 9}, mode='L')}", size=[4, 8], augment="crop_and_flip")
    assert data.shape == (1, 4, 8)
    assert data.augment is not None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"cat": 3, "dog": 0}, "dog: this class folder holds no images"),
        ({"cat": 3}, "too few class folders; got cat"),
        ({"train/cat": 3, "train/dog": 3}, "there is a folder train/ but no folder test/"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 3}, "test.dog: this class folder holds no images"),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 3, "test/dogs": 3},
            "class 'dogs' does not occur in the training part. Did you mean 'dog'",
        ),
    ],
)
def test_malformed_folders_are_one_clear_line(image_folder, layout, message):
    with pytest.raises(DataError, match=message):
        load(f"folder:{image_folder(layout)}")


def test_image_files_that_differ_in_size_or_are_broken_are_named(image_folder):
    from PIL import Image

    path = image_folder({"a": 2, "b": 2})
    Image.new("RGB", (3, 3)).save(path / "b" / "9.png")
    with pytest.raises(DataError, match=r"9.png: images differ in size.*got \(3, 3\).*Give a size"):
        load(f"folder:{path}")
    (path / "b" / "9.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"9\.png: this image cannot be read"):
        load(f"folder:{path}")


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load(f"folder:{tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data 'digit'.*Did you mean 'digits'"),
        ("digits:5", "not a data factory|module digits cannot|unknown data"),
        ("npz", "unknown data 'npz'.*npz:PATH"),
        ("hf:some/name", "unknown data"),
        ("no_such_module:make", "module no_such_module cannot be imported.*No module named"),
        ("collections:ordered_dict", "module collections has no 'ordered_dict'"),
        ("string:digits", "the factory cannot be called; got a str"),
        ("builtins:dict", "the factory returned something else; got dict"),
    ],
)
def test_a_wrong_spec_is_one_clear_line(spec, message):
    with pytest.raises(DataError, match=message):
        load(spec)


def test_unknown_arguments_and_augmentations_have_nearest_names(npz):
    with pytest.raises(DataError, match=r"unknown argument 'folds'\. Did you mean 'fold'"):
        load("digits", folds=1)
    with pytest.raises(DataError, match=r"unknown augmentation 'crop_flip'\. Did you mean 'crop_and_flip'"):
        load(npz(), augment="crop_flip")


def test_a_users_factory_in_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_images.py").write_text(
        "import torch\n"
        "from bitsmith.tasks import Data\n"
        "def make(seed, count=4):\n"
        "    x, y = torch.full((count, 1, 2, 2), float(seed)), torch.arange(count) % 2\n"
        "    return Data(x, y, x, y, x, y, classes=('a', 'b'))\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    data = load("my_own_images:make", seed=7, count=6)
    assert sys.path == before
    assert data.train_x.shape == (6, 1, 2, 2)
    assert data.train_x.max() == 7
    with pytest.raises(DataError, match=r"unknown argument 'counts'\. Did you mean 'count'"):
        load("my_own_images:make", counts=6)


@pytest.mark.parametrize(
    ("module", "spec", "package"), [("sklearn", "digits", "scikit-learn"), ("PIL", "folder", "pillow")]
)
def test_an_extra_that_is_not_installed_is_named(monkeypatch, image_folder, module, spec, package):
    where = f"folder:{image_folder({'a': 2, 'b': 2})}" if spec == "folder" else spec
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"{package}.*pip install 'bitsmith\[vision\]'"):
        load(where)


def test_batches_in_stored_order_cover_the_split():
    data = load("digits")
    batches = list(data.batches("test", 100))
    assert [len(y) for _, y in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.test_x)


def test_shuffled_batches_repeat_for_equal_generators_and_keep_pairs_together():
    data = load("digits").limited(200)

    def draw(seed):
        pairs = list(data.batches("train", 64, torch.Generator().manual_seed(seed)))
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

    x, y = draw(0)
    assert torch.equal(x, draw(0)[0])
    assert not torch.equal(x, draw(1)[0])
    labels = {
        image.numpy().tobytes(): int(label) for image, label in zip(data.train_x, data.train_y, strict=True)
    }
    assert all(labels[image.numpy().tobytes()] == int(label) for image, label in zip(x, y, strict=True))


def test_only_shuffled_training_batches_are_augmented():
    x = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    y = torch.arange(4) % 2
    data = Data(x, y, x, y, x, y, classes=("a", "b"), augment=lambda images, generator: images + 1)
    generator = torch.Generator().manual_seed(0)
    assert all(batch.min() == 1 for batch, _ in data.batches("train", 2, generator))
    assert all(batch.max() == 0 for batch, _ in data.batches("train", 2))
    assert all(batch.max() == 0 for batch, _ in data.batches("val", 2, generator))


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match=r"no split 'valid'\. Did you mean 'val'"):
        load("digits").split("valid")


def test_uint8_images_are_read_as_fractions_of_255():
    assert torch.equal(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))
