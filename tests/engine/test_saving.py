"""Saves that are written behind: what is written, what is kept, what becomes of failures, and a copy elsewhere."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from effnet_train.data import remote
from effnet_train.engine import saving
from effnet_train.engine.checkpoint import find_checkpoint, load_checkpoint
from effnet_train.engine.saving import Checkpoints
from effnet_train.engine.snapshot import Snapshots

META = {"model": {"_target_": "m"}, "preprocess": {"resolution": 8}, "classes": ["a", "b"], "data": {}}


def payload(step: int = 3, **parts: Any) -> dict[str, Any]:
    model = {"w": torch.full((64, 64), float(step)), "n": torch.tensor(7)}
    ema = {"w": torch.full((64, 64), step + 0.5), "n": torch.tensor(7)}
    return {"effnet_train": 1, "step": step, "model": model, "ema": ema, "best": {}, "meta": META, **parts}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return what the disk waits for before it has synced anything."""
    event, fsync = threading.Event(), os.fsync

    def wait(file: int) -> None:
        assert event.wait(30)
        fsync(file)

    monkeypatch.setattr(os, "fsync", wait)
    return event


@pytest.mark.parametrize("background", [False, True])
def test_the_last_k_stay(tmp_path: Path, background: bool) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    for step in (5, 10, 100):
        checkpoints.save(payload(step))
    checkpoints.settle()
    assert checkpoints.steps() == [10, 100]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["step"] == 100
    assert names(tmp_path) == ["step_000000010.pt", "step_000000100.pt"]


def test_damaged_ones_of_later_steps_do_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=False)
    for step in (100, 200):
        Checkpoints(tmp_path, background=False).save(payload(step))
    checkpoints.path(300).write_bytes(b"damaged")
    checkpoints.save(payload(250))
    assert checkpoints.steps() == [250, 300]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1), must=True)
    for name in (".step_000000002.pt-x1_y", ".step_000000003.milestone.pt-u", ".best.pt-abc", ".other"):
        (tmp_path / name).write_bytes(b"half")
    checkpoints.clear_unfinished()
    assert names(tmp_path) == [".other", "step_000000001.pt"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "bits"])
def test_a_damaged_newest_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(payload(1))
    checkpoints.save(payload(2))
    path = checkpoints.path(2)
    data = bytearray(path.read_bytes())
    if damage == "bits":
        middle = len(data) // 4
        data[middle] ^= 0xFF
    path.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "bits": data}[damage])
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["step"] == 1
    assert "step_000000002.pt is damaged" in capsys.readouterr().err


def test_training_goes_on_while_what_was_there_is_written(tmp_path: Path, disk: threading.Event) -> None:
    checkpoints = Checkpoints(tmp_path)
    weights, scores, rates = torch.arange(6.0).reshape(2, 3), {"top1": 0.5}, [0.1]

    def save(step: int) -> None:
        model = {"w": weights, "row": weights[1], "turned": weights.t()}
        checkpoints.save(payload(step, model=model, best=scores, optimizer={"rates": rates}))

    save(1)
    weights += 1
    scores["top1"] = rates[0] = 0.75
    assert checkpoints.steps() == []
    disk.set()
    checkpoints.settle()
    written = load_checkpoint(checkpoints.path(1))
    assert written["model"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert written["model"]["row"].tolist() == [3, 4, 5]
    assert written["model"]["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (written["best"], written["optimizer"]) == ({"top1": 0.5}, {"rates": [0.1]})
    # The same memory again and again, each time when the former copy is on the disk.
    for step in (2, 3, 4):
        save(step)
        weights += 1
    checkpoints.settle()
    assert [load_checkpoint(checkpoints.path(step))["model"]["w"][0, 0].item() for step in (2, 3, 4)] == [1, 2, 3]


def test_a_copy_keeps_what_loading_needs(tmp_path: Path) -> None:
    """Bits, strides, and the versions that a module's dictionary carries, which torch.load gives back."""
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    copied = Snapshots().take(network.state_dict())
    expected = network.state_dict()
    assert list(copied) == list(expected)
    assert copied._metadata == expected._metadata
    for name, tensor in expected.items():
        assert torch.equal(copied[name], tensor)
        assert copied[name].stride() == tensor.stride()
        assert copied[name].data_ptr() != tensor.data_ptr()


@pytest.mark.gpu
def test_what_a_gpu_goes_on_to_change_is_copied_first(tmp_path: Path) -> None:
    """The host does not wait, and the next update, in the same stream, does."""
    checkpoints, weights = Checkpoints(tmp_path, keep=20), torch.zeros(1 << 24, device="cuda")
    for step in range(1, 11):
        weights += 1
        checkpoints.save(payload(step, model={"w": weights}))
        weights += 1
        weights -= 1
    checkpoints.settle()
    for step in range(1, 11):
        found = load_checkpoint(checkpoints.path(step))["model"]["w"]
        assert bool((found == step).all())


def test_the_next_save_waits_and_so_does_one_that_must_be_there(tmp_path: Path, disk: threading.Event) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1))
    assert checkpoints.steps() == []
    threading.Timer(0.2, disk.set).start()
    checkpoints.save(payload(2), must=True)
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.written == 2


def test_a_slow_disk_is_told_of(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "_LONG_S", 0.05)
    checkpoints = Checkpoints(tmp_path)
    threading.Timer(0.3, disk.set).start()
    checkpoints.save(payload(1), must=True)
    assert "warning: a checkpoint has not been written in 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_save_is_told_and_ends_the_run_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], background: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, max_failures=3, background=background)
    checkpoints.save(payload(1), must=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(payload(2), best_before={})  # two files of one step: one failure
        assert checkpoints.settle() == {}
        assert capsys.readouterr().err.count("No space left on device); the one before is intact, training goes") == 2
        checkpoints.save(payload(3))
        checkpoints.wait()
        assert "step_000000003.pt (No space left on device)" in capsys.readouterr().err  # at once, not at the next
        if background:
            checkpoints.save(payload(4))
        with pytest.raises(OSError, match=r"step_000000004.pt \(No space left on device.*at 3 steps in a row.*intact"):
            checkpoints.save(payload(5 if background else 4))  # the save before is what it tells of
        assert names(tmp_path) == ["step_000000001.pt"]
    checkpoints.save(payload(5), must=True)
    assert not checkpoints.failed_steps
    assert checkpoints.steps() == [1, 5]


def test_what_must_be_there_and_is_not_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*step_000000001.pt \(No space left on device\); the checkpoints"):
        Checkpoints(tmp_path).save(payload(1), must=True)


def test_a_mistake_of_ours_is_not_swallowed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1, model={"w": lambda: None}))
    with pytest.raises(AttributeError, match="pickle"):
        checkpoints.settle()


def test_a_best_that_cannot_be_written_is_not_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the checkpoint that is written with it, nor to the run; one that can, is."""
    checkpoints, replace = Checkpoints(tmp_path), os.replace
    first, second = {"step": 1.0, "top1": 0.5}, {"step": 2.0, "top1": 0.7}
    checkpoints.save(payload(1, best=first), best_before={})
    assert checkpoints.settle() is None

    def not_best(source: str, target: Path) -> None:
        if target.name == "best.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", not_best)
        checkpoints.save(payload(2, best=second), best_before=first)
        assert checkpoints.settle() == first
    assert "best.pt (Input/output error)" in capsys.readouterr().err
    assert load_checkpoint(checkpoints.path(2))["best"] == first == load_checkpoint(tmp_path / "best.pt")["best"]
    checkpoints.save(payload(3, best=second), step=False, best_before=first)
    assert checkpoints.settle() is None
    assert (checkpoints.best_step(), checkpoints.steps()) == (3, [1, 2])


def test_on_the_way_out_of_an_error_it_is_said_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, max_failures=1)
    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(payload(1))
    checkpoints.close()
    assert "warning: cannot write" in capsys.readouterr().err


def test_who_wants_to_leave_at_once_does_not_wait_for_a_disk(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "_PATIENCE_S", 0.05)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1))
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        checkpoints.close()
    assert "leaving before a checkpoint was written" in capsys.readouterr().err
    disk.set()
    checkpoints.wait()


@pytest.mark.parametrize(
    ("milestones", "expected"),
    [
        # 100 images in batches of 8: the epochs' first whole steps are 13, 25, 38, 50, 63, 75, ...
        (None, []),
        (1, [13, 25, 38, 50, 63, 75]),
        (2, [25, 50, 75]),
        ([1, 2.5, 4], [13, 32, 50]),
        ([0.001], [1]),
    ],
)
def test_milestones_are_the_first_steps_by_which_an_epoch_was_seen(
    tmp_path: Path, milestones: Any, expected: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path, milestones=milestones)
    assert [step for step in range(1, 76) if checkpoints.is_milestone(step, 8, 100)] == expected


@pytest.mark.parametrize("milestones", [0, -1, [1, 0], ["x"], float("inf")])
def test_milestones_that_are_no_epochs(tmp_path: Path, milestones: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.milestones=.*: give a number of epochs above 0, for every"):
        Checkpoints(tmp_path, milestones=milestones)


def test_milestones_stay_whatever_is_configured_later(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, milestones=2, background=False)
    for step in range(10, 60, 10):
        checkpoints.save(payload(step), milestone=step in (20, 40))
    assert checkpoints.steps() == [20, 40, 50]
    later = Checkpoints(tmp_path, keep=1, background=False)
    later.save(payload(60))
    assert names(tmp_path) == ["step_000000020.milestone.pt", "step_000000040.milestone.pt", "step_000000060.pt"]
    later.path(60).unlink()
    newest = later.newest()
    assert newest is not None
    assert newest["step"] == 40
    assert find_checkpoint(tmp_path) == later.path(40) == tmp_path / "step_000000040.milestone.pt"


ON_A_DISK = """
import subprocess, sys, torch
from pathlib import Path
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.saving import Checkpoints

def mount(*words):
    subprocess.run(["mount", *words], check=True)

def save(step, megabytes, **options):
    weights = {"w": torch.full((megabytes << 18,), float(step))}
    checkpoints.save({"effnet_train": 1, "step": step, "model": weights, "ema": {}, "meta": {}}, **options)

place, trouble = Path(sys.argv[1]), sys.argv[2]
mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
folder = place / "run"
folder.mkdir()
checkpoints = Checkpoints(folder, keep=1, max_failures=3)
save(1, 1)
checkpoints.settle()
if trouble == "full":
    save(2, 8)
elif trouble == "read-only":
    mount("-o", "remount,ro", str(place))
    save(2, 1)
else:
    subprocess.run(["umount", str(place)], check=True)
    save(2, 1)
checkpoints.settle()
print("steps", checkpoints.steps() if trouble != "gone" else sorted(place.iterdir()))
if trouble == "read-only":
    mount("-o", "remount,rw", str(place))
elif trouble == "gone":
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    folder.mkdir()
save(3, 1)
checkpoints.settle()
print("steps", checkpoints.steps(), load_checkpoint(checkpoints.path(3))["model"]["w"].sum().item(), len(list(folder.iterdir())))
for step in (4, 5, 6, 7):
    try:
        save(step, 8)
    except OSError as error:
        print("ended before", step, error)
        break
"""  # noqa: E501


@pytest.mark.parametrize("trouble", ["full", "read-only", "gone"])
def test_on_a_real_disk_that_is_full_or_read_only_or_gone(tmp_path: Path, trouble: str) -> None:
    """It is told, tried again, and well when the disk is; a save that never fits ends the run, the last one intact."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: user namespaces are not allowed")
    command = [*space, sys.executable, "-c", ON_A_DISK, str(tmp_path), trouble]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after, again, ended = done.stdout.splitlines()
    assert after == ("steps []" if trouble == "gone" else "steps [1]")
    assert again == f"steps [3] {3.0 * (1 << 18)} 1"
    assert "ended before 7 cannot write" in ended
    assert "bytes are free on that disk), at 3 steps in a row; the checkpoints before it are intact" in ended
    reason = {"full": "free on that disk", "read-only": "Read-only file system", "gone": "No such file or directory"}
    first = done.stderr.splitlines()[0]
    assert first.startswith("warning: cannot write")
    assert f"{reason[trouble]}); the one before is intact, training goes on" in first


def test_logs_are_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that dies resumes past rows that were only in its memory."""
    (tmp_path / "tensorboard").mkdir()
    files = ["metrics.csv", "metrics.jsonl", "faults.jsonl", "tensorboard/events.out.tfevents.1"]
    for name in files:
        (tmp_path / name).touch()
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(place: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{place}"), tmp_path))
        fsync(place)

    def replaced(source: str, target: Path) -> None:
        done.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    Checkpoints(tmp_path, background=False).save(payload(1), best_before={})
    assert sorted(done[:4]) == sorted(files)
    assert [text for text in done if text.startswith("rename")] == ["rename best.pt", "rename step_000000001.pt"]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return fsspec's file system in memory, empty."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def in_store(store: Any) -> list[str]:
    return sorted(store.find("/bucket/run"))


def anything(_: Path) -> None:
    """Accept whatever configuration there is."""


def run_on(machine: Path, check: Callable[[Path], None] = anything, **options: Any) -> Checkpoints:
    folder = machine / "run"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, remote="memory://bucket", background=False, **options)
    checkpoints.fetch(check)
    return checkpoints


def test_another_machine_goes_on_from_the_copy_elsewhere(tmp_path: Path, store: Any) -> None:
    first = run_on(tmp_path / "1", keep=2)
    (first.folder / "config.yaml").write_text("seed: 0")
    (first.folder / ".hidden").write_text("of this machine")
    first.announce()
    assert in_store(store) == ["/bucket/run/config.yaml"]
    events = first.folder / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    for step in (1, 2, 3, 4):
        (first.folder / "faults.jsonl").write_text(f"{step}")
        events.write_text(f"{step}")
        first.save(payload(step), milestone=step == 1, best_before={} if step == 3 else None)
    files = ["best.pt", "config.yaml", "faults.jsonl", "step_000000001.milestone.pt"]
    files += ["step_000000003.pt", "step_000000004.pt", "tensorboard/events.out.tfevents.1"]
    assert in_store(store) == [f"/bucket/run/{name}" for name in files]

    second = run_on(tmp_path / "2", keep=2)
    newest = second.newest()
    assert newest is not None
    assert newest["step"] == 4
    assert torch.equal(newest["model"]["w"], payload(4)["model"]["w"])
    assert second.best_step() == 3
    assert (
        (second.folder / "faults.jsonl").read_text()
        == "4"
        == (second.folder / events.relative_to(first.folder)).read_text()
    )
    second.save(payload(5))
    # Back on the first, whose own is older now; and what is newest here is not fetched.
    assert run_on(tmp_path / "1").steps() == [1, 3, 4, 5]
    newer = run_on(tmp_path / "3")
    newer.save(payload(7))
    store.rm_file("/bucket/run/step_000000007.pt")
    (newer.folder / "faults.jsonl").write_text("mine")
    assert run_on(tmp_path / "3").steps() == [5, 7]
    assert (newer.folder / "faults.jsonl").read_text() == "mine"


def test_a_damaged_one_elsewhere_is_passed_over(tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_on(tmp_path / "1")
    for step in (1, 2):
        first.save(payload(step))
    store.pipe_file("/bucket/run/step_000000002.pt", store.cat_file("/bucket/run/step_000000002.pt")[:-500])
    assert run_on(tmp_path / "2").steps() == [1]
    assert "step_000000002.pt is damaged" in capsys.readouterr().err
    assert names(tmp_path / "2" / "run") == ["step_000000001.pt"]


def test_a_copy_of_another_configuration_changes_nothing_here(tmp_path: Path, store: Any) -> None:
    first = run_on(tmp_path / "1")
    (first.folder / "config.yaml").write_text("seed: 0")
    first.save(payload(1))

    def other(folder: Path) -> None:
        raise ValueError((folder / "config.yaml").read_text())

    with pytest.raises(ValueError, match="seed: 0"):
        run_on(tmp_path / "2", other)
    assert not names(tmp_path / "2" / "run")
    assert run_on(tmp_path / "2").steps() == [1]
    assert not list((tmp_path / "2" / "run").glob(".*"))


def test_a_store_that_fails_is_told_and_counted_and_what_is_here_is_written(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run_on(tmp_path, max_failures=2)

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", down)
        checkpoints.save(payload(1))
        told = capsys.readouterr().err
        assert "cannot copy to memory://bucket/run (RemoteError: cannot write memory://bucket/run/step_" in told
        assert "(ConnectionError: no route)); the one before is intact, training goes on" in told
        with pytest.raises(OSError, match="at 2 steps in a row"):
            checkpoints.save(payload(2))
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(payload(3))
    assert not checkpoints.failed_steps
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "find", down)
        message = (
            r"checkpoint\.remote=memory://bucket/run: cannot read .*run after .* \(ConnectionError: no route\): try"
        )
        with pytest.raises(ValueError, match=message):
            run_on(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.remote=nosuch://x: nosuch://x/.*nosuch:// is not known"):
        Checkpoints(tmp_path, remote="nosuch://x").fetch(anything)
    with pytest.raises(ValueError, match=r"checkpoint\.remote=/there is no URL: give s3://bucket/folder"):
        Checkpoints(tmp_path, remote="/there").fetch(anything)


IN_S3 = """
import sys, torch
from pathlib import Path
from effnet_train.engine.saving import Checkpoints

def run_on(machine, remote="s3://bucket/runs", **options):
    folder = Path(machine) / "run"
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text("seed: 0")
    checkpoints = Checkpoints(folder, remote=remote, keep=1, **options)
    checkpoints.fetch(lambda folder: print((folder / "config.yaml").read_text()))
    checkpoints.announce()
    return checkpoints

def save(checkpoints, step):
    weights = {"w": torch.full((3 << 20,), float(step))}  # 12 MB, in several parts
    checkpoints.save({"effnet_train": 1, "step": step, "model": weights, "ema": {}, "meta": {}})

if __name__ == "__main__":
    first = run_on(sys.argv[1] + "/1")
    for step in (1, 2):
        save(first, step)
    first.close()
    print(first.newest()["model"]["w"].mean().item(), first.steps())
    second = run_on(sys.argv[1] + "/2")
    print(second.newest()["model"]["w"].mean().item(), second.steps())
    try:
        run_on(sys.argv[1] + "/3", remote="s3://absent/runs")
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_a_copy_in_s3(s3: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", IN_S3, str(tmp_path)]
    done = subprocess.run(command, env=s3.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, refused = done.stdout.splitlines()
    assert lines == ["2.0 [2]", "seed: 0", "2.0 [2]"]
    assert done.stderr.splitlines()[0] == "goes on from s3://bucket/runs/run/step_000000002.pt"
    assert "checkpoint.remote=s3://absent/runs" in refused
    assert "bucket does not exist" in refused


def test_a_disk_that_hangs_is_one_that_fails(
    tmp_path: Path, disk: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes on, its best is the one that is there, and after `max_failures` it ends; what comes late counts."""
    checkpoints = Checkpoints(tmp_path, max_failures=2)
    checkpoints.patience_s = 0.2
    checkpoints.save(payload(1))
    assert checkpoints.settle() is None
    checkpoints.save(payload(2), best_before={"step": 0})
    assert "has not been written for 0 s and more: the disk hangs" in capsys.readouterr().err
    assert checkpoints.settle() == {"step": 0}
    with pytest.raises(OSError, match="at 2 steps in a row"):
        checkpoints.save(payload(3))
    with pytest.raises(OSError, match="the checkpoints before it are intact"):
        checkpoints.save(payload(3), must=True)
    checkpoints.close()
    assert "leaving before a checkpoint was written" in capsys.readouterr().err
    disk.set()
    checkpoints.patience_s = 30
    checkpoints.settle()
    assert checkpoints.steps() == [1]
    checkpoints.save(payload(4))
    checkpoints.settle()
    assert checkpoints.steps() == [1, 4]
    assert not checkpoints.failed_steps
