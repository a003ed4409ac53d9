"""What goes wrong outside a process: disks, ranks. Nothing that was saved is lost."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from effnet_train.engine.checkpoint import load_checkpoint

Command = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("debug=tiny", "device=cpu", "threads=1", "model.width=0.25", "name=run", "save_every.steps=1")

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is a disk of 10 MiB: room for two checkpoints and one that is being written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(["mount", *options], capture_output=True, text=True)
    if not mounted or mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip() if mounted else 'there is no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(command: Command, small_disk: Path) -> None:
    arguments = (*TINY, f"run_root={small_disk}", "loggers=none", "evaluate_every.steps=6")
    first = command("effnet-train", *arguments, "max_steps=1")
    assert first.returncode == 0, first.stderr
    checkpoint = small_disk / "run" / "step_000000001.pt"
    before = checkpoint.read_bytes()
    (small_disk / "other").write_bytes(bytes(3 << 20))  # and now not even for that

    full = command("effnet-train", *arguments, "max_steps=6")
    assert full.returncode == 1  # a start anew may help
    assert f"warning: cannot write {small_disk}/run/step_000000002.pt (" in full.stderr
    assert "the one before is intact, training goes on" in full.stderr
    assert full.stderr.count("warning: cannot write") == 2
    assert "at 3 steps in a row; the checkpoints before it are intact" in full.stderr
    assert checkpoint.read_bytes() == before
    assert load_checkpoint(small_disk / "run" / "best.pt")["step"] == 1
    assert not [path for path in (small_disk / "run").iterdir() if path.name.startswith(".")]  # nothing half-written

    # Not even a byte is left: what the loggers cannot write is an error with a remedy too.
    with (small_disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(bytes(4096)))
    logged = ("loggers=default", "~loggers.tensorboard")
    without = tuple(text for text in arguments if text != "loggers=none")
    brimful = command("effnet-train", *without, *logged, "max_steps=6")
    assert brimful.returncode == 2
    assert "No space left on device" in brimful.stderr
    assert "make room there; what was saved is intact, and the same command goes on from it" in brimful.stderr
    assert "Traceback" not in brimful.stderr
    assert checkpoint.read_bytes() == before

    (small_disk / "filling").unlink()
    (small_disk / "other").unlink()
    (small_disk / "run" / "model.safetensors").unlink()
    (small_disk / "run" / "best.pt").unlink()
    made_room = command("effnet-train", *arguments, "max_steps=2", "checkpoint.keep=1")
    assert made_room.returncode == 0, made_room.stderr
    assert load_checkpoint(small_disk / "run" / "step_000000002.pt")["step"] == 2


def test_a_disk_that_can_only_be_read(command: Command, small_disk: Path) -> None:
    arguments = (*TINY, f"run_root={small_disk}", "loggers=none", "max_steps=1")
    assert command("effnet-train", *arguments).returncode == 0
    assert subprocess.run(["mount", "-o", "remount,ro", str(small_disk)]).returncode == 0
    for name in ("run", "another"):
        refused = command("effnet-train", *arguments, f"name={name}")
        assert refused.returncode == 2
        assert f"cannot write to the run's folder {small_disk}/{name} (" in refused.stderr
        assert "choose another place with run_root=..." in refused.stderr
    scored = command("effnet-eval", f"checkpoint={small_disk}/run", "device=cpu", "workers=0")
    assert scored.returncode == 0, scored.stderr
    assert f"warning: not written to {small_disk}/run/eval.json (Read-only file system): give output=" in scored.stderr
    assert scored.stdout.splitlines()[-1].startswith('{"checkpoint"')
    refused = command("effnet-eval", f"checkpoint={small_disk}/run", "device=cpu", f"output={small_disk}/score.json")
    assert refused.returncode == 2


def test_every_rank_stops_at_a_loss_that_is_not_finite(command: Command, tmp_path: Path) -> None:
    hot = ("optim=sgd", "schedule=constant", "schedule.lr_per_256=1e20", "log_every.steps=1", "loggers=none")
    stopped = command("effnet-train", *TINY, *hot, "max_steps=20", "evaluate_every.steps=20", "ranks=2")
    assert stopped.returncode == 2, stopped.stderr
    assert "is not a finite number at step " in stopped.stderr
    assert "with a lower schedule.lr_per_256" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    for path in (tmp_path / "runs" / "debug" / "run").glob("step_*.pt"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)["model"].values())


def test_an_error_of_all_ranks_keeps_status_and_message(command: Command, tmp_path: Path) -> None:
    refused = command("effnet-train", *TINY, "ranks=2", "data=folder", "data.root=nowhere")
    assert refused.returncode == 2
    assert "error: data.root=nowhere does not exist: set it to a folder that holds train/ and val/" in refused.stderr
    assert "Traceback" not in refused.stderr
    indivisible = command("effnet-train", *TINY, "ranks=2", "batch_size=17")
    assert indivisible.returncode == 2
    assert indivisible.stderr.count("error: batch_size=17 (global) is no multiple of 2 (2 ranks") == 1


def test_a_hostile_pickle_named_as_ones_own_checkpoint_is_passed_over(command: Command, tmp_path: Path) -> None:
    """In a run's own folder, where resuming would read it."""
    arguments = (*TINY, "loggers=none")
    assert command("effnet-train", *arguments, "max_steps=1").returncode == 0
    folder, mark = tmp_path / "runs" / "debug" / "run", tmp_path / "mark"
    program = (
        "import sys, torch, pathlib\n"
        "class Hostile:\n"
        "    def __reduce__(self): return (pathlib.Path.touch, (pathlib.Path(sys.argv[1]),))\n"
        "torch.save({'effnet_train': 1, 'model': Hostile()}, sys.argv[2])\n"
    )
    hostile = folder / "step_000000002.pt"
    subprocess.run([sys.executable, "-c", program, str(mark), str(hostile)], check=True, env={**os.environ})
    resumed = command("effnet-train", *arguments, "max_steps=3")
    assert resumed.returncode == 0, resumed.stderr
    assert "step_000000002.pt cannot be read as plain tensors" in resumed.stderr
    assert "trying the one before" in resumed.stderr
    assert not mark.exists()
