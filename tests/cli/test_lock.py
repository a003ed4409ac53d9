"""Two runs never write one folder, and a dead one keeps nobody out: real processes, killed for real."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from effnet_train.cli import lock
from effnet_train.cli.lock import Lock, locked
from effnet_train.distributed import Session

HOLD = (
    "import sys, time, pathlib\n"
    "from effnet_train.cli.lock import Lock\n"
    "held = Lock(pathlib.Path(sys.argv[1]))\n"
    "print('held', flush=True)\n"
    "time.sleep(60)\n"
)
MESSAGE = r"the folder .*run is being written by process {} on {}, since .*: wait for it or stop it, or give name="


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def rewrite(folder: Path, **changes: Any) -> None:
    """Make the folder's lock another owner's."""
    folder.mkdir(exist_ok=True)
    owner = {**lock._myself(), **changes}
    (folder / ".lock").write_text(json.dumps(owner))


def test_held_refused_and_after_a_kill_taken_over_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        with pytest.raises(ValueError, match=MESSAGE.format(process.pid, os.uname().nodename)):
            Lock(folder)
    finally:
        process.send_signal(signal.SIGKILL)  # and not waited for: a zombie
    time.sleep(0.1)
    start = time.monotonic()
    mine = Lock(folder)
    assert time.monotonic() - start < 1
    assert "is stale, process" in capsys.readouterr().err
    assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    mine.release()
    process.wait()


def test_released_at_an_error_and_the_folder_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()

    def fail() -> None:
        with locked(tmp_path, Session()):
            assert (tmp_path / ".lock").exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == ["config.yaml"]
    Lock(tmp_path / "new" / "run").release()  # a run that was refused before it began leaves no folder
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_process_id_that_another_process_has_by_now_is_dead(tmp_path: Path) -> None:
    rewrite(tmp_path, pid=os.getppid(), started="1")
    Lock(tmp_path).release()


def test_another_machines_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale if not touched for long, some of it under our eyes; alive if touched then; by the file system's clock."""
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    rewrite(tmp_path, machine="another", host="other")
    os.utime(tmp_path / ".lock", (0, time.time() - 2))
    start = time.monotonic()
    Lock(tmp_path).release()
    assert 0.4 < time.monotonic() - start < 0.9

    # Old as its file system was away, and its owner lives.
    rewrite(tmp_path, machine="another", host="other")
    beat = f"import os, time; time.sleep(0.2); os.utime({str(tmp_path / '.lock')!r})"
    os.utime(tmp_path / ".lock", (0, time.time() - 2))
    monkeypatch.setattr(lock, "BEAT_S", 2.0)
    with subprocess.Popen([sys.executable, "-c", beat]), pytest.raises(ValueError, match=r"written by .* on other"):
        Lock(tmp_path)
    monkeypatch.setattr(lock, "BEAT_S", 0.2)

    rewrite(tmp_path, machine="another", host="other")
    start = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - start > 0.9

    rewrite(tmp_path, machine="another", host="other")
    beat = f"import os, time; time.sleep(0.4); os.utime({str(tmp_path / '.lock')!r})"
    with (
        subprocess.Popen([sys.executable, "-c", beat]),
        pytest.raises(ValueError, match=r"written by .* on other, since"),
    ):
        Lock(tmp_path)


def test_a_jobs_own_lock_from_before_it_was_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(tmp_path, machine="another", host="other", slurm="7.0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - start < 1


def test_the_owner_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    mine = Lock(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    time.sleep(0.4)
    assert (tmp_path / ".lock").stat().st_mtime > 0
    mine.release()


def test_of_many_that_come_at_once_one_gets_a_stale_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rewrite(folder, pid=os.getppid(), started="1")
    command = [sys.executable, "-c", HOLD, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert len(alive) == 1
    assert sum("is being written by" in text for text in errors) == 2


def test_a_lock_that_another_has_just_taken_over_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for no moment: in it a third might make one, and there would be two owners."""
    rewrite(tmp_path, pid=os.getppid(), started="1", token="dead")
    take_over, rename, unlink = Lock._take_over, os.rename, Path.unlink
    held: list[Lock] = []
    removed: list[str] = []

    def late(self: Lock, owner: dict[str, Any], reason: str) -> None:
        if not held:
            held.append(self)
            held.append(Lock(tmp_path))  # quicker than this one, which has read the stale one
        take_over(self, owner, reason)

    def note(path: Path) -> None:
        if path.name == ".lock":
            removed.append(json.loads(path.read_text())["token"])

    monkeypatch.setattr(Lock, "_take_over", late)
    monkeypatch.setattr(os, "rename", lambda source, target: (note(Path(source)), rename(source, target)))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (note(path), unlink(path, **options)))
    with pytest.raises(ValueError, match="is being written by"):
        Lock(tmp_path)
    assert removed == ["dead"]
    held[1].release()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("died", [{"started": "1"}, {"machine": "another"}], ids=["here", "elsewhere"])
def test_who_died_while_taking_over_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: dict[str, str]
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    rewrite(tmp_path, pid=os.getppid(), **died)
    os.rename(tmp_path / ".lock", tmp_path / ".lock.takeover")
    rewrite(tmp_path, pid=os.getppid(), started="1")
    Lock(tmp_path).release()
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_no_lock_without_an_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: .*run"):
            Lock(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()
    Lock(tmp_path / "run").release()
