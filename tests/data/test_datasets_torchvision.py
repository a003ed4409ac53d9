"""The data sets that torchvision knows, from files made up in its layouts."""

import json
import pickle
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torchvision import datasets as tv

from effnet_train.data.datasets import torchvision_splits
from effnet_train.data.decode import decode
from effnet_train.data.preprocess import Preprocess

CONFIGS = Path(__file__).parents[2] / "configs/data"
PREPROCESS = Preprocess(16)
# The configurations of the data sets that torchvision knows: what they say, by name.
NAMED = {
    path.stem: config
    for path in sorted(CONFIGS.glob("*.yaml"))
    if (config := yaml.safe_load(path.read_text())).get("dataset", "???") != "???"
}


@pytest.fixture
def no_network(monkeypatch):
    """Make every download fail as it does where there is no network; return what was asked for."""
    asked = []

    def refuse(request, *_, **__):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def read_named(name, root, **arguments):
    config = {key: NAMED[name][key] for key in ("dataset", "train", "val")}
    return torchvision_splits(str(root), **config, preprocess=PREPROCESS, **arguments)


def jpeg(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, value, value)).save(path)


def labels_and_levels(source):
    """Return the label and the level of the first pixel of every image."""
    found = [source.read(index) for index in range(len(source))]
    return [(label, int(np.array(decode(image))[0, 0, 0])) for image, label in found]


def test_nine_data_sets_are_named():
    assert set(NAMED) == {
        "aircraft",
        "cars",
        "cifar10",
        "cifar100",
        "fashion_mnist",
        "flowers",
        "food101",
        "imagenette",
        "pets",
    }


@pytest.mark.parametrize("name", NAMED)
def test_splits_exist_in_torchvision(name, tmp_path):
    config = NAMED[name]
    kind = getattr(tv, config["dataset"])
    for split in (*config["train"], *config["val"]):
        # Right arguments are taken, and then the files are missed.
        with pytest.raises((RuntimeError, FileNotFoundError), match="not found"):
            kind(tmp_path, **split, download=False)
        if "split" in split:
            with pytest.raises(ValueError, match="Unknown value 'nonsense' for argument split"):
                kind(tmp_path, split="nonsense", download=False)


@pytest.mark.parametrize("name", NAMED)
def test_absent_files_and_no_network(name, tmp_path, no_network):
    root = tmp_path / "data"
    kind = NAMED[name]["dataset"]
    message = rf"data.root={root} does not hold {kind} \(.*\), and downloading it failed \(.*\): put the files of "
    with pytest.raises(FileNotFoundError, match=rf"{message}torchvision.datasets.{kind} under {root}, or run once"):
        read_named(name, root)
    # Nobody offers Stanford Cars any more.
    assert bool(no_network) == (name != "cars")


def test_a_relative_root_is_named_whole(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"URLError: .* under {tmp_path}/data/cifar, or run once"):
        read_named("cifar10", "data/cifar")


def test_download_errors_without_words(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(FileNotFoundError, match=r"downloading it failed \(TimeoutError: \)"):
        read_named("cifar10", tmp_path)


@pytest.mark.parametrize(("dataset", "hint"), [("CIFAR1O", "CIFAR10"), ("Food102", "Food101"), ("zzz", "CIFAR10")])
def test_unknown_data_set(tmp_path, dataset, hint):
    message = rf"data.dataset={dataset} is no class of torchvision.datasets: did you mean .*{hint}"
    with pytest.raises(ValueError, match=message):
        torchvision_splits(str(tmp_path), dataset=dataset, train=[{}], val=[{}], preprocess=PREPROCESS)


def test_unknown_split(tmp_path, no_network):
    with pytest.raises(ValueError, match="Unknown value 'training' for argument split"):
        torchvision_splits(
            str(tmp_path), dataset="Food101", train=[{"split": "training"}], val=[{}], preprocess=PREPROCESS
        )
    assert not no_network


def test_fashion_mnist(tmp_path, no_network):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        images = np.repeat(np.arange(count, dtype=np.uint8) * 10, 28 * 28).tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(range(count)))
    data = read_named("fashion_mnist", tmp_path, expected={"classes": 10, "train": 5, "val": 3})
    assert data.classes[0] == "T-shirt/top"
    assert labels_and_levels(data.train) == [(i, 10 * i) for i in range(5)]
    assert labels_and_levels(data.val) == [(i, 10 * i) for i in range(3)]
    assert not no_network

    data = read_named("fashion_mnist", tmp_path, minival=2)
    assert (len(data.train), len(data.val), len(data.test)) == (3, 2, 3)


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, kind, monkeypatch, no_network):
    # The files would be known by their sums.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    count, key, meta = (10, "labels", "label_names") if kind == "CIFAR10" else (100, "fine_labels", "fine_label_names")
    cls = getattr(tv, kind)
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    names = [f"class {number}" for number in range(count)]
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({meta: names}))
    for file, _ in (*cls.train_list, *cls.test_list):
        content = {"data": np.full((2, 3072), 7, dtype=np.uint8), key: [count - 1, 3]}
        (folder / file).write_bytes(pickle.dumps(content))
    data = read_named(kind.lower(), tmp_path)
    assert data.classes == tuple(names)
    assert labels_and_levels(data.train) == [(count - 1, 7), (3, 7)] * len(cls.train_list)
    assert labels_and_levels(data.val) == [(count - 1, 7), (3, 7)]


def test_imagenette(tmp_path, no_network):
    for split, count in (("train", 2), ("val", 1)):
        for label, synset in enumerate(("n01440764", "n02102040", "n02979186")):
            for number in range(count):
                jpeg(tmp_path / f"imagenette2/{split}/{synset}/{synset}_{number}.JPEG", 100 * label + number)
    data = read_named("imagenette", tmp_path)
    assert data.classes == ("tench", "English springer", "cassette player")
    assert labels_and_levels(data.train) == [(0, 0), (0, 1), (1, 100), (1, 101), (2, 200), (2, 201)]
    assert labels_and_levels(data.val) == [(0, 0), (1, 100), (2, 200)]


def test_food101(tmp_path, no_network):
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        listed = {"apple_pie": [f"apple_pie/{number}"], "beet_salad": [f"beet_salad/{number}"]}
        (base / f"meta/{split}.json").write_text(json.dumps(listed))
        for label, name in enumerate(listed):
            jpeg(base / f"images/{name}/{number}.jpg", 100 * label + number)
    data = read_named("food101", tmp_path)
    assert data.classes == ("apple_pie", "beet_salad")
    assert labels_and_levels(data.train) == [(0, 1), (1, 101)]
    assert labels_and_levels(data.val) == [(0, 2), (1, 102)]


def test_pets(tmp_path, no_network):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        lines = [f"Abyssinian_{number} 1 1 1", f"great_pyrenees_{number} 2 2 1"]
        (base / f"annotations/{split}.txt").write_text("\n".join(lines) + "\n")
        for label, line in enumerate(lines):
            jpeg(base / f"images/{line.split()[0]}.jpg", 100 * label + number)
    data = read_named("pets", tmp_path)
    assert data.classes == ("Abyssinian", "Great Pyrenees")
    assert labels_and_levels(data.train) == [(0, 1), (1, 101)]
    assert labels_and_levels(data.val) == [(0, 2), (1, 102)]


def test_aircraft(tmp_path, no_network):
    base = tmp_path / "fgvc-aircraft-2013b/data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nDC-3\n")
    for split, number in (("trainval", 1), ("test", 2)):
        (base / f"images_variant_{split}.txt").write_text(f"00{number} 707-320\n10{number} DC-3\n")
        for label in range(2):
            jpeg(base / f"images/{label}0{number}.jpg", 100 * label + number)
    data = read_named("aircraft", tmp_path)
    assert data.classes == ("707-320", "DC-3")
    assert labels_and_levels(data.train) == [(0, 1), (1, 101)]
    assert labels_and_levels(data.val) == [(0, 2), (1, 102)]


def test_flowers(tmp_path, monkeypatch, no_network):
    savemat = pytest.importorskip("scipy.io").savemat
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    base = tmp_path / "flowers-102"
    for number in range(1, 5):
        jpeg(base / f"jpg/image_{number:05d}.jpg", 10 * number)
    savemat(base / "imagelabels.mat", {"labels": [1, 102, 3, 4]})
    savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [4, 1], "tstid": [3, 4]})
    data = read_named("flowers", tmp_path)
    assert len(data.classes) == NAMED["flowers"]["expected"]["classes"] == 102
    # The training set is made of two splits.
    assert labels_and_levels(data.train) == [(0, 10), (101, 20), (3, 40), (0, 10)]
    assert labels_and_levels(data.val) == [(2, 30), (3, 40)]


def test_cars(tmp_path, no_network):
    savemat = pytest.importorskip("scipy.io").savemat
    base = tmp_path / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})
    for split, annotations in (("train", "devkit/cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        rows = np.array([("1.jpg", 1), ("2.jpg", 2)], dtype=[("fname", object), ("class", object)])
        savemat(base / f"{annotations}.mat", {"annotations": rows})
        for number in (1, 2):
            jpeg(base / f"cars_{split}/{number}.jpg", 10 * number)
    data = read_named("cars", tmp_path)
    assert data.classes == ("AM General Hummer", "Acura RL")
    assert labels_and_levels(data.train) == labels_and_levels(data.val) == [(0, 10), (1, 20)]
