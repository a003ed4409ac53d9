"""Parquet files give the images and labels that were written into them, however they lie there."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from effnet_train.data import parquet as module
from effnet_train.data.archives import shards
from effnet_train.data.datasets import Data, image_folders
from effnet_train.data.loader import DataError, eval_batches
from effnet_train.data.parquet import parquet
from effnet_train.data.parquet_files import choose
from effnet_train.data.pieces import Options
from effnet_train.data.prepare import write as write_pieces
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import Source

PREPROCESS = Preprocess(8)
ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def features(names: list[str], image: str = "image", label: str = "label") -> dict[str, str]:
    """Return what the library `datasets` writes into a schema."""
    kinds = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": kinds}})}


def write(
    path: Path, labels: list[Any], *, first: int = 0, names: list[str] | None = None, rows: int = 2, **options: Any
) -> None:
    """Write images `first`, `first + 1`, ... of these labels, in row groups of `rows`."""
    images = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(len(labels))]
    table = pa.table({"image": pa.array(images, ENCODED), "label": pa.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata(features(names) if names else None), path, row_group_size=rows, **options
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder as the hub's: 5 + 3 training images and 4 to validate, of the classes ant and bee."""
    folder = tmp_path / "set"
    write(folder / "data/train-00000-of-00002.parquet", [0, 1, 1, 0, 1], names=["ant", "bee"])
    write(folder / "data/train-00001-of-00002.parquet", [0, 0, 1], first=5, names=["ant", "bee"])
    write(folder / "data/validation-00000-of-00001.parquet", [1, 0, 1, 1], first=8, names=["ant", "bee"])
    return folder


TRAIN = [(png(i), label) for i, label in enumerate([0, 1, 1, 0, 1, 0, 0, 1])]
VAL = [(png(8 + i), label) for i, label in enumerate([1, 0, 1, 1])]


def load(root: Path | str, tmp_path: Path, **options: Any) -> Data:
    arguments = {"train": "train", "val": "validation", "cache": str(tmp_path / "cache"), **options}
    return parquet(str(root), preprocess=PREPROCESS, **arguments)


def rows(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


@pytest.mark.parametrize("copy", [True, False])
def test_a_folder_of_the_hub(root: Path, tmp_path: Path, copy: bool) -> None:
    data = load(root, tmp_path, copy=copy, expected={"classes": 2, "train": 8, "val": 4})
    assert data.classes == ("ant", "bee")
    assert (rows(data.train), rows(data.val)) == (TRAIN, VAL)
    assert [data.train.read(i) for i in (7, 0, 4)] == [TRAIN[i] for i in (7, 0, 4)]
    where = "row 1, 6.png" if copy else "row 1 of row group 0"
    assert data.train.name(6) == f"{root}/data/train-00001-of-00002.parquet:{where}"
    assert (tmp_path / "cache").exists() == copy


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_of_every_kind(tmp_path: Path, copy: bool, compression: str, version: str) -> None:
    for split in ("train", "validation"):
        kind: dict[str, Any] = {
            "compression": compression,
            "data_page_version": version,
            "use_dictionary": version == "1.0",
        }
        write(tmp_path / f"set/{split}.parquet", [0, 1, 1, 0, 1, 0, 0], rows=3, **kind)
    data = load(tmp_path / "set", tmp_path, copy=copy)
    assert rows(data.train) == [(png(i), label) for i, label in enumerate([0, 1, 1, 0, 1, 0, 0])]


@pytest.mark.parametrize("copy", [True, False])
def test_labels_as_text_are_numbered_in_sorted_order(tmp_path: Path, copy: bool) -> None:
    write(tmp_path / "set/train/0000.parquet", ["wasp", "ant", "bee"])
    write(tmp_path / "set/validation/0000.parquet", ["bee", "wasp", "ant"])
    data = load(tmp_path / "set", tmp_path, copy=copy)
    assert data.classes == ("ant", "bee", "wasp")
    assert [label for _, label in rows(data.train)] == [2, 0, 1]
    assert [label for _, label in rows(data.val)] == [1, 2, 0]


def test_without_names_classes_are_numbers_or_a_file_names_them(tmp_path: Path) -> None:
    write(tmp_path / "set/train.parquet", [0, 2, 1])
    write(tmp_path / "set/validation.parquet", [1, 0])
    assert load(tmp_path / "set", tmp_path).classes == ("0", "1", "2")
    (tmp_path / "set/classes.txt").write_text("ant\nbee\ncow\n")
    data = load(tmp_path / "set", tmp_path)
    assert data.classes == ("ant", "bee", "cow")
    assert data.val.classes == data.classes


@pytest.mark.parametrize("copy", [True, False])
def test_columns_by_other_names_and_bare_bytes(tmp_path: Path, copy: bool) -> None:
    table = pa.table(
        {
            "img": pa.array([png(1), png(2)], pa.large_binary()),
            "coarse_label": pa.array([0, 0], pa.int64()),
            "fine_label": pa.array([1, 0], pa.uint8()),
        }
    )
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(
        ValueError, match=r"none of its columns \(img, coarse_label, fine_label\) may be the image: choose"
    ):
        load(tmp_path, tmp_path, copy=copy)
    data = load(tmp_path, tmp_path, copy=copy, columns={"image": "img", "label": "fine_label"})
    assert rows(data.val) == [(png(1), 1), (png(2), 0)]
    with pytest.raises(
        ValueError, match=r"data\.columns\.label=fine is no column of .*train\.parquet: it has img, coarse_"
    ):
        load(tmp_path, tmp_path, copy=copy, columns={"image": "img", "label": "fine"})
    with pytest.raises(ValueError, match="the column coarse_label is of int64, no images"):
        load(tmp_path, tmp_path, copy=copy, columns={"image": "coarse_label", "label": "fine_label"})
    with pytest.raises(ValueError, match=r"data\.columns\.lable is not known: columns are image and label"):
        load(tmp_path, tmp_path, copy=copy, columns={"lable": "fine_label"})


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("train", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("test", ["data/test-0.parquet"]),
        ("*/train-0*.parquet", ["data/train-0.parquet"]),
        ("data/train-{0..1}.parquet", ["data/train-0.parquet", "data/train-1.parquet"]),
    ],
)
def test_the_files_of_a_split(split: str, found: list[str]) -> None:
    names = [
        "README.md",
        "data/test-0.parquet",
        "data/train-0.parquet",
        "data/train-1.parquet",
        "data/retrain-0.parquet",
    ]
    assert choose(names, split, "x") == found


def test_splits_that_are_not_clear() -> None:
    names = ["de/train/0.parquet", "en/train/0.parquet"]
    with pytest.raises(
        ValueError, match=r"the split train lies in 2 folders \(de/train, en/train\), .* choose one by a p"
    ):
        choose(names, "train", "x")
    with pytest.raises(
        FileNotFoundError, match=r"no file belongs to validation; there is de/train/0\.parquet, en/train"
    ):
        choose(names, "validation", "x")


def test_copies_are_made_once_and_anew_of_a_changed_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    original = module._copy
    monkeypatch.setattr(
        module, "_copy", lambda file, *rest: (copied.append(os.path.basename(file)), original(file, *rest))
    )
    load(root, tmp_path)
    assert len(copied) == 3
    copied.clear()
    assert rows(load(root, tmp_path).train) == TRAIN
    assert copied == []
    write(root / "data/train-00001-of-00002.parquet", [1, 0], first=20, names=["ant", "bee"])
    assert rows(load(root, tmp_path).train) == [*TRAIN[:5], (png(20), 1), (png(21), 0)]
    assert copied == ["train-00001-of-00002.parquet"]
    # A copy that has become shorter is none.
    copied.clear()
    largest = max((tmp_path / "cache/parquet").glob("*.images"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 10)
    assert rows(load(root, tmp_path).train)[:5] == TRAIN[:5]
    assert len(copied) == 1


def test_an_interrupted_copy_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    original = module._copy

    def interrupted(file: str, *rest: Any) -> None:
        if len(copied) == 1:
            raise KeyboardInterrupt
        copied.append(file)
        original(file, *rest)

    monkeypatch.setattr(module, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root, tmp_path)
    monkeypatch.setattr(module, "_copy", lambda file, *rest: (copied.append(file), original(file, *rest)))
    assert rows(load(root, tmp_path).train) == TRAIN
    assert len(copied) == len(set(copied)) == 3


# A process that is killed where a copy is about to get its name.
KILLED = """
import os, sys
from effnet_train.data.parquet import parquet
from effnet_train.data.preprocess import Preprocess
os.fsync = lambda _: os.kill(os.getpid(), 9)
parquet(sys.argv[1], train="train", val="validation", cache=sys.argv[2], preprocess=Preprocess(8))
"""


def test_a_process_that_is_killed_leaves_nothing_to_the_next(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert (
        subprocess.run([sys.executable, "-c", KILLED, str(root), str(cache)], stderr=subprocess.DEVNULL).returncode
        == -9
    )
    assert [name[0] for name in os.listdir(cache / "parquet")] == ["."]
    former = os.umask(0o022)
    try:
        assert rows(load(root, tmp_path).train) == TRAIN
    finally:
        os.umask(former)
    copies = list((cache / "parquet").iterdir())
    assert len(copies) == 6
    assert {copy.stat().st_mode & 0o777 for copy in copies} == {0o644}  # a cache may serve several people


def test_a_whole_cache_needs_no_writing(root: Path, tmp_path: Path) -> None:
    load(root, tmp_path)
    (tmp_path / "cache/parquet.lock").unlink()
    (tmp_path / "cache/parquet.lock").mkdir()  # what even root cannot open to write
    assert rows(load(root, tmp_path).train) == TRAIN
    write(root / "data/train-00001-of-00002.parquet", [1, 0], first=20, names=["ant", "bee"])
    with pytest.raises(
        OSError, match=r"cannot write to .*cache \(Is a directory\): choose another place with data\.cache"
    ):
        load(root, tmp_path)


def test_a_disk_without_room(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        ValueError, match=r"data\.cache=.* has 0\.0 GB free, and the copy of .* choose another place, or dat"
    ):
        load(root, tmp_path)


@pytest.mark.parametrize("copy", [True, False])
def test_damaged_files_are_named(root: Path, tmp_path: Path, copy: bool) -> None:
    path = root / "data/train-00001-of-00002.parquet"
    whole = path.read_bytes()
    for content in (whole[:-100], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is no parquet file, or a truncated one"):
            load(root, tmp_path, copy=copy)


def damage_first_group(path: Path) -> None:
    """Overwrite the images of the first row group; the file's end, which tells where all lies, is left."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[4 : 4 + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_damage_within(root: Path, tmp_path: Path) -> None:
    """Copying names the file; read in place, its images are corrupt ones and the others can be read."""
    path = root / "data/validation-00000-of-00001.parquet"
    damage_first_group(path)
    with pytest.raises(ValueError, match=rf"{path}: the column image\.bytes cannot be read \(.*fetch the file again"):
        load(root, tmp_path)
    data = load(root, tmp_path, copy=False, on_error="skip")
    (batch,) = eval_batches(data.val, data, batch_size=4)
    assert len(batch.labels) == 2
    assert len(batch.errors) == 2
    assert batch.errors[0].startswith(f"{path}:row 0 of row group 0: row group 0 cannot be read (")


@pytest.mark.parametrize("copy", [True, False])
def test_a_row_without_an_image(tmp_path: Path, copy: bool) -> None:
    images = pa.array(
        [{"bytes": png(0), "path": "a"}, None, {"bytes": None, "path": "c"}, {"bytes": png(3), "path": "d"}], ENCODED
    )
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), tmp_path / f"{split}.parquet")
    data = load(tmp_path, tmp_path, copy=copy)
    with pytest.raises(DataError, match=r"validation\.parquet:row 1"):
        list(eval_batches(data.val, data, batch_size=4))
    skipping = load(tmp_path, tmp_path, copy=copy, on_error="skip")
    (batch,) = eval_batches(skipping.val, skipping, batch_size=4)
    assert (batch.keys.tolist(), len(batch.errors)) == ([0, 3], 2)


def test_images_that_lie_elsewhere(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": "/data/a.png"}] * 2, ENCODED)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet: the column image\.bytes is empty, the images are elsewhere"):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"hold labels from -1 to 0, for 2 classes: images without a label"),
        ([0, 2], r"hold labels from 0 to 2, for 2 classes"),
        ([0, None], r"the column label \(int64, 1 without a value\) holds no labels"),
        ([0.5, 1.0], r"the column label \(double, 0 without a value\) holds no labels"),
    ],
)
def test_labels_that_are_none(root: Path, tmp_path: Path, labels: list[Any], message: str, copy: bool) -> None:
    write(root / "data/validation-00000-of-00001.parquet", labels, names=["ant", "bee"])
    with pytest.raises(ValueError, match=message):
        load(root, tmp_path, copy=copy)


@pytest.mark.parametrize("copy", [True, False])
def test_a_source_is_cheap_to_send_and_reads_in_workers(root: Path, tmp_path: Path, copy: bool) -> None:
    data = load(root, tmp_path, copy=copy)
    rows(data.val)  # with a file open, a row group kept
    sent = pickle.dumps(data.val)
    assert len(sent) < 2500
    assert rows(pickle.loads(sent)) == VAL
    here = [batch.images for batch in eval_batches(data.val, data, batch_size=3)]
    there = [batch.images for batch in eval_batches(data.val, data, batch_size=3, workers=1)]
    assert all(map(torch.equal, here, there))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), group=st.integers(1, 5), world=st.integers(1, 4))
def test_each_image_once_over_ranks(tmp_path: Path, sizes: list[int], group: int, world: int) -> None:
    folder = tmp_path / f"{sizes}-{group}"
    for number, size in enumerate(sizes):
        labels = [(sum(sizes[:number]) + i) % 2 for i in range(size)]
        write(folder / f"train-{number}.parquet", labels, first=sum(sizes[:number]), rows=group, names=["a", "b"])
    expected = Counter((png(i), i % 2) for i in range(sum(sizes)))
    for copy in (True, False):
        data = load(folder, tmp_path, val="train", copy=copy)
        assert Counter(rows(data.train)) == expected
        keys: Counter[int] = Counter()
        for rank in range(world):
            for batch in eval_batches(data.val, data, batch_size=3, rank=rank, world_size=world):
                keys.update(batch.keys.tolist())
        assert keys == Counter(range(sum(sizes)))


# --- the hub ---

# In a process of its own, as the hub's address and cache are read where huggingface_hub is imported.
PROGRAM = """
import sys
from effnet_train.data.parquet import parquet
from effnet_train.data.pieces import Options
from effnet_train.data.prepare import write as write_pieces
from effnet_train.data.preprocess import Preprocess
try:
    data = parquet(sys.argv[1], train="train", val="validation", preprocess=Preprocess(8), cache=sys.argv[2])
    print(len(data.train), len(data.val), *data.classes)
except (ValueError, FileNotFoundError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def from_hub(name: str, tmp_path: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    command = [sys.executable, "-c", PROGRAM, name, str(tmp_path / "cache")]
    environment = {**kept, "HF_HOME": str(tmp_path / "hf"), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def published(hub: Any, root: Path) -> Any:
    """Return a hub that has the folder as someone/set, with a split that nobody asks for."""
    (root / "data/test-00000-of-00001.parquet").write_bytes(b"not asked for")
    (hub.root / "datasets/someone").mkdir(parents=True)
    (hub.root / "datasets/someone/set").symlink_to(root)
    return hub


def test_a_data_set_of_the_hub(published: Any, tmp_path: Path) -> None:
    address, _, asked = published
    assert from_hub("hub:someone/set", tmp_path, HF_ENDPOINT=address) == "8 4 ant bee"
    assert any("train-00001-of-00002.parquet" in line for line in asked)
    assert not any("test-00000" in line for line in asked)
    asked.clear()
    assert from_hub("hub:someone/set", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1") == "8 4 ant bee"
    assert not asked
    absent = from_hub("hub:someone/none", tmp_path, HF_ENDPOINT=address)
    assert absent.startswith(
        f"FileNotFoundError: data.root=hub:someone/none: cannot fetch it from {address} (Repository"
    )
    assert "log in (hf auth login)" in absent


def card(*names: str, label: str = "label", config: str | None = None) -> dict[str, Any]:
    """Return what `datasets` writes of a configuration into a data set's card."""
    kind = {"class_label": {"names": {str(number): name for number, name in enumerate(names)}}}
    features = [{"name": "image", "dtype": "image"}, {"name": label, "dtype": kind}]
    return {**({"config_name": config} if config else {}), "features": features, "splits": [{"name": "train"}]}


def write_card(folder: Path, infos: Any) -> None:
    import yaml

    heading = yaml.safe_dump({"license": "mit", "dataset_info": infos})
    (folder / "README.md").write_text(f"---\n{heading}---\n# A set\n\n---\nof images\n")


def test_the_hubs_card_names_the_classes(published: Any, root: Path, tmp_path: Path) -> None:
    """Which is fetched too; where there is a file of names as well, that is asked first."""
    for file in root.glob("data/[tv]*[n]-*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.replace_schema_metadata(None), file)
    write_card(root, card("wasp", "yak"))
    assert from_hub("hub:someone/set", tmp_path, HF_ENDPOINT=published.address) == "8 4 wasp yak"
    (root / "classes.txt").write_text("cow\ndog\n")
    assert from_hub("hub:someone/set", tmp_path / "other", HF_ENDPOINT=published.address) == "8 4 cow dog"


NUMBERS = ("0", "1", "2")


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    ("infos", "classes"),
    [
        (card("ant", "bee", "cow"), ("ant", "bee", "cow")),
        ([card("ant", "bee", "cow", config="a"), card("ant", "bee", "cow", config="b")], ("ant", "bee", "cow")),
        ([card("x", "y", "z", config="other"), card("ant", "bee", "cow", config="plain")], ("ant", "bee", "cow")),
        ([card("x", "y", "z", config="a"), card("ant", "bee", "cow", config="b")], NUMBERS),
        (card("ant", "bee", "cow", label="fine"), NUMBERS),
        ({"features": [{"name": "label", "dtype": "int64"}]}, NUMBERS),
        ({"features": [{"name": "label", "dtype": {"class_label": {"names": {"0": "a", "2": "b"}}}}]}, NUMBERS),
        ("nonsense", NUMBERS),
        (None, NUMBERS),
    ],
)
def test_a_card_beside_the_files(tmp_path: Path, infos: Any, classes: tuple[str, ...], copy: bool) -> None:
    write(tmp_path / "set/plain/train.parquet", [0, 2, 1])
    write(tmp_path / "set/plain/validation.parquet", [1, 0])
    write_card(tmp_path / "set", infos)
    assert load(tmp_path / "set", tmp_path, copy=copy).classes == classes


def test_a_card_that_names_too_few(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"set/{split}.parquet", [0, 2, 1])
    write_card(tmp_path / "set", card("ant", "bee"))
    with pytest.raises(ValueError, match=r"set/README\.md names 2 classes, the labels go up to 2"):
        load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    ("path", "suffix", "kept"), [("a.b/cat.JPEG", ".JPEG", True), ("cat.PNG", ".PNG", True), (None, ".png", False)]
)
def test_rows_become_files_of_images(tmp_path: Path, copy: bool, path: str | None, suffix: str, kept: bool) -> None:
    """A row's image gets the name that is written beside it, else a number, and a suffix by which it is found again."""
    images = [{"bytes": png(i), "path": path and path.replace("cat", f"cat{i}")} for i in range(4)]
    for split in ("train", "validation"):
        table = pa.table({"image": pa.array(images, ENCODED), "label": pa.array([0, 1, 1, 0])})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{split}.parquet")
    data = load(tmp_path / "set", tmp_path, copy=copy)
    for to in ("folder", "shards"):
        out = tmp_path / to
        write_pieces({"train": data.train, "val": data.val}, out, Options(to), source={})
        read = (
            image_folders(str(out), preprocess=PREPROCESS)
            if to == "folder"
            else shards(
                str(out), train="train-*.tar", val="val-*.tar", cache=str(tmp_path / "cache"), preprocess=PREPROCESS
            )
        )
        assert Counter(rows(read.train)) == Counter(rows(data.train))
    names = {file.name for file in (tmp_path / "folder/train").rglob("*.*")}
    assert names == {f"cat{i}{suffix}" if kept and copy else f"{i:06d}.png" for i in range(4)}
    with tarfile.open(tmp_path / "shards/train-000000.tar") as tar:
        assert all(re.fullmatch(r"[\w-]+\.(jpg|png|cls)", name) for name in tar.getnames())
