"""A checkpoint is whole, or it is not there; and reading one runs nothing."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from effnet_train.engine.checkpoint import (
    CheckpointError,
    Weights,
    export_safetensors,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    write_atomically,
)
from effnet_train.engine.saving import Checkpoints

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
    checkpoints.save(payload(1), step=False, best_before={})
    assert find_checkpoint(tmp_path).name == "best.pt"


def test_raw_and_averaged_weights_and_the_export_agree(tmp_path: Path) -> None:
    Checkpoints(tmp_path, background=False).save(payload(3), step=False, best_before={})
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


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(OSError(errno.EIO, "Input/output error"), id="disk"),
        pytest.param(OSError(errno.ESTALE, "Stale file handle"), id="mount"),
        pytest.param(PermissionError(errno.EACCES, "Permission denied"), id="access"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), id="memory"),
    ],
)
def test_what_cannot_be_read_just_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """Else the checkpoint before it would be taken up, on the one rank whose mount had a fault."""
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(payload(1))
    checkpoints.save(payload(2))
    load = torch.load

    def failing(path: Path, **options: Any) -> Any:
        if path.name == "step_000000002.pt":
            raise fault
        return load(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", failing)
        with pytest.raises(MemoryError if isinstance(fault, RuntimeError) else OSError, match=str(fault.args[-1])):
            checkpoints.newest()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["step"] == 2


def test_a_damaged_file_whose_offsets_lead_nowhere_is_damaged(tmp_path: Path) -> None:
    """Python says OSError of such a seek: it is the file's fault."""
    path = tmp_path / "step_000000001.pt"
    torch.save(payload(), path)
    data = bytearray(path.read_bytes())
    data[-46] = 128  # in the place of the zip's directory
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
