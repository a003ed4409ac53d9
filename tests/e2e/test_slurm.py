"""A real SLURM on this machine: controller and two nodes, started by the tests and ended with them.

It needs Debian's slurm-wlm and munge, and root, as whom the daemons run here.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from .test_resume import same, state

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
TINY = ("recipe=demo", "device=cpu", "model.width=0.25", "batch_size=48", "loggers=none", "run_root=runs")
# Names of nodes must lead to them, and several on one machine must not be its own.
NODES = ("127.0.0.2", "127.0.0.3")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port0}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2
NodeName=127.0.0.3 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a cluster of two nodes; give the environment in which its commands find it."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path="/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("the daemons of this test's SLURM run as root, which these tests do not")
    folder = tmp_path_factory.mktemp("slurm")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    with ExitStack() as sockets:
        held = [sockets.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(3)]
        ports = {f"port{number}": each.getsockname()[1] for number, each in enumerate(held)}
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONFIG.format(folder=folder, host=host, **ports))
    environment = {**os.environ, "SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}:/usr/sbin"
    own = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        # Its folder is the test runner's, not one that only root can write to, as it asks for.
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *own],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            running.append(
                subprocess.Popen(
                    daemon, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
                )
            )
            time.sleep(1)
        wait(lambda: ask(environment, "sinfo", "-h", "-o", "%T", "-p", "all") == "idle", 60)
        yield environment
    finally:
        ask(environment, "scancel", "--user=root")
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(30)


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def wait(condition: Callable[[], bool], seconds: float, what: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def srun(cluster: dict[str, str], folder: Path, *arguments: str, nodes: int = 2) -> "subprocess.CompletedProcess[str]":
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "effnet-train", *TINY, *arguments]
    return subprocess.run(command, cwd=folder, env=cluster, capture_output=True, text=True, timeout=300)


def test_tasks_of_srun_are_ranks(cluster: dict[str, str], tmp_path: Path) -> None:
    """Two tasks on two nodes compute what two ranks of our own launcher do."""
    done = srun(cluster, tmp_path, "name=srun", "max_steps=6")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 6 steps") == 1
    alone = ["effnet-train", *TINY, "name=alone", "max_steps=6", "ranks=2"]
    subprocess.run(alone, cwd=tmp_path, env=cluster, check=True, capture_output=True, timeout=300)
    assert same(state(tmp_path / "runs/srun", 6)["model"], state(tmp_path / "runs/alone", 6)["model"])


SWEPT = "s-recipe_demo-model.width_0.25-batch_size_48-seed_{}"
PARTS = ("max_steps=40", "save_every.steps=10", "save_every.epochs=null")


@pytest.fixture(scope="module")
def whole(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = srun(cluster, folder, "name=whole", *PARTS)
    assert done.returncode == 0, done.stderr
    return folder / "runs/whole"


def submit(
    cluster: dict[str, str],
    folder: Path,
    *arguments: str,
    options: tuple[str, ...] = (),
    script: str = "many_nodes.sbatch",
) -> str:
    here = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "-o", "log")
    command = ["sbatch", "--parsable", *here, *options, str(SCRIPTS / script), *TINY, *arguments]
    return subprocess.run(command, cwd=folder, env=cluster, check=True, capture_output=True, text=True).stdout.strip()


def job(cluster: dict[str, str], number: str) -> str:
    return ask(cluster, "scontrol", "show", "job", number, "--oneliner")


def go_on(cluster: dict[str, str], number: str) -> None:
    """Wait until a job was requeued, and have it start at once: SLURM would wait for two minutes."""
    wait(
        lambda: "Restarts=1" in job(cluster, number) and "JobState=PENDING" in job(cluster, number),
        120,
        lambda: job(cluster, number),
    )
    ask(cluster, "scontrol", "update", f"JobId={number}", "StartTime=now")


def has_ended(cluster: dict[str, str], number: str) -> bool:
    return any(f"JobState={word}" in job(cluster, number) for word in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))


def test_a_signal_before_the_end_requeues_the_job(cluster: dict[str, str], tmp_path: Path, whole: Path) -> None:
    number = submit(cluster, tmp_path, "name=parts", *PARTS)
    log = tmp_path / "log"
    wait((tmp_path / "runs/parts/step_000000010.pt").exists, 120, log.read_text)
    ask(cluster, "scancel", "--signal=USR1", number)
    go_on(cluster, number)
    wait(lambda: has_ended(cluster, number), 240, lambda: job(cluster, number))
    assert "JobState=COMPLETED" in job(cluster, number), log.read_text()
    assert "the same command goes on" in log.read_text()
    assert same(state(whole, 40), state(tmp_path / "runs/parts", 40))


def test_one_node_of_two_tasks(cluster: dict[str, str], tmp_path: Path, whole: Path) -> None:
    options = ("--nodes=1", "--ntasks-per-node=2")
    number = submit(cluster, tmp_path, "name=one", *PARTS, options=options, script="one_node.sbatch")
    wait(lambda: has_ended(cluster, number), 240, lambda: job(cluster, number))
    assert "JobState=COMPLETED" in job(cluster, number), (tmp_path / "log").read_text()
    assert same(state(whole, 40), state(tmp_path / "runs/one", 40))


def test_a_sweep_as_an_array(cluster: dict[str, str], tmp_path: Path) -> None:
    """B0 and B1 of the eight, one after another."""
    options = ("--array=0-1%1", "--nodes=1", "-o", "log-%a")
    number = submit(cluster, tmp_path, "max_steps=1", "model.resolution=32", options=options, script="sweep.sbatch")
    wait(lambda: all(has_ended(cluster, f"{number}_{task}") for task in (0, 1)), 240, lambda: job(cluster, number))
    for task in (0, 1):
        assert "JobState=COMPLETED" in job(cluster, f"{number}_{task}"), (tmp_path / f"log-{task}").read_text()
        assert (tmp_path / f"runs/b{task}-digits-demo-seed0/summary.json").exists()


def test_a_task_that_dies_ends_the_job(cluster: dict[str, str], tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, "name=parts", *PARTS, "max_steps=4000")
    log = tmp_path / "log"
    wait((tmp_path / "runs/parts/step_000000010.pt").exists, 120, log.read_text)
    os.kill(task(1), signal.SIGKILL)
    wait(lambda: has_ended(cluster, number), 90, lambda: job(cluster, number))
    assert "JobState=FAILED" in job(cluster, number)
    assert "another rank has left" in log.read_text()


def task(rank: int) -> int:
    """Return the process that srun started as a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program = (entry / "cmdline").read_bytes().split(b"\0")[1:2]  # the word after python
            its_rank = f"SLURM_PROCID={rank}".encode() in (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if its_rank and program and program[0].endswith(b"/effnet-train"):
            return int(entry.name)
    raise AssertionError(f"no task {rank}")


def test_a_cancelled_job_stays_cancelled(cluster: dict[str, str], tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, "name=parts", *PARTS)
    wait((tmp_path / "runs/parts/step_000000010.pt").exists, 120, (tmp_path / "log").read_text)
    ask(cluster, "scancel", number)
    wait(lambda: has_ended(cluster, number), 60, lambda: job(cluster, number))
    time.sleep(5)
    assert "JobState=CANCELLED" in job(cluster, number)
    assert "Restarts=0" in job(cluster, number)


def test_a_job_stops_before_its_time_is_up(cluster: dict[str, str], tmp_path: Path) -> None:
    """Without a signal: this SLURM is asked when the job ends."""
    number = submit(cluster, tmp_path, "name=parts", "stop_before_end_s=40", options=("--time=1", "--signal=USR1@1"))
    log = tmp_path / "log"
    wait(lambda: "Restarts=1" in job(cluster, number), 120, lambda: job(cluster, number))
    assert "the job's time is nearly up: saving after this step" in log.read_text()
    ask(cluster, "scancel", number)


def test_a_sweep_through_submitit(cluster: dict[str, str], tmp_path: Path, whole: Path) -> None:
    """Two runs, a job each of two tasks; one is signalled, requeued, and goes on in its folder."""
    options = ("cluster=slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=30", "seed=0,1", "name=s")
    sweep = subprocess.Popen(
        ["effnet-train", "-m", *TINY, *PARTS, *options],
        cwd=tmp_path,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first, second = tmp_path / "runs" / SWEPT.format(0), tmp_path / "runs" / SWEPT.format(1)
    wait((first / "step_000000010.pt").exists, 120)
    number = ask(cluster, "squeue", "-h", "-t", "R", "-o", "%A").split()[0]
    ask(cluster, "scancel", "--signal=USR2", number)
    go_on(cluster, number)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, output
    assert same(state(whole, 40), state(first, 40))
    assert (second / "summary.json").exists()


def test_the_candidates_of_a_search_are_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    grid = ("alpha=[1.4,2.0]", "beta=[1.0,1.2]", "gamma=[1.0]", "flops_tolerance=0.5", "baseline=false", "name=found")
    options = ("cluster=slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.partition=all")
    command = [sys.executable, "-m", "effnet_train.cli.scale", "search", *TINY, *grid, "max_steps=4", *options]
    found = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads((tmp_path / "runs/found/search.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [1, 1]
    assert [row["rank"] for row in rows] in ([1, 2], [1, 1])
    assert len(list((tmp_path / "runs/found").rglob("*_submission.sh"))) == 2


def test_the_trials_of_an_architecture_search_are_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    space = ("space=small", "trials=3", "round=2", "searcher=random", "name=found")
    options = ("cluster=slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.partition=all")
    tiny = [text for text in TINY if not text.startswith("model.")]
    command = [sys.executable, "-m", "effnet_train.cli.search", "run", *tiny, *space, "max_steps=4", *options]
    found = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    entries = [json.loads(line) for line in (tmp_path / "runs/found/trials.jsonl").read_text().splitlines()]
    assert [entry["status"] for entry in entries] == ["trained"] * 3
    own = sum(entry["same_as"] is None for entry in entries)
    assert len(list((tmp_path / "runs/found").rglob("*_submission.sh"))) == own


def test_a_preempted_job_is_requeued(cluster: dict[str, str], tmp_path: Path, whole: Path) -> None:
    """By a job of a partition that goes before: SLURM sends SIGTERM and gives it a minute."""
    number = submit(cluster, tmp_path, "name=parts", *PARTS, options=("--exclusive",))
    wait((tmp_path / "runs/parts/step_000000010.pt").exists, 120, (tmp_path / "log").read_text)
    urgent = ["srun", "--partition=urgent", "--nodes=2", "--exclusive", "true"]
    subprocess.run(urgent, env=cluster, check=True, capture_output=True, timeout=120)
    go_on(cluster, number)
    wait(lambda: has_ended(cluster, number), 240, lambda: job(cluster, number))
    assert "JobState=COMPLETED" in job(cluster, number), (tmp_path / "log").read_text()
    assert same(state(whole, 40), state(tmp_path / "runs/parts", 40))


def test_a_cancelled_run_of_a_sweep_stays_cancelled(cluster: dict[str, str], tmp_path: Path) -> None:
    options = ("cluster=slurm", "hydra.launcher.timeout_min=30", "seed=0", "name=s")
    command = ["effnet-train", "-m", *TINY, *PARTS, *options]
    with subprocess.Popen(
        command, cwd=tmp_path, env=cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as sweep:
        try:
            wait((tmp_path / "runs" / SWEPT.format(0) / "step_000000010.pt").exists, 120)
            number = ask(cluster, "squeue", "-h", "-t", "R", "-o", "%A").split()[0]
            ask(cluster, "scancel", number)
            wait(lambda: has_ended(cluster, number), 60, lambda: job(cluster, number))
            time.sleep(5)
            assert "Restarts=0" in job(cluster, number)
        finally:
            sweep.kill()
