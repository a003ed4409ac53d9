"""A rank that dies, fails or hangs takes the others with it in bounded time, and the next start goes on exactly."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_train import distributed
from effnet_train.cli.app import run_rank
from effnet_train.cli.train import train_rank
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE

RUN = (
    *("recipe=demo", "model.width=0.25", "batch_size=48", "device=cpu", "threads=1", "epochs=200", "max_steps=40"),
    *("save_every.steps=10", "save_every.epochs=null", "evaluate_every.steps=20", "evaluate_every.epochs=null"),
    *("log_every.steps=1", "run_root=.", "loggers=none", "timeout_s=6"),
)
BIN = Path(sys.executable).parent


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(BIN / "effnet-train"), *RUN, "ranks=2", *options],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(file: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]


def process_of(rank: int, command: "subprocess.Popen[str]") -> int:
    """Return the process of a rank that the launcher `command` has spawned, in their order."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    spawned = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    return sorted(spawned)[rank]


def weights(folder: Path, step: int = 40) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(folder / f"step_{step:09d}.pt")["ema"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "name=run")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return weights(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "told"),
    [
        (signal.SIGKILL, "rank 1 was killed by SIGKILL"),
        (signal.SIGSTOP, "rank 1: gives no sign: stopped, or its machine is out of reach"),
    ],
    ids=["dies", "hangs"],
)
def test_a_lost_rank_is_named_and_the_ranks_start_again(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], blow: signal.Signals, told: str
) -> None:
    process = start(tmp_path, "name=run", "max_restarts=1")
    wait_for(tmp_path / "run" / "step_000000010.pt", process)
    os.kill(process_of(1, process), blow)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert told in errors
    assert "starting the ranks again (1 of 1)" in errors
    torch.testing.assert_close(weights(tmp_path / "run"), undisturbed, rtol=0, atol=0)


@pytest.mark.slow
def test_restarts_are_counted(tmp_path: Path) -> None:
    """Not after a mistake of the user's, nor after a request to stop."""
    process = start(tmp_path, "name=run", "max_restarts=3")
    wait_for(tmp_path / "run" / "step_000000010.pt", process)
    os.kill(process_of(1, process), signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED_EXIT_CODE, errors
    assert "starting the ranks again" not in errors
    process = start(tmp_path, "name=run", "max_restarts=3", "optim.momentum=-1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "starting the ranks again" not in errors


def patient(folder: str) -> None:
    """Be a rank that takes any signal for a request, and does not heed it."""
    with distributed.open_session("cpu") as session, distributed.PreemptionNotice(session):
        (Path(folder) / f"ready-{session.rank}").touch()
        time.sleep(60)


def launch_patient(folder: str) -> None:
    distributed.launch(run_rank, "train", patient, folder, ranks=2, max_restarts=2)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [(), (0.0, 4.0)], ids=["early", "twice"])
def test_signals_that_find_no_heed(tmp_path: Path, moments: tuple[float, ...]) -> None:
    """Before there are ranks: at once, as one to requeue. A second time: at once, and no start anew."""
    launcher = multiprocessing.get_context("spawn").Process(target=launch_patient, args=(str(tmp_path),))
    launcher.start()
    assert launcher.pid is not None
    if moments:
        while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.1)
    else:
        # The handler is there before the ranks are.
        while signal.SIGUSR1 not in caught(launcher.pid):
            time.sleep(0.001)
    for moment in moments or (0.0,):
        time.sleep(moment)
        os.kill(launcher.pid, signal.SIGUSR1)
    launcher.join(40)
    assert launcher.exitcode == (130 if moments else PREEMPTED_EXIT_CODE)


def caught(pid: int) -> set[signal.Signals]:
    """Return the signals that a process has handlers of."""
    mask = int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def fail(*_: object, **__: object) -> Any:
    raise OverflowError("the fault of this test")


def faulty(place: str, config: dict[str, Any], folder: str) -> None:
    """Train as a rank; one of the two, the one that `place` concerns, fails there."""
    from effnet_train.data import loader
    from effnet_train.engine import saving
    from effnet_train.engine.train import Stepper

    rank = os.environ["RANK"]
    if place == "data" and rank == "1":
        loader._raise_errors = fail
    elif place == "step" and rank == "1":
        Stepper._backward = fail  # type: ignore[method-assign]
    elif place == "evaluation" and rank == "1":
        from effnet_train.engine import evaluate

        evaluate.batch_sums = fail
    elif place == "save" and rank == "0":
        saving.Checkpoints.save = fail  # type: ignore[method-assign]
    elif place == "hang" and rank == "1":
        Stepper._backward = lambda *_: time.sleep(600)  # type: ignore[method-assign]
    train_rank(config, folder, "cpu")


@pytest.mark.parametrize(
    "place",
    ["evaluation", "hang", *(pytest.param(place, marks=pytest.mark.slow) for place in ("data", "step", "save"))],
)
def test_no_rank_waits_for_one_that_failed(
    place: str,
    tmp_path: Path,
    digits_root: Path,
    compose: Callable[..., dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    where = ["debug=tiny", "model.width=0.25", f"run_root={tmp_path}", "name=run", f"data.root={digits_root}"]
    # With workers, which must not keep a rank from leaving either; in an evaluation they are many batches ahead.
    patience = ("workers=0", "timeout_s=3") if place == "hang" else ("workers=1", "timeout_s=60")
    config = compose("train", *where, "device=cpu", "ranks=2", "threads=1", "eval_batch_size=16", *patience)
    began = time.monotonic()
    with pytest.raises(SystemExit) as error:
        distributed.launch(run_rank, "train", faulty, place, config, str(tmp_path / "run"), ranks=2)
    assert time.monotonic() - began < 55  # not by the watchdog, but where it is to be
    assert error.value.code == 1
    text = capfd.readouterr().err
    if place == "hang":
        assert "error: no step for" in text
        assert "rank 1: effnet_train/engine/train.py" in text  # of rank 0 or of itself
        assert "in faulty.<locals>.<lambda>" in text or "in <lambda>" in text  # its own stack
    else:
        assert "the fault of this test" in text


@pytest.fixture
def two_machines() -> Iterator[Callable[[bool], None]]:
    """Make two network namespaces, 10.77.0.1 and 10.77.0.2, and return a function that joins or parts them."""
    names = [f"effnet{os.getpid()}{side}" for side in "ab"]
    ends = [f"e{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield lambda joined: ip("-n", names[0], "link", "set", ends[0], "up" if joined else "down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_both_machines(folder: Path, name: str) -> "list[subprocess.Popen[str]]":
    processes = []
    for number, side in enumerate("ab", 1):
        launcher = [
            *("ip", "netns", "exec", f"effnet{os.getpid()}{side}", sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400"),
            *("--rdzv-id=7", f"--local-addr=10.77.0.{number}", f"--rdzv-conf=is_host={2 - number}"),
        ]
        with (folder / f"{name}-{side}.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    [*launcher, "-m", "effnet_train.cli.train", *RUN, f"name={name}"],
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"e{os.getpid()}{side}"},
                )
            )
    return processes


@pytest.mark.slow
def test_a_cut_between_two_machines(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], two_machines: Callable[[bool], None]
) -> None:
    """Both ends come to an end, torchrun's own processes too, and the next start goes on exactly."""
    processes = on_both_machines(tmp_path, "run")
    wait_for(tmp_path / "run" / "step_000000010.pt", processes[0])
    two_machines(False)
    cut = time.monotonic()
    assert all(process.wait(150) != 0 for process in processes)
    assert time.monotonic() - cut < 120
    said = [(tmp_path / f"run-{side}.log").read_text() for side in "ab"]
    for rank, text in enumerate(said):
        assert f"[rank {rank}] error: no step for" in text
    assert "out of reach" in said[0]
    assert "the network between" in said[1]
    two_machines(True)
    assert [process.wait(240) for process in on_both_machines(tmp_path, "run")] == [0, 0]
    torch.testing.assert_close(weights(tmp_path / "run"), undisturbed, rtol=0, atol=0)
