"""Shards give the images that were put into them, wherever they lie, and say what is wrong with them."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from effnet_train.data import archives
from effnet_train.data.archives import shards, unlabelled
from effnet_train.data.loader import DataError, eval_batches
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.shard_layout import expand
from effnet_train.data.sources import Source

PREPROCESS = Preprocess(8)


def contents(source: Source) -> Counter[tuple[Any, str]]:
    """Count what a source holds: image and class name."""
    read = (source.read(index) for index in range(len(source)))
    return Counter((data, source.classes[label]) for data, label in read)


TRAIN = ((1, "ant"), (2, "bee"), (3, "bee"), (4, "ant"), (5, "ant"))


@pytest.mark.parametrize("train", ["train-*.tar", "train-{0000..0001}.tar", "train-000{0,1}.tar"])
def test_shards_in_a_folder(sharded: Path, tmp_path: Path, image: Callable[[int], bytes], train: str) -> None:
    data = shards(str(sharded), train=train, val="val-0000.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    assert data.classes == ("ant", "bee")
    assert contents(data.train) == Counter((image(n), name) for n, name in TRAIN)
    assert contents(data.val) == Counter({(image(6), "ant"): 1, (image(7), "bee"): 1})
    assert data.train.name(0) == f"{sharded}/train-0000.tar:a.b/0001.jpg"


def test_shards_and_folders_without_labels(sharded: Path, tmp_path: Path, image: Callable[[int], bytes]) -> None:
    options: dict[str, Any] = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    with tarfile.open(sharded / "bare.tar", "w") as file:
        for number in (8, 9):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(image(number))
            file.addfile(member, io.BytesIO(image(number)))
    data = unlabelled(str(sharded), shards="{train-*,bare}.tar", **options)
    found = [data.train.read(index) for index in range(len(data.train))]
    assert Counter(pixels for pixels, _ in found) == Counter(image(n) for n in (1, 2, 3, 4, 5, 8, 9))
    assert (data.classes, len(data.val)) == ((), 7)
    with pytest.raises(ValueError, match=r"bare\.tar: 2 images have no \.cls beside them"):
        shards(str(sharded), train="bare.tar", val="val-*.tar", **options)
    (tmp_path / "images" / "below").mkdir(parents=True)
    for number in (8, 9):
        (tmp_path / "images" / "below" / f"{number}.jpg").write_bytes(image(number))
    data = unlabelled(str(tmp_path / "images"), **options)
    assert [data.train.read(index)[0] for index in range(2)] == [image(8), image(9)]
    with pytest.raises(FileNotFoundError, match=r"set it to a folder of images, or of data\.shards="):
        unlabelled(str(tmp_path / "absent"), **options)


def test_without_names_classes_are_numbers(sharded: Path, tmp_path: Path) -> None:
    (sharded / "classes.txt").unlink()
    options: dict[str, Any] = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    assert shards(str(sharded), train="train-*.tar", val="val-*.tar", **options).classes == ("0", "1")
    (sharded / "classes.txt").write_text("ant\n")
    with pytest.raises(ValueError, match=r"classes\.txt names 1 classes, the labels go up to 1"):
        shards(str(sharded), train="train-*.tar", val="val-*.tar", **options)


@pytest.mark.parametrize(
    "text", ['["ant", "bee"]', '{"0": "ant", "1": "bee"}', '{"1": "bee", "0": "ant"}', '{"bee": 1, "ant": 0}']
)
def test_names_of_classes_as_json(sharded: Path, tmp_path: Path, text: str) -> None:
    options: dict[str, Any] = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    (sharded / "classes.txt").unlink()
    (sharded / "classes.json").write_text(text)
    assert shards(str(sharded), train="train-*.tar", val="val-*.tar", **options).classes == ("ant", "bee")


@pytest.mark.parametrize("text", ['["ant"', '{"0": "ant", "2": "bee"}', '{"ant": 0, "bee": 0}', "3", '["ant", 1]'])
def test_json_that_names_no_classes(sharded: Path, tmp_path: Path, text: str) -> None:
    (sharded / "classes.txt").unlink()
    (sharded / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes\.json holds no names of classes, from 0 on without a gap \("):
        shards(str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


def test_images_and_labels_of_every_kind(
    sharded: Path, tmp_path: Path, image: Callable[[int], bytes], write_shard: Callable[..., None]
) -> None:
    """All suffixes; a .cls beside a .json that tells of other things; a label under another key, or alone."""
    suffixes = ("jpeg", "jpg", "png", "bmp", "webp", "ppm", "tif", "tiff")
    samples = [(f"{n:04d}", {suffix: image(n), "cls": b"1"}) for n, suffix in enumerate(suffixes)]
    labels = (
        {"json": b'{"width": 3}', "cls": b"1"},
        {"cls": b"1", "json": b"{}"},
        {"json": b'{"cls": 1}'},
        {"json": b"1"},
    )
    samples += [(f"{n:04d}", {"jpg": image(n), **label}) for n, label in enumerate(labels, start=len(suffixes))]
    samples.append(("9999", {"jpg": image(99), "seg.png": b"a mask", "cls": b"1"}))
    write_shard(sharded / "val-0000.tar", samples)
    data = shards(
        str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache")
    )
    assert [data.val.read(i) for i in range(len(data.val))] == [(image(n), 1) for n in (*range(12), 99)]


def test_more_shards_than_may_be_open(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MOST_OPEN", 1)
    data = shards(
        str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache")
    )
    before = len(os.listdir("/proc/self/fd"))
    found = [data.train.read(i) for i in (0, 4, 1, 3, 2)]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    monkeypatch.undo()
    assert found == [data.train.read(i) for i in (0, 4, 1, 3, 2)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x-{008..011}.tar", ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("0001", {"jpg": b"x"})], "1 images have no .cls beside them, the first 0001"),
        ([("0001", {"jpg": b"x", "cls": b"cat"})], r"0001\.cls holds no class number \(b'cat'\)"),
        ([("0001", {"jpg": b"x", "cls": b"-1"})], r"0001\.cls holds no class number \(b'-1'\)"),
        ([("0001", {"jpg": b"x", "json": b"{}"})], r"0001\.json holds no class number"),
        ([("0001", {"jpg": b"x", "json": b'{"cls": true}'})], r"0001\.json holds no class number"),
        ([("0001", {"jpg": b"x", "png": b"y", "cls": b"0"})], r"0001\.jpg and 0001\.png are two images of one sample"),
        ([("0001", {"txt": b"x"})], r"hold no pairs of KEY\.jpg and KEY\.cls"),
        (
            [("0001", {"jpg": b"x", "cls": b"0"}), ("0002", {"avif": b"x", "cls": b"0"})],
            r"1 labels have no image beside them \(\.jpeg, .*\), the first 0002\.cls",
        ),
    ],
)
def test_shards_that_lack_something(
    sharded: Path, tmp_path: Path, write_shard: Callable[..., None], samples: Any, message: str
) -> None:
    write_shard(sharded / "val-0000.tar", samples)
    with pytest.raises(ValueError, match=message):
        shards(str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


def test_a_shard_that_was_cut_anywhere_loses_no_image_in_silence(sharded: Path, tmp_path: Path) -> None:
    """Also between two files, or in a header, which Python's tarfile takes for the end."""
    shard = sharded / "train-0001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)

    def found() -> int:
        data = shards(
            str(sharded), train=shard.name, val="val-0000.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache")
        )
        return len(data.train)

    assert found() == 2
    for length in (*range(512, end + 1, 512), *range(700, end, 512)):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{shard}.*(is no tar archive, or a truncated one|no \.cls beside them)"):
            found()
    shard.write_bytes(whole[: end + 512])  # with the first of the two blocks that mark the end
    assert found() == 2


def test_names_that_are_no_shards(sharded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    with pytest.raises(
        FileNotFoundError, match=r"there is no trian-\*\.tar: set data\.root, data\.train and data\.val"
    ):
        shards(str(sharded), train="trian-*.tar", val="val-*.tar", **options)
    with pytest.raises(ValueError, match=r"\{a\.\.b\} must be two whole numbers"):
        shards(str(sharded), train="train-{a..b}.tar", val="val-*.tar", **options)


def test_a_shard_that_became_shorter_is_a_corrupt_image(sharded: Path, tmp_path: Path) -> None:
    data = shards(
        str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache")
    )
    os.truncate(sharded / "val-0000.tar", 700)
    with pytest.raises(DataError, match=r"val-0000\.tar:0006\.jpg: .*val-0000\.tar ends within 0006\.jpg"):
        list(eval_batches(data.val, data, batch_size=2))


def test_cifars_shards(shared_data: Path, tmp_path: Path) -> None:
    """The real thing: 60,000 JPEGs in WebDataset's layout."""
    data = shards(
        str(shared_data),
        train="cifar10-train-000{0..4}.tar",
        val="cifar10-test-0000.tar",
        preprocess=Preprocess(32, crop_padding=0),
        cache=str(tmp_path / "cache"),
        expected={"classes": 10, "train": 50_000, "val": 10_000},
    )
    labels = Counter(data.val.index[index].label for index in range(len(data.val)))  # type: ignore[attr-defined]
    assert labels == Counter(dict.fromkeys(range(10), 1000))
    image, _ = data.train.read(49_999)
    assert isinstance(image, bytes)
    assert Image.open(io.BytesIO(image)).size == (32, 32)
