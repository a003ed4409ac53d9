"""The installed commands, as a user meets them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.cli.app import CONFIG_DIR

Command = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("debug=tiny", "device=cpu", "threads=1", "loggers=none", "max_steps=2", "model.width=0.25")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("train", ["--help"], ["model: b0, b1, b2", "width: 1.0", 'eval "$(effnet-train -sc install=bash)"']),
        ("eval", ["--cfg", "job"], ["checkpoint: ???", "weights: ema"]),
        ("label", ["--help"], ["effnet-label: a teacher's pseudo-labels", "confidence: 0.3"]),
        ("predict", ["cat.jpg", "--help"], ["effnet-predict [IMAGE | FOLDER | -]...", "format: table"]),
        ("predict", ["--cfg", "job", "--", "a=b.jpg"], ["checkpoint: ???", "top: 5"]),
    ],
)
def test_help_and_configuration_come_without_torch(name: str, arguments: list[str], expected: list[str]) -> None:
    """In a process of their own, and quickly: nothing heavy is imported for them."""
    program = (
        f"import sys; sys.argv = ['effnet-{name}', *{arguments}]\n"
        f"from effnet_train.cli.{name} import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(), 'something heavy was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout


def test_a_run_from_its_command_to_its_score(command: Command, tmp_path: Path) -> None:
    """`debug=tiny` as it stands, the same command again, and `effnet-eval` on its folder."""
    arguments = ("debug=tiny", "device=cpu", "threads=1", "model.width=0.25", "name=tiny")
    done = command("effnet-train", *arguments)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "debug" / "tiny"
    assert "done: 4 steps" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.csv", "metrics.jsonl", "tensorboard", "summary.json"),
        *("step_000000002.pt", "step_000000004.pt", "best.pt", "model.safetensors", "model.json"),
    }
    # Nothing but the run and the data: Hydra leaves no folders of its own.
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data"}
    assert re.search(r"epoch 0/1  step 4/4  loss \d.*images/s", done.stdout)  # a line, where there is no terminal

    scored = command("effnet-eval", "checkpoint=runs/debug/tiny", "device=cpu", "workers=0")
    assert scored.returncode == 0, scored.stderr
    record = json.loads(scored.stdout.splitlines()[-1])
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert record["loss"] == pytest.approx(best["val_ema/loss"], rel=1e-6)
    assert record["images"] == 364


@pytest.mark.slow
def test_ranks_give_the_identical_counts(command: Command, tmp_path: Path) -> None:
    done = command("effnet-train", *TINY, "name=run", "ranks=2")
    assert done.returncode == 0, done.stderr
    scores, details = [], []
    for ranks in ("1", "2"):
        views = ("crops=5", "flip=true", f"details=details-{ranks}", f"ranks={ranks}")
        scored = command("effnet-eval", "checkpoint=runs/debug/run", "device=cpu", "workers=0", *views)
        assert scored.returncode == 0, scored.stderr
        scores.append(json.loads(scored.stdout.splitlines()[-1]))
        details.append((tmp_path / f"details-{ranks}" / "confusion.csv").read_text())
    one, two = scores
    assert details[0] == details[1]
    for key in ("top1", "top5", "images", "skipped", "step"):
        assert one[key] == two[key]
    for key in ("loss", "ece"):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    assert sum(line.startswith("{") for line in scored.stdout.splitlines()) == 1  # one rank speaks


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    arguments = [*TINY, "name=run"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "effnet_train.cli.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 2 steps") == 1


@pytest.mark.slow
def test_a_sweep_gives_each_run_its_folder(command: Command, tmp_path: Path) -> None:
    done = command("effnet-train", "-m", *TINY[:-1], "model.width=0.25,0.3", "seed=0,1")
    assert done.returncode == 0, done.stderr
    folders = {path.parent.name for path in (tmp_path / "runs" / "debug").glob("*/summary.json")}
    stem = "nano-digits-efficientnet"
    assert folders == {f"{stem}-seed{seed}-model.width_{width}" for seed in (0, 1) for width in (0.25, 0.3)}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data"}


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_that_cannot(command: Command, tmp_path: Path) -> None:
    done = command("effnet-train", "-m", *TINY, "augment.flip=3,0.5")
    assert done.returncode == 2
    assert "effnet-train: error: augment.flip=3 must be a probability: from 0 to 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.parent.name for path in (tmp_path / "runs" / "debug").glob("*/summary.json")] == [
        "nano-digits-efficientnet-seed0-model.width_0.25-augment.flip_0.5"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("effnet-train model=b", {f"model=b{i}" for i in range(8)}),
        ("effnet-train recipe=", {f"recipe={path.stem}" for path in (CONFIG_DIR / "recipe").glob("*.yaml")}),
        ("effnet-train schedule.dec", {"schedule.decay=", "schedule.decay_epochs="}),
    ],
)
def test_the_shell_completes(tmp_path: Path, line: str, offered: set[str]) -> None:
    """Bash itself: the installed function is asked as the completion key asks it."""
    words = line.split()
    program = f"""
        eval "$(effnet-train -sc install=bash)"
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


@pytest.mark.slow
def test_errors_of_the_real_command(command: Command, tmp_path: Path) -> None:
    for arguments, message in (
        (["model=b9"], "effnet-train: error: model=b9 is not known: did you mean model=b7 or"),
        (["modle=b0"], "effnet-train: error: modle is not a key of the configuration: did you mean model?"),
        (["model.width=abc"], "effnet-train: error: model.width='abc' must be a finite number"),
        (["data=folder"], "effnet-train: error: data.root has no value: give data.root=... on the command line"),
    ):
        done = command("effnet-train", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert everything(tmp_path) == set()


def test_whoever_wants_the_traceback_gets_it(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done: Any = command("effnet-train", "modle=b0")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
