import gc
import os
import tracemalloc
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401  registers how tensors travel to workers
from PIL import Image

from effnet_train.data.decode import decode
from effnet_train.data.sources import IMAGE_SUFFIXES, FolderSource, Subset, TorchvisionSource


def make(root, *paths):
    """Write files whose content is their own path."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(path))


def listing(source):
    """Return (path below the root, label) of every image, having read each."""
    found = []
    for index in range(len(source)):
        data, label = source.read(index)
        path = os.path.relpath(source.name(index), source.root)
        assert data == os.fsencode(path)
        found.append((path, label))
    return found


def test_classes_and_images_stand_in_sorted_order(tmp_path):
    make(tmp_path, "b/2.jpg", "b/10.jpg", "a/z.png", "a/B.png", "a/a.png", "10/x.jpg", "9/x.jpg", "B/x.jpg")
    source = FolderSource(tmp_path)
    assert source.classes == ("10", "9", "B", "a", "b")
    assert listing(source) == [
        ("10/x.jpg", 0),
        ("9/x.jpg", 1),
        ("B/x.jpg", 2),
        ("a/B.png", 3),
        ("a/a.png", 3),
        ("a/z.png", 3),
        ("b/10.jpg", 4),
        ("b/2.jpg", 4),
    ]
    assert len(source) == 8


def test_same_classes_and_files_as_torchvision(image_root):
    from torchvision.datasets import ImageFolder

    ours, theirs = FolderSource(image_root / "train"), ImageFolder(image_root / "train")
    assert list(ours.classes) == theirs.classes
    assert [(ours.name(i), ours.read(i)[1]) for i in range(len(ours))] == theirs.samples


def test_nested_folders_belong_to_their_class(tmp_path):
    make(tmp_path, "a/deep/er/2.jpg", "a/1.jpg", "a/odd.jpg/3.jpg", "b/x/1.jpg")
    assert listing(FolderSource(tmp_path)) == [
        ("a/1.jpg", 0),
        ("a/deep/er/2.jpg", 0),
        ("a/odd.jpg/3.jpg", 0),
        ("b/x/1.jpg", 1),
    ]


def test_hidden_and_other_files_are_left_out(tmp_path):
    make(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.DS_Store", "a/.thumbs/1.jpg", "a/Thumbs.db", "a/1.txt", "a/jpg")
    make(tmp_path, ".git/1.jpg", "1.jpg", "README.md")
    source = FolderSource(tmp_path)
    assert source.classes == ("a",)
    assert listing(source) == [("a/1.jpg", 0)]


def test_suffixes_of_any_case(tmp_path):
    names = [f"a/{number}{suffix}" for number, suffix in enumerate((*IMAGE_SUFFIXES, ".JPEG", ".Jpg", ".PNG"))]
    make(tmp_path, *names)
    assert sorted(path for path, _ in listing(FolderSource(tmp_path))) == sorted(names)


def test_names_in_any_script(tmp_path):
    make(tmp_path, "köln/straße.jpg", "猫/子 猫.jpg", "猫/🐈.jpg")
    source = FolderSource(tmp_path)
    assert source.classes == ("köln", "猫")
    assert [path for path, _ in listing(source)] == ["köln/straße.jpg", "猫/子 猫.jpg", "猫/🐈.jpg"]


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"a/caf\xe9.jpg")
    try:
        make(tmp_path, name, "a/b.jpg")
    except OSError as error:
        pytest.skip(f"this file system takes no such names: {error}")
    assert [path for path, _ in listing(FolderSource(tmp_path))] == ["a/b.jpg", name]


def test_links_to_folders_and_files(tmp_path):
    make(tmp_path / "store", "dogs/1.jpg", "cat.jpg")
    (tmp_path / "root/cat").mkdir(parents=True)
    (tmp_path / "root/dog").symlink_to(tmp_path / "store/dogs")
    (tmp_path / "root/cat/1.jpg").symlink_to(tmp_path / "store/cat.jpg")
    source = FolderSource(str(tmp_path / "root"))
    assert source.classes == ("cat", "dog")
    assert [source.read(i) for i in (0, 1)] == [(b"cat.jpg", 0), (b"dogs/1.jpg", 1)]


def test_link_in_a_circle_ends_in_an_error(tmp_path):
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        FolderSource(tmp_path)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"data folder {tmp_path}/none does not exist: set data.root"):
        FolderSource(tmp_path / "none")


@pytest.mark.parametrize("paths", [(), ("1.jpg",), (".hidden/1.jpg",)])
def test_root_without_classes(tmp_path, paths):
    make(tmp_path, *paths)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no class folders: it should hold <class>/<image>"):
        FolderSource(tmp_path)


def test_imagenets_validation_images_without_class_folders(tmp_path):
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no class folders: .* without their classes: effnet-data prepare"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("paths", [(), ("bee/notes.txt",), ("bee/.1.jpg",)])
def test_class_without_images_is_named(tmp_path, paths):
    make(tmp_path, "ant/1.jpg", "cow/1.jpg", *paths)
    (tmp_path / "bee").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=rf"class folder {tmp_path}/bee holds no image .*: remove it, or add"):
        FolderSource(tmp_path)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Return a folder of 5,000 empty files."""
    root = tmp_path_factory.mktemp("many")
    for name in range(5):
        folder = root / f"class{name:02d}"
        folder.mkdir()
        for number in range(1000):
            os.close(os.open(folder / f"image_{number:08d}.jpg", os.O_CREAT))
    return root


def test_paths_cost_what_their_letters_cost(many):
    letters = 5_000 * len("class00/image_00000000.jpg")
    gc.collect()
    tracemalloc.start()
    source = FolderSource(many)
    used = [trace.size for trace in tracemalloc.take_snapshot().traces]
    tracemalloc.stop()
    assert len(source) == 5_000
    # A handful of buffers: not an object for each path.
    assert len(used) < 500
    # Letters (the buffer grows by an eighth ahead), the ends and labels, and a little.
    assert sum(used) < letters * 1.25 + 5_000 * 12 + 50_000


def test_workers_share_the_names(many):
    source = FolderSource(many)
    try:
        sent = ForkingPickler.dumps(Subset(source, np.arange(0, 5_000, 2)))
    finally:
        resource_sharer.stop(timeout=5)
    assert len(sent) < 5_000


class Pictures:
    """Stand in for a class of torchvision.datasets."""

    classes = (("tench", "Tinca tinca"), "English springer", 7)

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        value = self.first + index
        return Image.new("L", (2, 2), value), np.int64(value % 3)


def test_splits_follow_one_another():
    source = TorchvisionSource([Pictures(0, 4), Pictures(10, 0), Pictures(20, 1), Pictures(30, 2)])
    assert source.classes == ("tench", "English springer", "7")
    assert len(source) == 7
    found = [source.read(index) for index in range(7)]
    assert [np.array(decode(image))[0, 0].tolist() for image, _ in found] == [[v] * 3 for v in (0, 1, 2, 3, 20, 30, 31)]
    assert [label for _, label in found] == [0, 1, 2, 0, 2, 0, 1]
    assert {type(label) for _, label in found} == {int}
    assert [source.name(index) for index in (0, 3, 4, 6)] == [
        "Pictures[0][0]",
        "Pictures[0][3]",
        "Pictures[2][0]",
        "Pictures[3][1]",
    ]


def test_subset_takes_its_images_in_its_order(tmp_path):
    make(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    source = FolderSource(tmp_path)
    subset = Subset(source, np.array([3, 0]))
    assert len(subset) == 2
    assert subset.classes == ("a", "b")
    assert [subset.read(i) for i in (0, 1)] == [(b"b/2.jpg", 1), (b"a/1.jpg", 0)]
    assert [subset.name(i) for i in (0, 1)] == [str(tmp_path / "b/2.jpg"), str(tmp_path / "a/1.jpg")]
    # A part of a part.
    assert Subset(subset, np.array([1])).read(0) == (b"a/1.jpg", 0)
