"""What SLURM tells its tasks: their places among all tasks, and when the job's time is up. Needs no torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping

# Below the ports that systems give to connections of their own, from 32768 on.
_FIRST_PORT, _PORTS = 15_000, 15_000
_ANSWER_S = 20.0  # of a busy controller


def expand_nodes(nodes: str) -> list[str]:
    """Return the names that a node list stands for, in its order: `node[01-03,07]` is four. Raises ValueError."""
    # Commas inside brackets separate ranges, others names; what follows a bracket may hold another one.
    if not nodes or not re.fullmatch(r"([^\[\],]|\[[\d,-]+\])+(,([^\[\],]|\[[\d,-]+\])+)*", nodes):
        raise ValueError(f"SLURM's node list {nodes!r} cannot be read: set MASTER_ADDR to the first node's name")
    return [name for part in re.split(r",(?![^\[]*\])", nodes) for name in _expand(part)]


def _expand(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, tail = rest.partition("]")
    numbers = []
    for text in ranges.split(","):
        first, _, last = text.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [head + number + end for number in numbers for end in _expand(tail)]


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would set for a task that `srun` started, or nothing where there is but one task.

    A batch script's own shell is no task, and what it starts without srun takes the machine for itself.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    node, step = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_ID"])
    number = 16 * int(environment["SLURM_JOB_ID"]) + step  # jobs may share a node, and so may a job's steps
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of(node, environment["SLURM_STEP_TASKS_PER_NODE"])),
        "MASTER_ADDR": expand_nodes(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": str(_FIRST_PORT + number % _PORTS),
    }


def take_place(environment: MutableMapping[str, str]) -> None:
    """Set in `environment` what torchrun would, where srun and no other launcher started this process.

    MASTER_ADDR and MASTER_PORT that are set already are kept.
    """
    if "RANK" not in environment:
        environment.update({**(found := place(environment)), **{k: environment[k] for k in found if k in environment}})


def _tasks_of(node: int, tasks: str) -> int:
    """Return the tasks of a step's `node`, counted from 0; `2(x3),1` is 2 on three nodes and 1 on the fourth."""
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def job(environment: Mapping[str, str]) -> str | None:
    """Return the job and how often it was requeued, as `JOB.RESTARTS`, or None outside of SLURM."""
    number = environment.get("SLURM_JOB_ID")
    return number and f"{number}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def end_time(environment: Mapping[str, str]) -> float | None:
    """Return when the job's time is up, in seconds since 1970, or None: no job, no limit, or nobody who knows.

    Old versions of SLURM do not tell their jobs, who then have to ask.
    """
    if environment.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environment["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in environment or shutil.which("squeue") is None:
        return None
    told = _asked(environment, "%e")
    return float(told) if told.isdigit() else None


def is_cancelled(environment: Mapping[str, str]) -> bool:
    """Say whether the job that this process belongs to is ending because somebody cancelled it."""
    return _asked(environment, "%T") in ("CANCELLED", "COMPLETING")


def _asked(environment: Mapping[str, str], what: str) -> str:
    """Return what squeue tells of the job, or nothing where it does not answer."""
    command = ["squeue", "--noheader", f"--format={what}", f"--jobs={environment['SLURM_JOB_ID']}", "--states=all"]
    try:
        return subprocess.run(
            command,
            env={**os.environ, **environment, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def stop_time(end: float | None, before_end_s: float, now: float) -> float | None:
    """Return when a job whose time is up at `end` is to stop by itself, in seconds since 1970 as all of these.

    Raises ValueError where that is now already: it would be requeued for ever.
    """
    if end is None:
        return None
    if end - before_end_s <= now:
        raise ValueError(
            f"stop_before_end_s={before_end_s:g} leaves no time of a job that ends in {end - now:.0f} s: "
            "give the job more time (sbatch --time), or lower stop_before_end_s"
        )
    return end - before_end_s
