"""Trainings as processes, a few at a time: their results, or why there are none."""

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SUMMARY = "summary.json"  # which a run writes when it has ended
LOG = "log.txt"
_POLL_S = 0.2


@dataclass(frozen=True)
class Trial:
    """Hold a training: the folder in which its run's folder is, alone, and the command."""

    name: str
    folder: Path
    command: tuple[str, ...]

    def result(self) -> dict[str, Any] | None:
        """Return the scores of the weights that the run selected (top1 a fraction), None before its end."""
        for file in sorted(self.folder.rglob(SUMMARY)):
            summary = json.loads(file.read_text(encoding="utf-8"))
            config = yaml.safe_load((file.parent / "config.yaml").read_text(encoding="utf-8"))
            selected = str(config["select_by"]).rpartition("/")[0]
            scores, prefix = (summary["test"], "test") if "test" in summary else (summary["best"], selected)
            found = {key.rpartition("/")[2]: value for key, value in scores.items() if key.startswith(f"{prefix}/")}
            return {**found, "folder": str(file.parent)}
        return None

    def reason(self, status: int) -> str:
        """Return why the process left with `status`: its error, else the last line of its log."""
        lines = [line for line in (self.folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w./-]+: (\[rank \d+\] )?error: ", line)]
        last = (errors or lines or ["no word"])[-1].partition("error: " if errors else "\0")
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{last[2] or last[0]} ({how}; {self.folder / LOG})"


def run_trials(
    trials: Sequence[Trial], *, jobs: int, told: Callable[[str], None], stop: threading.Event
) -> Mapping[str, str]:
    """Run the trials that have no result yet, `jobs` at a time; return by name why others have none.

    One that fails is told, and the others go on. Where `stop` is set, those that run are asked to save and leave, and
    no more begin. A process is asked to, too, when this one dies: it holds the other end of its standard input.
    """
    waiting = [trial for trial in trials if trial.result() is None]
    total, running, failed = len(waiting), dict[str, tuple[Trial, subprocess.Popen[bytes]]](), dict[str, str]()
    if total < len(trials):
        told(f"{len(trials) - total} of {len(trials)} trainings have ended before")
    started = 0
    while running or (waiting and not stop.is_set()):
        while waiting and len(running) < jobs and not stop.is_set():
            trial = waiting.pop(0)
            started += 1
            told(f"training {started} of {total}: {trial.name}")
            running[trial.name] = trial, _start(trial)
        if stop.is_set():
            for _, process in running.values():
                _let_go(process)
        time.sleep(_POLL_S)
        for name, (trial, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            _let_go(process)
            result = trial.result()
            if result is not None:
                told(f"{name}: top-1 {result['top1']:.2%}")
            elif not stop.is_set():
                failed[name] = trial.reason(process.returncode)
                told(f"{name} FAILED: {failed[name]}")
    return failed


def _start(trial: Trial) -> subprocess.Popen[bytes]:
    trial.folder.mkdir(parents=True, exist_ok=True)
    with (trial.folder / LOG).open("ab") as log:
        # In a session of its own: a terminal's Ctrl-C comes to it once, through us.
        return subprocess.Popen(
            trial.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _let_go(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.close()
