"""Trainings as processes, a few at a time: their results, or why there are none."""

import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from effnet_train.analysis.runs import Run, find_runs, of_length
from effnet_train.distributed import STOP_SIGNALS

LOG = "log.txt"
_STARTED = "\n$ "  # and the command: what a start writes to the log, before all else
_POLL_S = 0.2
LEAVING_S = 60.0  # for what was asked to stop, as it took too long


@dataclass(frozen=True)
class Trial:
    """Hold a training: the folder that is its run's, or holds it alone, the command, and where it is cut short."""

    name: str
    folder: Path
    command: tuple[str, ...]
    max_steps: int | None = None

    def result(self) -> Run | None:
        """Return the finished run, None before its end: one that was cut short elsewhere has further to go."""
        found, _ = of_length(find_runs(self.folder)[0], self.max_steps)
        return found[0] if found else None

    def start(self, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Start the training, whose output goes to its log; `environment` is added to this process's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{_STARTED}{shlex.join(self.command)}\n")
        return start(self.command, self.folder / LOG, environment)

    def reason(self, status: int) -> str:
        """Return why the process left with `status`: its error, else the last line of its log."""
        text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        latest = text.rpartition(_STARTED)[2].partition("\n")[
            2
        ]  # what former starts have said is no reason of this one
        lines = [line for line in latest.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w./-]+: (\[rank \d+\] )?error: ", line)]
        last = (errors or lines or ["no word"])[-1].partition("error: " if errors else "\0")
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{last[2] or last[0]} ({how}; {self.folder / LOG})"


def run_trials(
    trials: Sequence[Trial], *, jobs: int, told: Callable[[str], None], asked: Sequence[int]
) -> Mapping[str, str]:
    """Run the trials that have no result yet as `run_all` does; return by name why others have none.

    One that fails is told, and the others go on.
    """
    waiting = {trial.name: trial for trial in trials if trial.result() is None}
    if len(waiting) < len(trials):
        told(f"{len(trials) - len(waiting)} of {len(trials)} trainings have ended before")
    failed: dict[str, str] = {}
    numbers = itertools.count(1)

    def begin(trial: Trial) -> "subprocess.Popen[bytes]":
        told(f"training {next(numbers)} of {len(waiting)}: {trial.name}")
        return trial.start()

    def ended(name: str, status: int) -> None:
        run = waiting[name].result()
        if run is not None:
            told(f"{name}: top-1 {run.top1:.2%}")
        elif not asked:
            failed[name] = waiting[name].reason(status)
            told(f"{name} FAILED: {failed[name]}")

    run_all({name: partial(begin, trial) for name, trial in waiting.items()}, jobs=jobs, asked=asked, ended=ended)
    return failed


def run_all(
    starts: Mapping[str, Callable[[], "subprocess.Popen[bytes]"]],
    *,
    jobs: int,
    asked: Sequence[int],
    ended: Callable[[str, int], None],
    limit_s: float | None = None,
) -> None:
    """Run processes, begun as by `start`, `jobs` at a time; tell the name and the exit status of each that ended.

    Each signal that comes to be in `asked` is handed on to those that run, and no more begin. What runs for longer than
    `limit_s` is asked to stop, and is killed with all its children if it does not.
    """
    waiting, running, handed = dict(starts), dict[str, subprocess.Popen[bytes]](), 0
    ends, late = dict[str, float](), set[str]()
    while running or (waiting and not asked):
        while waiting and len(running) < jobs and not asked:
            name = next(iter(waiting))
            running[name] = waiting.pop(name)()
            ends[name] = time.monotonic() + (math.inf if limit_s is None else limit_s)
        new = asked[handed:]
        handed += len(new)  # not len(asked): a signal may come between the two
        for process, number in itertools.product(running.values(), new):
            process.send_signal(number)
        time.sleep(_POLL_S)
        for name, process in list(running.items()):
            if process.poll() is not None:
                assert process.stdin is not None
                process.stdin.close()
                ended(name, running.pop(name).returncode)
            elif time.monotonic() > ends[name]:
                if name in late:
                    os.killpg(process.pid, signal.SIGKILL)  # with its ranks and workers, which would keep its GPU
                else:
                    process.send_signal(signal.SIGTERM)
                late.add(name)
                ends[name] = time.monotonic() + LEAVING_S


def start(
    command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process whose standard input ends when this one does, however it dies; its output goes after `log`'s.

    It is in a session of its own: a terminal's Ctrl-C comes to it once, through us.
    """
    how: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "start_new_session": True,
        "env": {**os.environ, **(environment or {})},
    }
    if log is None:
        return subprocess.Popen(command, **how)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **how)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Give a list of the signals that have come by which a run is stopped: it grows, and they do nothing else."""
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    former = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
