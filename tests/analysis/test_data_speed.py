import io
import itertools
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_train.analysis import data_speed
from effnet_train.cli import bench

# timm leaves files open, and torchvision says that its decoder is to go.
WARNINGS = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:The image decoding:DeprecationWarning"
)


@pytest.fixture
def jpegs(tmp_path):
    """Return a folder of two classes with three JPEGs each."""
    for number in range(6):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(240, 260, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "images"


@WARNINGS
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", list(data_speed.contenders(["simplejpeg", "pillow"], {})))
def test_each_gives_batches_without_end(jpegs, name, train):
    batches = data_speed.contenders(["simplejpeg", "pillow"], {})[name](str(jpegs), train, 4, 0)
    assert list(itertools.islice(batches, 4)) == [4, 4, 4, 4]


@pytest.fixture
def shards(jpegs, tmp_path):
    """Return a folder of two shards of the same images."""
    folder = tmp_path / "shards"
    folder.mkdir()
    files = sorted(jpegs.glob("*/*"))
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for file in files[number::2]:
                archive.add(file, f"{file.stem}.jpg")
                label = tarfile.TarInfo(f"{file.stem}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(str("ab".index(file.parent.name)).encode()))
    return folder


@WARNINGS
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["webdataset, small", "ours, small"])
def test_shards_give_batches_without_end(jpegs, shards, name, train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    batches = data_speed.contenders(["simplejpeg"], {"small": str(shards)})[name](str(jpegs), train, 4, 0)
    assert list(itertools.islice(batches, 4)) == [4, 4, 4, 4]


def test_too_few_shards_are_refused(jpegs, shards, tmp_path):
    reader = data_speed.contenders([], {"small": str(shards)})["webdataset, small"]
    with pytest.raises(ValueError, match="holds 2 files: each of webdataset's 3 workers needs one"):
        reader(str(jpegs), True, 4, 3)
    with pytest.raises(FileNotFoundError, match=r"shards.none=.* holds no \*.tar: make some with effnet-data convert"):
        data_speed.contenders([], {"none": str(tmp_path)})


def test_ratios_are_to_timms_speed_in_the_same_round(monkeypatch, jpegs):
    clock = [0.0]

    def advance(seconds):
        while True:
            clock[0] += seconds
            yield 10

    monkeypatch.setattr(data_speed, "perf_counter", lambda: clock[0])
    measured = {"timm": lambda *_: advance(0.4), "double": lambda *_: advance(0.2)}
    rows = data_speed.compare(str(jpegs), measured, train=True, workers=2, rounds=3, seconds=1, batch_size=10)
    assert [row["name"] for row in rows] == ["timm", "double"]
    assert [row["images_per_s"] for row in rows] == [25.0, 50.0]
    assert [row["per_core"] for row in rows] == [12.5, 25.0]
    assert [row["ratio"] for row in rows] == [1.0, 2.0]


def test_memory_and_waiting(jpegs):
    found = data_speed.memory(str(jpegs), backend="simplejpeg", reads=40, batch_size=4)
    assert found["reads"] == 40
    assert 50 < found["after_a_tenth_mib"] <= found["peak_mib"]
    waited = data_speed.waiting(str(jpegs), backend="simplejpeg", images=1000, batch_size=4)
    assert set(waited) == {"start", "resume"}
    assert min(waited.values()) > 0


@WARNINGS
def test_the_command_writes_what_it_prints(jpegs, tmp_path, monkeypatch, capsys):
    words = [
        *("data", f"data.root={jpegs}", "jobs=[eval]", "workers=[0]", "backends=[simplejpeg]", "rounds=1"),
        *("seconds=0.05", "batch_size=2", "reads=0", "index=0", f"output={tmp_path / 'out' / 'speed.json'}"),
    ]
    monkeypatch.setattr(sys, "argv", ["effnet-bench", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    threads = torch.get_num_threads()
    bench.main()
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["timm", "torchvision", "torchvision tensors", "ours, simplejpeg"]
    assert result["machine"]["packages"]["timm"][0].isdigit()
    assert "x timm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "effnet-bench JOB"),
        (["--help"], 0, "effnet-bench data "),
        (["dat"], 2, "dat is no job: give one of train, eval, latency, startup, data, complexity first"),
        (["data", "data.root=x", "jobs=[training]"], 2, "jobs has 'training': give jobs=[train,eval]"),
        (["data", "data.root=x", "backends=[turbo]"], 2, "backends=turbo is not known"),
        (["data", "data.root=nowhere"], 2, "data.root=nowhere does not exist: set it to a folder that holds <class>/"),
        (["data", "data.root=x", "workers=2"], 2, "workers=2 must be a list of whole numbers: give workers=[2]"),
        (["data", "data.root=x", "workers=[-1]"], 2, "workers has -1: give whole numbers from 0 on"),
        (["data", "data.root=x", "shards={a: 5}"], 2, "shards.a=5 must be a folder of shards"),
        (["data", "data.root=x", "seconds=0"], 2, "seconds=0 must be more than 0"),
        (["data", "data.root=x", "index=-1"], 2, "index=-1 must be at least 0"),
        (["data", "data.root=/", "output=/dev/null/o"], 2, "output=/dev/null cannot be made, as /dev/null is a file"),
    ],
)
def test_words(monkeypatch, capsys, words, status, message):
    monkeypatch.setattr(sys, "argv", ["effnet-bench", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == status
    shown = capsys.readouterr()
    assert message in shown.out + shown.err


@WARNINGS
def test_an_image_that_one_of_them_cannot_read_is_named(jpegs, monkeypatch, capsys):
    (jpegs / "a" / "0.jpg").write_bytes(b"none")
    words = ["data", f"data.root={jpegs}", "jobs=[eval]", "workers=[0]", "rounds=1", "seconds=0.05", "batch_size=6"]
    monkeypatch.setattr(sys, "argv", ["effnet-bench", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as left:
        bench.main()
    torch.set_num_threads(threads)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert f"{jpegs}/a/0.jpg" in message
    assert f"effnet-data verify data=eval_folder data.root={jpegs} names all such images" in message
