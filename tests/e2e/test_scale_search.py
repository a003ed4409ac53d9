"""A search that dies in the middle of a training, and goes on."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

COMMAND = (
    *("debug=tiny", "device=cpu", "threads=1", "loggers=none", "model.width=0.25", "batch_size=32"),
    *("epochs=40", "max_steps=400", "save_every.steps=20", "evaluate_every.steps=400", "name=found", "run_root=."),
    *("alpha=[1.4,2.0]", "beta=[1.0,1.2]", "gamma=[1.0]", "flops_tolerance=0.5", "baseline=false"),
)
FIRST, SECOND = (Path("found") / f"{name}-seed0" for name in ("alpha1.4-beta1.2-gamma1", "alpha2-beta1-gamma1"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Return a function that starts the search; what is left of it ends with the test."""
    command = [sys.executable, "-m", "effnet_train.cli.scale", "search", *COMMAND]
    with ExitStack() as stack:

        def run() -> "subprocess.Popen[str]":
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to stop"])
def test_a_search_goes_on_where_it_was(
    tmp_path: Path, start: Callable[[], "subprocess.Popen[str]"], number: signal.Signals
) -> None:
    second = tmp_path / SECOND
    process = start()
    wait_for(lambda: list(second.glob("step_*.pt")) or process.poll() is not None)
    assert (tmp_path / FIRST / "summary.json").exists(), (tmp_path / FIRST / "log.txt").read_text()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 75, err
        assert "the same command goes on" in err
    # The training that ran has saved and left, though nobody could tell it to.
    log = tmp_path / SECOND / "log.txt"
    wait_for(lambda: "the same command goes on" in log.read_text())
    step = int(log.read_text().rpartition("stopped at step ")[2].split(",")[0])
    assert 0 < step < 400
    wait_for(lambda: not (second / ".lock").exists())
    assert (second / f"step_{step:09d}.pt").exists()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / FIRST).rglob("*") if path.is_file()}

    process = start()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "1 of 2 trainings have ended before" in out
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / FIRST).rglob("*") if path.is_file()}
    assert (second / "summary.json").exists()
    assert yaml.safe_load((second / "config.yaml").read_text())["model"]["depth"] == 0.558
