"""Archives give the images that a folder gives, wherever they lie, and say what is wrong with them."""

import io
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from effnet_train.data.archives import imagenet_tars
from effnet_train.data.ilsvrc import validation_synsets
from effnet_train.data.loader import eval_batches
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import FolderSource, Source

PREPROCESS = Preprocess(8)
SYNSETS = ("n01440764", "n02084071", "n03000000")
# Their numbers in the devkit, which are not those of the sorted names.
NUMBERS = {"n01440764": 2, "n02084071": 3, "n03000000": 1}


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Return a folder with ImageNet's archives in small, `folder/` beside them holding the same images in folders."""
    root = tmp_path / "official"
    root.mkdir()
    labels = [SYNSETS[i] for i in (2, 0, 0, 1)]
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for place, synset in enumerate(reversed(SYNSETS)):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for number in (3, 1, 2):
                    data = jpeg(10 * place + number)
                    add(inner, f"{synset}_{number}.JPEG", data)
                    write(tmp_path / "folder" / "train" / synset / f"{synset}_{number}.JPEG", data)
            add(outer, f"{synset}.tar", stream.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 4, 1, 3):
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            add(tar, name, jpeg(100 + number))
            write(tmp_path / "folder" / "val" / labels[number - 1] / name, jpeg(100 + number))
    rows = [(NUMBERS[synset], synset, "words") for synset in SYNSETS] + [(4, "n00001740", "an inner node")]
    table = np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    stream = io.BytesIO()
    savemat(stream, {"synsets": table[:, None]})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", stream.getvalue())
        text = "".join(f"{NUMBERS[synset]}\n" for synset in labels).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    return root


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def contents(source: Source) -> Counter[tuple[Any, str]]:
    """Count what a source holds: image and class name."""
    read = (source.read(index) for index in range(len(source)))
    return Counter((data, source.classes[label]) for data, label in read)


def test_imagenets_own_archives_give_what_folders_give(official: Path, tmp_path: Path) -> None:
    data = imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    for split, source in (("train", data.train), ("val", data.val)):
        folder = FolderSource(tmp_path / "folder" / split)
        assert source.classes == folder.classes == SYNSETS
        assert contents(source) == contents(folder)
        assert [label for _, label in map(source.read, range(len(source)))] == [
            label for _, label in map(folder.read, range(len(folder)))
        ] or split == "val"  # the order of a folder, of classes and names
    assert data.train.name(0) == f"{official}/ILSVRC2012_img_train.tar:{SYNSETS[0]}.tar/{SYNSETS[0]}_1.JPEG"
    assert validation_synsets(str(official / "ILSVRC2012_devkit_t12.tar.gz")) == [SYNSETS[i] for i in (2, 0, 0, 1)]


def test_labels_from_a_text_file(official: Path, tmp_path: Path) -> None:
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    options = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    with pytest.raises(FileNotFoundError, match=r"devkit_t12\.tar\.gz does not exist: .*, or set data\.val_labels="):
        imagenet_tars(str(official), **options)
    (official / "val.txt").write_text("".join(f"{SYNSETS[i]}\n" for i in (2, 0, 0, 1)))
    data = imagenet_tars(str(official), val_labels="val.txt", **options)
    assert contents(data.val) == contents(FolderSource(tmp_path / "folder" / "val"))
    (official / "val.txt").write_text("".join(f"{SYNSETS[i]}\n" for i in (2, 0, 1)))
    with pytest.raises(ValueError, match=r"img_val\.tar holds 4 images, .*val\.txt labels of 3: fetch both again"):
        imagenet_tars(str(official), val_labels="val.txt", **options)


def test_an_index_is_made_once_and_anew_for_a_changed_archive(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened() -> Source:
        return imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache")).train

    first = opened()
    assert capsys.readouterr().err.count("indexing 1 archives, once: ") == 1
    again = opened()
    assert "indexing" not in capsys.readouterr().err
    assert contents(first) == contents(again)
    train = official / "ILSVRC2012_img_train.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as inner:
        add(inner, "n04000000_1.JPEG", jpeg(7))
    with tarfile.open(train, "a") as outer:
        add(outer, "n04000000.tar", stream.getvalue())
    with pytest.raises(ValueError, match="train has 4 classes and val 3"):
        opened()
    assert "indexing 1 archives, once: " in capsys.readouterr().err
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_source_is_cheap_to_send_and_reads_in_workers(official: Path, tmp_path: Path) -> None:
    data = imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    data.val.read(0)  # with an archive open
    sent = pickle.dumps(data.val)
    assert len(sent) < 1000
    assert contents(pickle.loads(sent)) == contents(data.val)
    here = [batch.images for batch in eval_batches(data.val, data, batch_size=3)]
    there = [batch.images for batch in eval_batches(data.val, data, batch_size=3, workers=1)]
    assert all((one == other).all() for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ILSVRC2012_img_val.tar", lambda data: data[:-12_000], "no tar archive, or a truncated one"),
        ("ILSVRC2012_img_train.tar", lambda _: b"<html>not found</html>" * 100, "no tar archive, or a truncated one"),
        ("ILSVRC2012_devkit_t12.tar.gz", lambda data: data[:200], "is not ImageNet's devkit of 2012"),
    ],
)
def test_damaged_archives_are_named(
    official: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = official / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", [f"{SYNSETS[1]}.tar", f"{SYNSETS[1]}_1.JPEG"])
def test_a_damaged_header_loses_no_image_in_silence(official: Path, tmp_path: Path, name: str) -> None:
    """Of a class, and of an image within one: Python's tarfile takes it for the end."""
    path = official / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes().replace(name.encode().ljust(100, b"\0"), b"?".ljust(100, b"\0")))
    with pytest.raises(ValueError, match=rf"{path}.* is no tar archive, or a truncated one \(at .* stands neither"):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


def test_an_absent_archive_is_named(official: Path, tmp_path: Path) -> None:
    (official / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"ILSVRC2012_img_val\.tar does not exist: put ImageNet's archives there"
    ):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


def test_a_cache_that_cannot_be_written(official: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*: choose another place with data\.cache="):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "file"))


def test_a_cache_on_a_full_disk(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy's own error has neither a number nor a name."""

    def full(file: object, array: object) -> None:
        raise OSError("4096 requested and 512 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=rf"cannot write the index to {tmp_path}/cache \(4096 .*\): choose another place"):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
