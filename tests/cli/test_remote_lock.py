"""Two machines never write one folder elsewhere: each with a disk of its own, and one store."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from effnet_train.cli import remote_lock
from effnet_train.cli.lock import _myself, locked
from effnet_train.cli.remote_lock import RemoteLock
from effnet_train.distributed import Session
from effnet_train.engine.remote_folder import RemoteFolder

HOLD = """
import pathlib, sys, time
from effnet_train.cli import remote_lock
from effnet_train.cli.lock import locked
from effnet_train.distributed import Session
remote_lock.BEAT_S = 0.2
remote_lock._SETTLE_S = 0.5
try:
    with locked(pathlib.Path(sys.argv[1]), Session(), sys.argv[2]):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
except ValueError as error:
    print("refused", error, flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT_S": 0.2, "STALE_S": 1.0, "_SETTLE_S": 0.1, "_LOOK_S": 0.05}.items():
        monkeypatch.setattr(remote_lock, name, value)


@pytest.fixture
def store() -> Iterator[Any]:
    """Return fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def folder_of(machine: Path, url: str = "memory://bucket") -> RemoteFolder:
    return RemoteFolder(machine / "run", url)


def elsewhere(**changes: Any) -> dict[str, Any]:
    """Describe an owner on another machine, whose process ids say nothing here."""
    return {**_myself(), "machine": "another", "host": "other", **changes}


def leave(store: Any, **changes: Any) -> None:
    store.pipe_file("/bucket/run/.lock", json.dumps(elsewhere(**changes)).encode())


def test_two_machines_and_one_store(tmp_path: Path) -> None:
    """Real processes, a store of files whose folder is not there yet; after the one has left, the other may."""
    url = f"file://{tmp_path}/absent/store"
    command = [sys.executable, "-c", HOLD, str(tmp_path / "1" / "run"), url]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        other = [*command[:-2], str(tmp_path / "2" / "run"), url, "0"]
        refused = subprocess.run(other, capture_output=True, text=True, timeout=60)
        assert f"refused checkpoint.remote: {url}/run is being written by process {first.pid} on" in refused.stdout
        assert not (tmp_path / "2").exists()
        first.kill()
    killed = subprocess.run(other, capture_output=True, text=True, timeout=60)
    assert killed.stdout == "held\n"
    assert "is stale, " in killed.stderr  # of a file whose writing the kill cut short, an unknown process
    assert os.listdir(tmp_path / "absent" / "store" / "run") == []


def test_of_two_that_come_at_once_the_later_stays(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    command = [sys.executable, "-c", HOLD]
    both = [
        subprocess.Popen([*command, str(tmp_path / name / "run"), url, "3"], stdout=subprocess.PIPE, text=True)
        for name in "12"
    ]
    told = [process.communicate(timeout=60)[0].split()[0] for process in both]
    assert sorted(told) == ["held", "refused"]


def test_an_owner_elsewhere_is_dead_after_a_silence_that_we_saw(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for when, least in ((time.time() - 100, 0.4), (time.time() + 1000, 1.0)):  # by a clock that may be wrong
        leave(store, time=when)
        start = time.monotonic()
        mine = RemoteLock(folder_of(tmp_path), _myself())
        assert least < time.monotonic() - start < least + 0.8
        assert "memory://bucket/run/.lock is stale, process" in capsys.readouterr().err
        assert json.loads(store.cat_file("/bucket/run/.lock"))["pid"] == os.getpid()
        mine.release()
        assert not store.exists("/bucket/run/.lock")


def test_an_owner_elsewhere_that_gives_a_sign_is_alive(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(store, time=0.0, beat=1)
    read, asked = RemoteFolder.read, []

    def beats(self: RemoteFolder, name: str, **options: Any) -> bytes | None:
        asked.append(name)
        if len(asked) == 4:
            leave(store, time=0.0, beat=2)
        return read(self, name, **options)

    monkeypatch.setattr(RemoteFolder, "read", beats)
    with pytest.raises(ValueError, match=r"is being written by process .* on other, since .*name="):
        RemoteLock(folder_of(tmp_path), _myself())


def test_the_owner_beats_and_leaves_where_it_was_taken_for_dead(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def leave_at_once(status: int) -> None:
        left.append(status)
        mine._released.set()

    monkeypatch.setattr(os, "_exit", leave_at_once)
    mine = RemoteLock(folder_of(tmp_path), _myself())
    first = store.cat_file("/bucket/run/.lock")
    time.sleep(0.5)
    assert json.loads(store.cat_file("/bucket/run/.lock"))["beat"] > json.loads(first)["beat"]
    store.pipe_file("/bucket/run/.lock", b"")  # half written, by us
    time.sleep(0.5)
    assert not left
    leave(store)
    time.sleep(0.5)
    assert left == [1]
    mine.release()
    assert json.loads(store.cat_file("/bucket/run/.lock"))["host"] == "other"


def test_the_lock_is_no_part_of_the_copy(tmp_path: Path, store: Any) -> None:
    with locked(tmp_path / "run", Session(), "memory://bucket"):
        store.pipe_file("/bucket/run/config.yaml", b"")
        assert folder_of(tmp_path).names() == ["config.yaml"]
    assert store.find("/bucket") == ["/bucket/run/config.yaml"]


IN_S3 = """
import sys
from pathlib import Path
from effnet_train.cli import remote_lock
from effnet_train.cli.lock import _myself
from effnet_train.cli.remote_lock import RemoteLock
from effnet_train.engine.remote_folder import RemoteFolder
remote_lock.BEAT_S, remote_lock._SETTLE_S = 0.2, 0.5
for url in ("s3://bucket/runs", "s3://absent/runs"):
    folder = RemoteFolder(Path(sys.argv[1]) / "run", url)
    try:
        first = RemoteLock(folder, _myself())
        try:
            RemoteLock(folder, _myself())
        except ValueError as error:
            print(error)
        first.release()
        print(folder.read(".lock"))
    except OSError as error:
        print(error)
"""


def test_in_s3(s3: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", IN_S3, str(tmp_path)]
    done = subprocess.run(command, env=s3.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refused, gone, absent = done.stdout.splitlines()
    assert "s3://bucket/runs/run is being written by process" in refused
    assert gone == "None"
    assert "checkpoint.remote=s3://absent/runs" in absent
    assert "give a bucket that is there" in absent


def test_what_hinders_is_told_by_rank_0_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"checkpoint\.remote=/there is no URL"),
        locked(tmp_path / "run", Session(), "/there"),
    ):
        pass
    assert not os.listdir(tmp_path)
