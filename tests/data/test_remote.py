"""Shards elsewhere give what they give here, over servers that fail, and as copies that are made once."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from effnet_train.data import remote
from effnet_train.data.archives import shards
from effnet_train.data.datasets import Data
from effnet_train.data.loader import eval_batches
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.remote import RemoteError
from effnet_train.data.sources import Source

PREPROCESS = Preprocess(8)
TRAIN, VAL = "train-{0000..0001}.tar", "val-0000.tar"


class Files(BaseHTTPRequestHandler):
    """A server of a folder that behaves as well or ill as it is told to."""

    root: Path
    failing = 0  # so many requests for shards
    parts = True  # gives parts of files
    cut = 0  # so many answers end in the middle
    short = 0  # so many parts end in the middle, and nothing tells their length
    denies_absent = False
    seconds = 0.0  # that the body of a whole shard takes
    asked: Counter[str]

    def do_HEAD(self) -> None:
        """Give the size."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Give a part, or all."""
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        kind = type(self)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(403 if self.denies_absent else 404)
            return
        if kind.failing > 0 and path.suffix == ".tar":
            kind.failing -= 1
            self.send_error(503)
            return
        data, status = path.read_bytes(), 200
        wanted = self.headers.get("Range", "").removeprefix("bytes=") if self.parts else ""
        if body:
            self.asked[f"{path.name}{' in part' * bool(wanted)}"] += 1
        if wanted:
            first, _, last = wanted.partition("-")
            data, status, size = data[int(first) : int(last or len(data)) + 1], 206, len(data)
            if kind.short > 0 and body:
                kind.short -= 1
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
        self.send_response(status)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes" if self.parts else "none")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", sha256(path.read_bytes()).hexdigest())
        self.end_headers()
        if not body:
            return
        if path.suffix == ".tar" and not wanted:
            if kind.cut > 0:
                kind.cut -= 1
                data = data[: len(data) // 2]
                self.close_connection = True
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            time.sleep(self.seconds)
            data = data[half:]
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """One whose clients may be killed."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of connections that the other side has closed."""
        assert isinstance(sys.exc_info()[1], OSError)


@pytest.fixture
def files(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Files]]]:
    """Return the address of a server of the shards on this machine, and the server to tell how to behave."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    kind = type("Told", (Files,), {"root": sharded, "asked": Counter()})
    running = Server(("127.0.0.1", 0), kind)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", kind
    finally:
        running.shutdown()
        running.server_close()


def load(root: object, tmp_path: Path, **options: Any) -> Data:
    return shards(
        str(root), **{"train": TRAIN, "val": VAL, "cache": str(tmp_path / "cache"), **options}, preprocess=PREPROCESS
    )


def contents(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


@pytest.fixture
def here(sharded: Path, tmp_path: Path) -> list[Any]:
    """Return what the training shards hold."""
    return contents(load(sharded, tmp_path).train)


def write_indices(sharded: Path) -> None:
    """Write an index beside each shard, from Python's own reading of the tar."""
    import tarfile

    for archive in sharded.glob("*.tar"):
        images = []
        with tarfile.open(archive) as tar:
            labels = {m.name.rpartition(".")[0]: m for m in tar if m.name.endswith((".cls", ".json"))}
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if suffix.lower() in ("jpg", "jpeg", "png"):
                    value = json.loads(tar.extractfile(labels[key]).read())  # type: ignore[union-attr]
                    label = value["label"] if isinstance(value, dict) else value
                    images.append([member.offset_data, member.size, label, member.name])
        described = {"version": 1, "bytes": archive.stat().st_size, "images": images}
        archive.with_suffix(".index.json").write_text(json.dumps(described))


def test_shards_at_an_address(files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]) -> None:
    data = load(files[0], tmp_path)
    assert data.classes == ("ant", "bee")
    assert contents(data.train) == here


def test_an_address_that_fails_now_and_then(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any], sharded: Path
) -> None:
    address, server = files
    server.failing = 3
    data = load(address, tmp_path)
    server.failing = 4
    assert contents(data.train) == here
    assert server.failing == 0


def test_an_address_that_fails_for_good(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    """It is no corrupt image: the run must not go on without what it cannot reach."""
    address, server = files
    data = load(address, tmp_path)
    server.failing = 1000
    skipping = type(data)(data.train, data.val, None, PREPROCESS, "skip")
    with pytest.raises(RemoteError, match=r"cannot read http://127.*val-0000\.tar after 6 attempts \(.*503"):
        list(eval_batches(skipping.val, skipping, batch_size=2))
    server.failing = 0
    with pytest.raises(FileNotFoundError, match=r"there is no http://.*/nothing\.tar: set data\.root, data\.train and"):
        load(address, tmp_path, train="nothing.tar")
    (server.root / VAL).unlink()
    with pytest.raises(RemoteError, match=r"cannot read http://127.*val-0000\.tar \(FileNotFoundError"):
        list(eval_batches(skipping.val, skipping, batch_size=2))


def test_a_server_that_is_not_there_yet(files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]) -> None:
    """fsspec says of a connection that cannot be made that the file is not found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        RemoteError, match=r"cannot read http://.*tar after 6 attempts \(ClientConnectorError: Cannot con"
    ):
        load(f"http://127.0.0.1:{port}", tmp_path)
    running = Server(("127.0.0.1", port), files[1], bind_and_activate=False)
    running.server_bind()

    def listen() -> None:
        time.sleep(0.05)
        running.server_activate()
        running.serve_forever(poll_interval=0.02)

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert contents(load(f"http://127.0.0.1:{port}", tmp_path).train) == here
    finally:
        running.shutdown()
        running.server_close()


def test_a_part_that_ends_too_soon_is_no_corrupt_image(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]
) -> None:
    address, server = files
    data = load(address, tmp_path)
    server.short = 4
    assert contents(data.train) == here
    assert server.short == 0
    server.short = 1000
    skipping = type(data)(data.train, data.val, None, PREPROCESS, "skip")
    with pytest.raises(RemoteError, match=r"val-0000\.tar after 6 attempts \(OSError: \d+ bytes of \d+ came\)"):
        list(eval_batches(skipping.val, skipping, batch_size=2))


def test_an_address_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"httpx://there/train.*: httpx:// is not known: give a folder, or a URL as"):
        load("httpx://there", tmp_path)


def test_wildcards_where_a_server_lists_nothing(files: tuple[str, type[Files]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no train-\*\.tar: .*, with braces \(train-\{0000\.\.0146\}"):
        load(files[0], tmp_path, train="train-*.tar")


def test_what_is_denied_is_told_at_once(files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]) -> None:
    """A store that may not be listed denies what is absent: of classes' names and indices that is no error."""
    address, server = files
    server.denies_absent = True
    (server.root / "classes.txt").unlink()
    data = load(address, tmp_path)
    assert contents(data.train) == here
    assert data.classes == ("0", "1")
    with pytest.raises(PermissionError, match=r"cannot read http://.*nothing\.tar: access denied"):
        load(address, tmp_path, train="nothing.tar")


def test_an_index_beside_spares_reading_the_shards(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any], sharded: Path
) -> None:
    address, server = files
    write_indices(sharded)
    data = load(address, tmp_path)
    assert not any(".tar" in name for name in server.asked)
    assert contents(data.train) == here
    assert contents(load(sharded, tmp_path / "other").train) == here


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"bytes": ', '"bytes": 1').replace("[[", "[[1"),
        lambda text: text.replace('"version": 1', '"version": 2').replace("[[", "[[1"),
        lambda text: text.replace('"images": [[', '"images": [[-1, '),
        lambda _: "v1.2 5\njpg 512 700 0001.jpg cls 2048 1 0001.cls\n",
        lambda _: "[]",
    ],
)
def test_an_index_of_something_else_is_passed_over(sharded: Path, tmp_path: Path, here: list[Any], damage: Any) -> None:
    write_indices(sharded)
    for file in sharded.glob("*.index.json"):
        file.write_text(damage(file.read_text()))
    assert contents(load(sharded, tmp_path / "other").train) == here


# --- copies ---


def test_copies_are_whole_and_made_once(files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]) -> None:
    address, server = files
    for _ in range(2):
        data = load(address, tmp_path, shard_cache=str(tmp_path / "ssd"))
        assert contents(data.train) == here
        assert data.train.name(0) == f"{address}/train-0000.tar:a.b/0001.jpg"
    assert {name: count for name, count in server.asked.items() if ".tar" in name} == {
        "train-0000.tar": 1,
        "train-0001.tar": 1,
        "val-0000.tar": 1,
    }
    assert sorted(name.partition("-")[2] for name in os.listdir(tmp_path / "ssd")) == [
        "train-0000.tar",
        "train-0001.tar",
        "val-0000.tar",
    ]
    # A shard that has changed has another copy.
    (server.root / "val-0000.tar").write_bytes((server.root / "train-0001.tar").read_bytes())
    data = load(address, tmp_path, shard_cache=str(tmp_path / "ssd"))
    assert contents(data.val) == here[3:]


def test_with_indices_only_what_is_read_is_copied(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any], sharded: Path
) -> None:
    address, server = files
    write_indices(sharded)
    data = load(address, tmp_path, shard_cache=str(tmp_path / "ssd"))
    assert not any(".tar" in name for name in server.asked)
    assert data.train.read(4) == here[4]
    assert {name for name in server.asked if ".tar" in name} == {"train-0001.tar"}


def test_an_answer_that_ends_too_soon_is_asked_for_again(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any]
) -> None:
    address, server = files
    server.cut = 3
    data = load(address, tmp_path, shard_cache=str(tmp_path / "ssd"))
    assert contents(data.train) == here
    assert sum(server.asked[name] for name in ("train-0000.tar", "train-0001.tar", "val-0000.tar")) == 6


def test_a_copy_of_another_length_is_none(
    files: tuple[str, type[Files]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "state", lambda url: [1_000_000, "tag"])
    with pytest.raises(
        RemoteError, match=r"train-000\d\.tar after 6 attempts \(OSError: 10,240 bytes of 1,000,000 came"
    ):
        load(files[0], tmp_path, shard_cache=str(tmp_path / "ssd"))
    assert not [name for name in os.listdir(tmp_path / "ssd") if not name.startswith(".")]


def test_a_server_that_gives_whole_files_only(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any], sharded: Path
) -> None:
    address, server = files
    server.parts = False
    message = r"train-000\d\.tar: its server gives no parts of files: set data\.shard_cache=, a folder for whole copies"
    with pytest.raises(ValueError, match=message):
        load(address, tmp_path)
    assert contents(load(address, tmp_path, shard_cache=str(tmp_path / "ssd")).train) == here
    write_indices(sharded)
    data = load(address, tmp_path / "other")
    with pytest.raises(RemoteError, match=message):
        contents(data.train)


def test_places_that_take_no_copies(
    files: tuple[str, type[Files]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to data\.shard_cache=.*/file/ssd \(.*\): choose another place"):
        load(files[0], tmp_path, shard_cache=str(tmp_path / "file" / "ssd"))
    usage = remote.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=100))
    full = r"data\.shard_cache=.*/ssd has 0\.0 GB free, and a copy of http://.*tar takes 0\.0 GB: choose another place"
    with pytest.raises(ValueError, match=full):
        load(files[0], tmp_path, shard_cache=str(tmp_path / "ssd"))


def test_what_a_killed_process_has_left_takes_no_room(
    files: tuple[str, type[Files]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: list[Any]
) -> None:
    folder = tmp_path / "ssd"
    options = {"train": "train-0001.tar", "val": "train-0001.tar", "shard_cache": str(folder)}
    load(files[0], tmp_path, **options)
    (copy,) = folder.iterdir()
    copy.rename(copy.with_name(f".{copy.name}.tmp"))  # as it is before it is finished
    usage = remote.shutil.disk_usage(tmp_path)

    def small(_: object) -> Any:
        return usage._replace(free=15_000 - sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr(remote.shutil, "disk_usage", small)
    assert contents(load(files[0], tmp_path, **options).train) == here[3:]


def test_copies_of_what_is_here_are_refused(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.shard_cache=ssd is for shards at a URL, and data\.root=.* is a folder"
    ):
        load(sharded, tmp_path, shard_cache="ssd")


def test_a_disk_that_fills_up(files: tuple[str, type[Files]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither tried again nor a corrupt image."""
    system = remote.file_system(files[0])
    asked = []

    def full(url: str, file: str) -> None:
        asked.append(url)
        with open("/dev/full", "wb") as device:
            device.write(b"x" * 100_000)

    monkeypatch.setattr(system, "get_file", full)  # fsspec keeps one of a kind
    with pytest.raises(ValueError, match=r"data\.shard_cache=.*/ssd has .* GB free, and a copy of"):
        load(files[0], tmp_path, train="train-0000.tar", shard_cache=str(tmp_path / "ssd"))
    assert asked == [f"{files[0]}/train-0000.tar"]


# A process that reads all images, as a worker does, and tells what it found.
READER = """
import hashlib, sys
from effnet_train.data.archives import shards
from effnet_train.data.preprocess import Preprocess
options = dict(zip(("train", "val", "cache", "shard_cache"), sys.argv[2:]))
data = shards(sys.argv[1], **options, preprocess=Preprocess(8))
print(hashlib.sha256(b"".join(data.train.read(i)[0] for i in range(len(data.train)))).hexdigest())
"""


def start_reader(address: str, tmp_path: Path) -> "subprocess.Popen[str]":
    words = [address, TRAIN, VAL, str(tmp_path / "cache"), str(tmp_path / "ssd")]
    return subprocess.Popen([sys.executable, "-c", READER, *words], stdout=subprocess.PIPE, text=True)


def test_of_many_processes_one_fetches(
    files: tuple[str, type[Files]], tmp_path: Path, here: list[Any], sharded: Path
) -> None:
    """And what a process that was killed has left is made good by the next."""
    address, server = files
    write_indices(sharded)
    server.seconds = 600.0
    with start_reader(address, tmp_path) as killed:
        until = time.monotonic() + 60
        while not server.asked["train-0000.tar"]:
            assert time.monotonic() < until
            time.sleep(0.02)
        killed.kill()
    assert [name[0] for name in os.listdir(tmp_path / "ssd")] == ["."]
    server.asked.clear()
    server.seconds = 0.5
    readers = [start_reader(address, tmp_path) for _ in range(3)]
    found = [reader.communicate(timeout=60)[0] for reader in readers]
    assert len(set(found)) == 1
    assert found[0].strip()
    assert (server.asked["train-0000.tar"], server.asked["train-0001.tar"]) == (1, 1)
    assert len(os.listdir(tmp_path / "ssd")) == 2
    assert contents(load(address, tmp_path, shard_cache=str(tmp_path / "ssd")).train) == here
