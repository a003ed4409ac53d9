"""Archives give the images that a folder gives, wherever they lie, and say what is wrong with them."""

import io
import os
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from effnet_train.data import archives
from effnet_train.data.archives import RemoteError, expand, imagenet_tars, shards, validation_synsets
from effnet_train.data.loader import DataError, eval_batches
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


def test_an_absent_archive_is_named(official: Path, tmp_path: Path) -> None:
    (official / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"ILSVRC2012_img_val\.tar does not exist: put ImageNet's archives there"
    ):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


def test_a_cache_that_cannot_be_written(official: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the index to .*: choose another place with data\.cache="):
        imagenet_tars(str(official), preprocess=PREPROCESS, cache=str(tmp_path / "file"))


# --- shards ---


def shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for suffix, data in parts.items():
                add(tar, f"{key}.{suffix}", data)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a folder of shards: 3 + 2 training and 2 validation images of the classes ant and bee."""
    root = tmp_path / "shards"
    shard(
        root / "train-0000.tar",
        [
            ("a.b/0001", {"jpg": jpeg(1), "cls": b"0"}),
            ("0002", {"cls": b"1\n", "png": jpeg(2)}),
            ("0003", {"jpeg": jpeg(3), "json": b'{"label": 1, "text": "x"}'}),
        ],
    )
    shard(root / "train-0001.tar", [(f"{n:04d}", {"JPG": jpeg(n), "cls": b"0", "txt": b"-"}) for n in (4, 5)])
    shard(root / "val-0000.tar", [(f"{n:04d}", {"jpg": jpeg(n), "cls": str(n % 2).encode()}) for n in (6, 7)])
    (root / "classes.txt").write_text("ant\nbee\n")
    return root


EXPECTED = Counter({(jpeg(n), name): 1 for n, name in ((1, "ant"), (2, "bee"), (3, "bee"), (4, "ant"), (5, "ant"))})


@pytest.mark.parametrize("train", ["train-*.tar", "train-{0000..0001}.tar", "train-000{0,1}.tar"])
def test_shards_in_a_folder(sharded: Path, tmp_path: Path, train: str) -> None:
    data = shards(str(sharded), train=train, val="val-0000.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))
    assert data.classes == ("ant", "bee")
    assert contents(data.train) == EXPECTED
    assert contents(data.val) == Counter({(jpeg(6), "ant"): 1, (jpeg(7), "bee"): 1})
    assert data.train.name(0) == f"{sharded}/train-0000.tar:a.b/0001.jpg"


def test_without_names_classes_are_numbers(sharded: Path, tmp_path: Path) -> None:
    (sharded / "classes.txt").unlink()
    options: dict[str, Any] = {"preprocess": PREPROCESS, "cache": str(tmp_path / "cache")}
    assert shards(str(sharded), train="train-*.tar", val="val-*.tar", **options).classes == ("0", "1")
    (sharded / "classes.txt").write_text("ant\n")
    with pytest.raises(ValueError, match=r"classes\.txt names 1 classes, the labels go up to 1"):
        shards(str(sharded), train="train-*.tar", val="val-*.tar", **options)


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
        ([("0001", {"txt": b"x"})], r"hold no pairs of KEY\.jpg and KEY\.cls"),
    ],
)
def test_shards_that_lack_something(sharded: Path, tmp_path: Path, samples: Any, message: str) -> None:
    shard(sharded / "val-0000.tar", samples)
    with pytest.raises(ValueError, match=message):
        shards(str(sharded), train="train-*.tar", val="val-*.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


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


class Files(BaseHTTPRequestHandler):
    """A server of a folder that knows ranges, and fails as often as it is told to."""

    root: Path
    failing = 0

    def do_HEAD(self) -> None:
        """Give the size."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Give a range, or all."""
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        if type(self).failing > 0 and path.suffix == ".tar":
            type(self).failing -= 1
            self.send_error(503)
            return
        data, status = path.read_bytes(), 200
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted:
            first, _, last = wanted.partition("-")
            data, status, size = data[int(first) : int(last or len(data)) + 1], 206, len(data)
        self.send_response(status)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a server of the shards on this machine."""
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setattr(archives, "_FIRST_WAIT_S", 0.01)
    Files.root, Files.failing = sharded, 0
    running = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def remote(address: str, tmp_path: Path) -> Any:
    train, val, cache = "train-{0000..0001}.tar", "val-0000.tar", str(tmp_path / "cache")
    return shards(address, train=train, val=val, preprocess=PREPROCESS, cache=cache)


def test_shards_at_an_address(server: str, tmp_path: Path) -> None:
    data = remote(server, tmp_path)
    assert data.classes == ("ant", "bee")
    assert contents(data.train) == EXPECTED


def test_an_address_that_fails_now_and_then(server: str, tmp_path: Path) -> None:
    Files.failing = 3
    data = remote(server, tmp_path)
    Files.failing = 4
    assert contents(data.train) == EXPECTED
    assert Files.failing == 0


def test_an_address_that_fails_for_good(server: str, tmp_path: Path) -> None:
    """It is no corrupt image: the run must not go on without what it cannot reach."""
    data = remote(server, tmp_path)
    Files.failing = 1000
    skipping = type(data)(data.train, data.val, None, PREPROCESS, "skip")
    with pytest.raises(RemoteError, match=r"cannot read http://127.*val-0000\.tar after 6 attempts \(.*503"):
        list(eval_batches(skipping.val, skipping, batch_size=2))
    with pytest.raises(FileNotFoundError):
        shards(server, train="nothing.tar", val="val-0000.tar", preprocess=PREPROCESS, cache=str(tmp_path / "cache"))


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
