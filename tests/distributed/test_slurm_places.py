"""SLURM's variables: values as srun of 22.05 sets them, node lists as `scontrol show hostnames` reads them."""

import signal
import stat
import time
from pathlib import Path

import pytest

from effnet_train import distributed, slurm
from effnet_train.distributed import PreemptionNotice, Session

# The second of three tasks on the second node of two.
TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a[9-11],b-2.cluster", ["a9", "a10", "a11", "b-2.cluster"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("127.0.0.[2-3]", ["127.0.0.2", "127.0.0.3"]),
    ],
)
def test_node_lists(nodes: str, names: list[str]) -> None:
    assert slurm.expand_nodes(nodes) == names


@pytest.mark.parametrize("nodes", ["", "a[1-2", "a]1[", "a,,b"])
def test_node_lists_that_are_none(nodes: str) -> None:
    with pytest.raises(ValueError, match="cannot be read: set MASTER_ADDR"):
        slurm.expand_nodes(nodes)


def test_a_task_takes_its_place() -> None:
    environment = dict(TASK)
    slurm.take_place(environment)
    assert {key: value for key, value in environment.items() if not key.startswith("SLURM")} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "15272",
    }


def test_what_stands_already_is_kept() -> None:
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1"}
    slurm.take_place(environment)
    assert (environment["MASTER_ADDR"], environment["RANK"]) == ("10.0.0.1", "3")
    by_torchrun = {**TASK, "RANK": "0"}
    slurm.take_place(by_torchrun)
    assert by_torchrun == {**TASK, "RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="none"),
        pytest.param({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, id="one task"),
        pytest.param({k: v for k, v in TASK.items() if "STEP" not in k}, id="a batch script's shell"),
    ],
)
def test_who_is_no_task_among_several(environment: dict[str, str]) -> None:
    before = dict(environment)
    slurm.take_place(environment)
    assert environment == before


def test_ports_of_jobs_and_steps_differ() -> None:
    places = [
        slurm.place({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(900)
        for step in range(16)
    ]
    ports = [int(place["MASTER_PORT"]) for place in places]
    assert len(set(ports)) == len(ports)
    assert 1024 < min(ports) <= max(ports) < 32768


@pytest.mark.parametrize(("node", "tasks", "count"), [(0, "8(x4)", 8), (3, "2(x3),1", 1), (2, "2,1,4", 4)])
def test_tasks_of_a_node(node: int, tasks: str, count: int) -> None:
    environment = {**TASK, "SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert slurm.place(environment)["LOCAL_WORLD_SIZE"] == str(count)


def test_the_end_of_a_jobs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment, else by asking: here a program that answers as squeue does under SLURM_TIME_FORMAT=%s."""
    assert slurm.end_time({}) is None
    assert slurm.end_time({**TASK, "SLURM_JOB_END_TIME": "1764000000"}) == 1764000000
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for answer, expected in (("1764000001", 1764000001), ("NONE", None), ("", None)):
        asked = '[ "$SLURM_TIME_FORMAT$4" = %s--states=all ] && [ "$3" = --jobs=17 ]'
        squeue.write_text(f"#!/bin/sh\n{asked} && echo {answer}\n")
        squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
        assert slurm.end_time(TASK) == expected


def test_a_job_that_is_too_short_to_stop_in() -> None:
    assert slurm.stop_time(None, 120, 0) is None
    assert slurm.stop_time(1000, 120, 800) == 880
    with pytest.raises(ValueError, match=r"stop_before_end_s=120 leaves no time of a job that ends in 60 s: give"):
        slurm.stop_time(1000, 120, 940)


def test_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    with PreemptionNotice(Session(), deadline=time.time() + 0.3) as notice:
        assert not notice.agreed()
        time.sleep(0.35)
        assert notice.agreed()
    assert "the job's time is nearly up: saving after this step, then leaving" in capsys.readouterr().err


def test_only_the_signals_chosen_are_requests() -> None:
    received: list[int] = []
    former = signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    try:
        with PreemptionNotice(Session(), signals=[signal.SIGUSR1]) as notice:
            signal.raise_signal(signal.SIGUSR2)
            assert (notice.agreed(), received) == (False, [signal.SIGUSR2])
            signal.raise_signal(signal.SIGUSR1)
            assert notice.agreed()
    finally:
        signal.signal(signal.SIGUSR2, former)


def test_a_warning_and_sigterm_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a scheduler, and after the run's own stop: only the same signal again, or Ctrl-C, cuts a save short."""
    monkeypatch.setattr(distributed, "_ONE_REQUEST_S", 0.1)
    with PreemptionNotice(Session(), deadline=time.time()) as notice:
        assert notice.agreed()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            time.sleep(0.15)
            signal.raise_signal(number)
        for number in (signal.SIGUSR1, signal.SIGINT):
            time.sleep(0.15)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
