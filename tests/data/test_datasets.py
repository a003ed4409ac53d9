import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from effnet_train.data import datasets
from effnet_train.data.datasets import assemble, birdsnap, digits, image_folders
from effnet_train.data.decode import decode
from effnet_train.data.preprocess import Preprocess

CONFIGS = Path(__file__).parents[2] / "configs/data"
PREPROCESS = Preprocess(16)


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_folders(image_root):
    data = image_folders(str(image_root), preprocess=PREPROCESS)
    assert data.classes == ("ant", "bee", "cow")
    assert (len(data.train), len(data.val), data.test, data.on_error) == (18, 12, None, "raise")
    assert data.train.name(0) == str(image_root / "train/ant/a.jpg")
    assert data.val.name(0) == str(image_root / "val/ant/a.jpg")
    assert data.preprocess == PREPROCESS


def test_folders_of_other_names(image_root):
    (image_root / "train").rename(image_root / "fit")
    data = image_folders(str(image_root), preprocess=PREPROCESS, train="fit", val="val")
    assert data.train.name(0) == str(image_root / "fit/ant/a.jpg")


def test_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"data.root={tmp_path}/no does not exist: set it to .* train/ and val/"
    ):
        image_folders(str(tmp_path / "no"), preprocess=PREPROCESS)
    with pytest.raises(FileNotFoundError, match=rf"data.root={tmp_path} has no folder data.train=train: set "):
        image_folders(str(tmp_path), preprocess=PREPROCESS)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no folder data.val=valid: .*, or data.val to another name"):
        image_folders(str(tmp_path), val="valid", preprocess=PREPROCESS)


def test_train_and_val_must_have_the_same_classes(image_root):
    (image_root / "val/bee").rename(image_root / "val/wasp")
    message = r"train has 3 classes and val 3, .* only in train \['bee'\], only in val \['wasp'\]; the class folders"
    with pytest.raises(ValueError, match=message):
        image_folders(str(image_root), preprocess=PREPROCESS)


@pytest.mark.parametrize("on_error", ["ignore", "Skip", ""])
def test_unknown_treatment_of_errors(image_root, on_error):
    with pytest.raises(ValueError, match=rf"data.on_error={on_error} is not known: use one of raise, skip"):
        image_folders(str(image_root), preprocess=PREPROCESS, on_error=on_error)


def test_expected_counts(image_root):
    image_folders(str(image_root), preprocess=PREPROCESS, expected={"classes": 3, "train": 18, "val": 12})
    message = r"is not complete \(train: 1281167 expected, 18 found, val: 13 expected, 12 found\): mend it, or set "
    with pytest.raises(ValueError, match=rf"data.root={image_root} {message}data.expected=null"):
        image_folders(str(image_root), preprocess=PREPROCESS, expected={"classes": 3, "train": 1281167, "val": 13})


@pytest.mark.parametrize("minival", [1, 5, 17])
def test_minival_is_held_out_of_training(image_root, minival):
    whole = image_folders(str(image_root), preprocess=PREPROCESS)
    data = image_folders(str(image_root), preprocess=PREPROCESS, minival=minival)
    train, val = names(data.train), names(data.val)
    assert len(val) == minival
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(names(whole.train))
    # Selection is by training images: the validation set is touched once, at the end.
    assert names(data.test) == names(whole.val)
    assert data.classes == whole.classes


def test_minival_is_the_same_every_time_and_has_no_bias(tmp_path):
    class Many:
        classes = ("a", "b")

        def __len__(self):
            return 20_000

        def read(self, index):
            return b"", index

        def name(self, index):
            return str(index)

    def split():
        data = assemble("many", Many(), Many(), preprocess=PREPROCESS, minival=2000, on_error="raise")
        return [data.val.read(index)[1] for index in range(2000)]

    np.random.seed(1)
    first = split()
    np.random.seed(2)
    assert split() == first
    # A tenth of every tenth, give or take: hypergeometric, with a deviation of 12.7.
    counts = np.histogram(first, bins=10, range=(0, 20_000))[0]
    assert (np.abs(counts - 200) < 55).all()


@pytest.mark.parametrize("minival", [-1, 18, 25022])
def test_minival_out_of_range(image_root, minival):
    with pytest.raises(ValueError, match=rf"data.minival={minival} must be less than the 18 training images"):
        image_folders(str(image_root), preprocess=PREPROCESS, minival=minival)


# --- the embedded digits ---


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parent") / "below" / "digits"
    digits(str(root), preprocess=PREPROCESS)
    return root


def test_digits(digits_root):
    expected = yaml.safe_load((CONFIGS / "digits.yaml").read_text())["expected"]
    data = digits(str(digits_root), preprocess=PREPROCESS, expected=expected)
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.val)) == (1433, 364)
    # Nothing unfinished lies beside it.
    assert [path.name for path in digits_root.parent.iterdir()] == ["digits"]


def test_digits_are_scikit_learns(digits_root):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = digits(str(digits_root), preprocess=PREPROCESS)
    found = {}
    for source in (data.train, data.val):
        for index in range(len(source)):
            encoded, label = source.read(index)
            found[int(Path(source.name(index)).stem)] = (np.array(decode(encoded)), label)
    assert sorted(found) == list(range(1797))
    for index, (pixels, label) in found.items():
        assert label == labels[index]
        # Sixteen levels become 255.
        assert np.abs(pixels - images[index].reshape(8, 8, 1) * 255 / 16).max() <= 0.5


def test_digits_are_split_alike_in_every_class(digits_root):
    data = digits(str(digits_root), preprocess=PREPROCESS)
    train, val = (np.bincount([s.read(i)[1] for i in range(len(s))]) for s in (data.train, data.val))
    assert (np.abs(val / (train + val) - 0.2) < 0.005).all()


def test_digits_are_written_once(digits_root, monkeypatch):
    def write(_):
        raise AssertionError("written again")

    monkeypatch.setattr(datasets, "_write_digits", write)
    times = {path: path.stat().st_mtime_ns for path in digits_root.rglob("*")}
    digits(str(digits_root), preprocess=PREPROCESS)
    assert {path: path.stat().st_mtime_ns for path in digits_root.rglob("*")} == times


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_digits_leave_nothing(tmp_path, monkeypatch, error):
    save, count = Image.Image.save, iter(range(1000))

    def interrupted(*arguments):
        if next(count) == 100:
            raise error("No space left on device")
        save(*arguments)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(error):
        digits(str(tmp_path / "digits"), preprocess=PREPROCESS)
    assert list(tmp_path.iterdir()) == []


def test_digits_that_another_run_wrote_meanwhile_are_taken(tmp_path, monkeypatch):
    rename, root = Path.rename, tmp_path / "digits"

    def late(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        datasets._write_digits(root)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert len(digits(str(root), preprocess=PREPROCESS).train) == 1433
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"data=digits needs scikit-learn, .*: pip install 'effnet-train\[digits\]'"):
        digits(str(tmp_path / "digits"), preprocess=PREPROCESS)
    assert list(tmp_path.iterdir()) == []


def test_one_class_is_nothing_to_learn(image_root):
    for name in ("bee", "cow"):
        for split in ("train", "val"):
            shutil.rmtree(image_root / split / name)
    with pytest.raises(ValueError, match="there is one class, 'ant': to tell classes apart"):
        image_folders(str(image_root), preprocess=PREPROCESS)


def test_birdsnap_says_where_it_is_from_and_counts(image_root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Birdsnap is not downloaded .* https://thomasberg.org"):
        birdsnap(str(tmp_path / "nowhere"), preprocess=PREPROCESS)
    (image_root / "val").rename(image_root / "test")
    assert len(birdsnap(str(image_root), preprocess=PREPROCESS).val) == 12
    with pytest.raises(ValueError, match="classes: 500 expected, 3 found, train: 47386 expected, 18 found"):
        birdsnap(str(image_root), preprocess=PREPROCESS, expected={"classes": 500, "train": 47386})
