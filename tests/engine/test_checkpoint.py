"""A checkpoint is whole, or it is not there; and reading one runs nothing."""

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from effnet_train.engine.checkpoint import (
    CheckpointError,
    Checkpoints,
    Weights,
    export_safetensors,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    write_atomically,
)

META = {
    "model": {"_target_": "m"},
    "preprocess": {"resolution": 8, "mean": [0.5, 0.25, 0.1]},
    "classes": ["a", "b"],
    "data": {},
}


def payload(step: int = 3) -> dict[str, Any]:
    model = {"w": torch.full((64, 64), float(step)), "n": torch.tensor(7)}
    ema = {"w": torch.full((64, 64), step + 0.5), "n": torch.tensor(7)}
    return {"effnet_train": 1, "step": step, "model": model, "ema": ema, "meta": META}


def test_the_last_k_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False)
    for step in (5, 10, 100):
        checkpoints.save(payload(step))
    assert checkpoints.steps() == [10, 100]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["step"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010.pt", "step_000000100.pt"]


def test_damaged_ones_of_later_steps_do_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=False)
    for step in (100, 200):
        Checkpoints(tmp_path, background=False).save(payload(step))
    checkpoints.path(300).write_bytes(b"damaged")
    checkpoints.save(payload(250))
    assert checkpoints.steps() == [250, 300]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(payload(1))
    for name in (".step_000000002.pt-x1_y", ".best.pt-abc", ".other"):
        (tmp_path / name).write_bytes(b"half")
    checkpoints.clear_unfinished()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "step_000000001.pt"]


def test_an_interrupted_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def half(file: Any) -> None:
        file.write(b"aft")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failing_save_is_told_and_ends_the_run_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, max_failures=3, background=False)
    checkpoints.save(payload(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(payload(2))
        checkpoints.save_best(payload(2))  # of the same step: one failure
        checkpoints.save(payload(3))
        assert "No space left on device" in capsys.readouterr().err
        with pytest.raises(OSError, match=r"No space left on device.*at 3 steps in a row.*intact"):
            checkpoints.save(payload(4))
    assert checkpoints.steps() == [1]
    checkpoints.save(payload(5))
    assert not checkpoints.failed_steps
    assert checkpoints.steps() == [1, 5]


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


def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make writing wait for the event that is returned."""
    event, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (event.wait(30), fsync(file))[1])
    return event


def test_in_the_background_what_is_written_is_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, checkpoints = slow(monkeypatch), Checkpoints(tmp_path, background=True)
    weights, scores = torch.arange(5.0), {"top1": 0.5}
    checkpoints.save({**payload(1), "model": {"w": weights, "t": weights[:2]}, "best": scores})
    weights += 1
    scores["top1"] = 0.75
    assert checkpoints.steps() == []
    go_on.set()
    checkpoints.settle()
    written = load_checkpoint(checkpoints.path(1))
    assert written["model"]["w"].tolist() == [0, 1, 2, 3, 4]
    assert written["model"]["t"].tolist() == [0, 1]
    assert written["best"] == {"top1": 0.5}
    # The memory is used again, and only when the former is on the disk.
    for step in (2, 3, 4):
        checkpoints.save({**payload(step), "model": {"w": weights, "t": weights[:2]}, "best": scores})
        weights += 1
    checkpoints.close()
    assert [load_checkpoint(checkpoints.path(step))["model"]["w"][0].item() for step in (2, 3, 4)] == [1, 2, 3]


def test_a_checkpoint_that_must_be_there_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, background=True)
    go_on = slow(monkeypatch)
    checkpoints.save(payload(1))
    assert checkpoints.steps() == []
    threading.Timer(0.2, go_on.set).start()
    checkpoints.save(payload(2), must=True)
    assert checkpoints.steps() == [1, 2]


def test_failures_in_the_background_are_told_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, max_failures=2, background=True)
    checkpoints.save(payload(1))
    checkpoints.settle()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(payload(2))
    assert capsys.readouterr().err == ""
    checkpoints.save(payload(3))
    assert "step_000000002.pt (No space left on device); the one before is intact" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"step_000000003.pt \(No space .*at 2 steps in a row"):
        checkpoints.save(payload(4))
    checkpoints.save(payload(5))
    checkpoints.close()  # an error on the way out would hide the reason of the way out
    assert "warning: cannot write" in capsys.readouterr().err
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]


def test_a_folder_that_has_vanished_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "mount", background=False)
    with pytest.raises(OSError, match=r"cannot write .*No such file or directory"):
        checkpoints.save(payload(1), must=True)


def test_multiples_of_the_period_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, keep_period=30, background=False)
    for step in range(10, 110, 10):
        checkpoints.save(payload(step))
    assert checkpoints.steps() == [30, 60, 90, 100]
    with pytest.raises(ValueError, match=r"checkpoint.keep_period=0 must be a number of steps, or null"):
        Checkpoints(tmp_path, keep_period=0)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "created"
    torch.save({"effnet_train": 1, "x": Hostile(target)}, tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(target), protocol=2))
    for name in ("hostile.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=r"damaged, or holds code, which is never run"):
            load_checkpoint(tmp_path / name)
    assert not target.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of effnet_train"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"neither best\.pt nor step_"):
        find_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "model.safetensors")


def test_a_folder_means_its_best_or_its_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(payload(1))
    checkpoints.save(payload(2))
    assert find_checkpoint(tmp_path) == checkpoints.path(2)
    checkpoints.save_best(payload(1))
    assert find_checkpoint(tmp_path).name == "best.pt"


def test_raw_and_averaged_weights_and_the_export_agree(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save_best(payload(3))
    ema, raw = load_weights(tmp_path), load_weights(tmp_path, "raw")
    assert ema.tensors["w"][0, 0] == 3.5
    assert raw.tensors["w"][0, 0] == 3.0
    export_safetensors(tmp_path / "model.safetensors", Weights(ema.tensors, ema.meta))
    again = load_weights(tmp_path / "model.safetensors")
    assert again.meta == {**META, "step": 3} == ema.meta
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in ema.tensors.items())
    with pytest.raises(ValueError, match="weights=best is not known: use ema or raw"):
        load_weights(tmp_path, "best")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{}", "its metadata say nothing of its model, preprocess, classes"),
        ("[]", "its metadata say nothing of its model"),
        ("nonsense", "Expecting value"),
        ('{"model": {}, "preprocess": {"resolution": 8, "std": [NaN, 1, 1]}, "classes": []}', "must be finite numbers"),
        ('{"model": {}, "preprocess": {"size": 8}, "classes": []}', "unexpected keyword argument 'size'"),
        (
            '{"model": {}, "preprocess": {"resolution": 8}, "classes": ["a"], "names": "keras"}',
            "the names of 'keras', which is not",
        ),
        (
            '{"model": {"_x": 1}, "preprocess": {"resolution": 8}, "classes": ["a"], "names": "timm"}',
            "unexpected keyword argument",
        ),
    ],
)
def test_metadata_that_say_too_little_or_nonsense(tmp_path: Path, meta: str, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"conv_stem.weight": torch.zeros(2)}, path, {"effnet_train": meta})
    with pytest.raises(CheckpointError, match=f"checkpoint {path}: .*{message}"):
        load_weights(path)
    torch.save({"effnet_train": 1, "step": 1, "model": {}, "ema": {}, "meta": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="say nothing of its model"):
        load_weights(tmp_path / "x.pt")
