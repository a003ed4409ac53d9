"""Whole runs whose pixels the device makes: those of the CPU path, stopped and resumed, evaluated and predicted."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_train.data.loader import Batch
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.state import TrainState
from effnet_train.engine.train import Stepper

Train = Callable[..., Path]
AUGMENTED = ("augment=autoaugment", "augment.erase=0.3")


def same(one: Any, other: Any) -> bool:
    """Compare nested plain values and tensors, bit for bit; which backend it was does not count."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "backend")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def end(folder: Path, step: int = 4) -> dict[str, Any]:
    return load_checkpoint(folder / f"step_{step:09d}.pt")


@pytest.fixture
def on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU be the device."""
    monkeypatch.setattr("effnet_train.cli.rank.check_device", lambda *arguments: None)


@pytest.mark.usefixtures("on_trial")
def test_a_run_is_bit_for_bit_that_of_the_cpu_path(train: Train) -> None:
    # The digits are PNG, which both decode and scale by Pillow: all of the rest is the device's.
    ours = train("device", *AUGMENTED, "data.backend=nvjpeg")
    theirs = train("cpu", *AUGMENTED, "data.backend=pillow")
    assert same(end(ours), end(theirs))
    assert not same(end(ours), end(train("other", *AUGMENTED, "data.backend=pillow", "augment.erase=0.2")))


@pytest.mark.usefixtures("on_trial")
@pytest.mark.parametrize("more", [(), ("workers=1", "accumulate=2", "mixing.mixup_alpha=0.2")], ids=["", "more"])
def test_stop_and_resume_gives_the_same_bits(train: Train, more: tuple[str, ...]) -> None:
    options = (*AUGMENTED, "data.backend=nvjpeg", *more)
    whole = train("whole", *options)
    train("parts", *options, "max_steps=2")
    assert same(end(whole), end(train("parts", *options)))


def test_a_cpu_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.backend=nvjpeg works on a GPU, and device=cpu is none"):
        train("refused", "data.backend=nvjpeg")
    assert not (tmp_path / "refused").exists()


# --- on a GPU, through the commands ---


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Return a folder of JPEGs, and of a PNG in each class, to train and evaluate on."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for name in ("ant", "bee"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(6, 8, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((90 + number, 70 + 2 * number), Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.{'png' if number == 3 else 'jpg'}")
    return tmp_path / "images"


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a command of this checkout and asserts that it succeeds."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", f"effnet_train.cli.{name}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_stop_and_resume_gives_the_same_bits(
    command: Callable[..., Any], jpegs: Path, tmp_path: Path, precision: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    options = [
        *("debug=tiny", "data=folder", f"data.root={jpegs}", "data.backend=nvjpeg", "augment=autoaugment"),
        *("augment.erase=0.3", "batch_size=8", "model.resolution=64", f"precision={precision}", "device=cuda"),
        *("workers=2", f"run_root={tmp_path}", "loggers=none", "ranks=1", "epochs=2"),
    ]
    command("train", *options, "name=whole")
    command("train", *options, "name=parts", "max_steps=2")
    command("train", *options, "name=parts")
    assert same(end(tmp_path / "whole"), end(tmp_path / "parts"))
    assert not same(end(tmp_path / "whole", 2)["model"], end(tmp_path / "whole")["model"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_no_step_waits_for_the_gpu(train: Train, jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    call, steps = Stepper.__call__, []

    def checked(self: Stepper, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        assert all(part.images.is_cuda for part in batch)
        if state.step >= 2:  # by then all is allocated and every algorithm chosen
            steps.append(state.step)
            torch.cuda.set_sync_debug_mode("error")
        try:
            return call(self, state, batch, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "__call__", checked)
    options = ("data=folder", f"data.root={jpegs}", "data.backend=nvjpeg", "model.resolution=64", "batch_size=8")
    never = ("evaluate_every.steps=100", "save_every.steps=100", "log_every.steps=100", "max_steps=8", "epochs=9")
    train("run", *AUGMENTED, *options, *never, "device=cuda")
    assert steps == [2, 3, 4, 5, 6, 7]


@pytest.mark.gpu
def test_on_a_gpu_evaluation_and_prediction(command: Callable[..., Any], jpegs: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    where = ("device=cuda", "precision=fp32", "workers=1")
    options = ("debug=tiny", "data=folder", f"data.root={jpegs}", "model.resolution=64", "batch_size=8", "ranks=1")
    command("train", *options, *where, f"run_root={tmp_path}", "name=run", "data.backend=nvjpeg", "loggers=none")
    for crops in (1, 5):
        lines = []
        for backend in ("nvjpeg", "pillow"):
            words = (f"checkpoint={tmp_path / 'run'}", f"data.backend={backend}", f"crops={crops}", "ranks=1", *where)
            command("eval", *words, f"output={tmp_path / backend}.json")
            lines.append((tmp_path / f"{backend}.json").read_text())
        found, expected = map(json.loads, lines)
        assert found["loss"] == pytest.approx(expected["loss"], abs=0.05)
    shutil.copy(jpegs / "val" / "ant" / "0.jpg", tmp_path / "photo.jpg")
    words = (f"checkpoint={tmp_path / 'run'}", "backend=nvjpeg", "format=jsonl", "cam=maps", *where)
    done = command("predict", str(jpegs / "val"), str(tmp_path / "photo.jpg"), *words)
    assert len(done.stdout.splitlines()) == 9
    assert len(list((tmp_path / "maps").iterdir())) == 9
