"""A run goes on with other ranks or micro-batches than it began with: the same images, and weights up to rounding."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_train.engine.checkpoint import load_checkpoint

STEPS = 8
# What each rank reads, step by step, as it is told to: patched into each process.
RECORD = """
import json, os
from effnet_train.data.order import Order
batch = Order.batch
def recorded(self, step):
    indices, keys = batch(self, step)
    with open(os.path.join(os.environ["SEEN"], f"{self.world_size}-{self.rank}.jsonl"), "a") as file:
        file.write(json.dumps([step, indices.tolist(), keys.tolist()]) + "\\n")
    return indices, keys
Order.batch = recorded
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains by the real command and returns the run's folder."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(RECORD)

    def train(name: str, *overrides: str) -> Path:
        script, seen = Path(sys.executable).with_name("effnet-train"), tmp_path / f"seen-{name}"
        seen.mkdir(exist_ok=True)
        fixed = ("recipe=demo", "device=cpu", "model.width=0.25", "batch_size=48", "workers=0", "threads=1")
        often = [f"{key}={{steps: 1, epochs: null}}" for key in ("log_every", "save_every")]
        never = ("evaluate_every={steps: 100, epochs: null}", "loggers.tensorboard=null", f"max_steps={STEPS}")
        path = f"{site}:{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            [str(script), *fixed, *often, *never, "run_root=.", f"name={name}", *overrides],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SEEN": str(seen)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return train


def images(folder: Path) -> dict[int, list[list[int]]]:
    """Return the images and keys of each step's global batch, its ranks' parts one after another."""
    found: dict[int, list[list[int]]] = {}
    # By ranks of one start; the starts have no step in common.
    for file in sorted((folder.parent / f"seen-{folder.name}").iterdir()):
        for line in file.read_text().splitlines():
            step, *part = json.loads(line)
            found[step] = [a + b for a, b in zip(found.get(step, [[], []]), part, strict=True)]
    return found


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def tensors(folder: Path) -> dict[str, Any]:
    payload = load_checkpoint(folder / f"step_{STEPS:09d}.pt")
    assert payload["step"] == STEPS
    return {f"{part}.{name}": value for part in ("model", "ema") for name, value in payload[part].items()}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest distance of two tensors, as a part of what the one is long."""
    assert one.keys() == other.keys()
    return max(
        float(torch.dist(tensor.double(), other[name].double()) / tensor.double().norm().clamp(min=1e-3))
        for name, tensor in one.items()
    )


@pytest.mark.slow
def test_another_number_of_ranks(run: Callable[..., Path]) -> None:
    """One and then two, two and then one: as one rank alone, where BatchNorm's statistics are those of all."""
    whole = run("whole", "ranks=1", "sync_bn=all")
    assert sorted(images(whole)) == list(range(STEPS))
    for first, then in ((1, 2), (2, 1)):
        run(f"from-{first}", f"ranks={first}", "sync_bn=all", f"max_steps={STEPS // 2}")
        parts = run(f"from-{first}", f"ranks={then}", "sync_bn=all")
        assert images(parts) == images(whole)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
        assert distance(tensors(whole), tensors(parts)) < 1e-3
    # Each rank with statistics of its own is far from it: the tolerance tells.
    run("apart", "ranks=2", "sync_bn=2", f"max_steps={STEPS // 2}")
    apart = run("apart", "ranks=2", "sync_bn=0")
    assert images(apart) == images(whole)
    assert distance(tensors(whole), tensors(apart)) > 1e-2


@pytest.mark.slow
def test_another_accumulation(run: Callable[..., Path]) -> None:
    """Of the same global batch: half the ranks, with two micro-batches each, train on the same parts of it.

    The weights are the same up to rounding. BatchNorm's running averages are not: they take one part after the other,
    where those of two ranks take the mean of both.
    """
    whole = run("whole", "ranks=2")
    run("parts", "ranks=2", f"max_steps={STEPS // 2}")
    parts = run("parts", "ranks=1", "accumulate=2")
    assert images(parts) == images(whole)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    one, other = (
        {name: value for name, value in tensors(folder).items() if "running" not in name} for folder in (whole, parts)
    )
    assert distance(one, other) < 1e-3
