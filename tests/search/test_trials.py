"""Processes a few at a time, with children that are small scripts."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from effnet_train.search import trials
from effnet_train.search.trials import Trial, run_all, run_trials, start

SAYS_SIGNALS = """
import signal, sys
heard = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: heard.append(number))
print("ready", flush=True)
while len(heard) < 2:
    signal.pause()
print(*map(int, heard), flush=True)
sys.exit(75)
"""
# A training that hears no signal, as one whose step takes hours.
HANGS = """
import signal, time
from effnet_train.cli import train, train_beside
def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(100)
train_beside.LEAVING_S = 1.0
train.main = hang
train_beside.main()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def says(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def test_signals_are_handed_on_in_turn_and_nothing_more_begins(tmp_path: Path) -> None:
    logs = [tmp_path / f"{name}.txt" for name in "abc"]
    starts = {log.stem: partial(start, [sys.executable, "-c", SAYS_SIGNALS], log) for log in logs}
    asked: list[int] = []

    def ask() -> None:
        wait_for(lambda: all(says(log, "ready") for log in logs[:2]))
        asked.append(signal.SIGUSR1)
        time.sleep(0.5)
        asked.append(signal.SIGINT)

    asking = threading.Thread(target=ask)
    asking.start()
    ended: dict[str, int] = {}
    run_all(starts, jobs=2, asked=asked, ended=ended.__setitem__)
    asking.join()
    assert ended == {"a": 75, "b": 75}
    for log in logs[:2]:
        assert log.read_text() == f"ready\n{int(signal.SIGUSR1)} {int(signal.SIGINT)}\n"


def test_a_signal_that_comes_while_others_are_handed_on_is_not_lost(tmp_path: Path) -> None:
    class Asked(list[int]):
        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            if not self and says(tmp_path / "log", "ready"):
                self.append(signal.SIGTERM)  # as its handler would, between two steps of the interpreter
            return found

    code = "import time; print('ready', flush=True); time.sleep(60)"
    ended: dict[str, int] = {}
    starts = {"one": partial(start, [sys.executable, "-c", code], tmp_path / "log")}
    run_all(starts, jobs=1, asked=Asked(), ended=ended.__setitem__)
    assert ended == {"one": -signal.SIGTERM}


def test_a_trial_that_fails_is_told_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    codes = {
        "error": "import sys; print('effnet-train: error: no such thing'); print('more'); sys.exit(2)",
        "killed": "import os; print('so far', flush=True); os.kill(os.getpid(), 9)",
        "silent": "",
    }
    trials = [Trial(name, tmp_path / name, (sys.executable, "-c", code)) for name, code in codes.items()]
    told: list[str] = []
    for trial in trials:  # of a start before
        trial.folder.mkdir()
        (trial.folder / "log.txt").write_text("$ effnet-train\neffnet-train: error: long mended\n")
    failed = run_trials(trials, jobs=1, told=told.append, asked=[])
    assert failed == {
        "error": f"no such thing (exit status 2; {tmp_path / 'error' / 'log.txt'})",
        "killed": f"so far (signal 9; {tmp_path / 'killed' / 'log.txt'})",
        "silent": f"no word (exit status 0; {tmp_path / 'silent' / 'log.txt'})",
    }
    assert [text for text in told if "of 3" in text] == [
        f"training {i} of 3: {name}" for i, name in enumerate(codes, 1)
    ]


def test_a_training_that_does_not_leave_when_its_parent_is_dead_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    parent = (
        f"import time; from pathlib import Path; from effnet_train.search.trials import start; "
        f"print(start([{sys.executable!r}, '-c', {HANGS!r}], Path({str(log)!r})).pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        wait_for(lambda: says(log, "ready"))
        process.kill()
    wait_for(lambda: says(log, "1 s after its parent's death this training has not left"), 10)
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text(), 5)


def test_what_takes_too_long_is_asked_to_stop_and_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LEAVING_S", 0.5)
    deaf = (  # and so is its child
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)"
    )
    codes = {"quick": "", "hears": "import time; time.sleep(60)", "deaf": deaf}
    starts = {name: partial(start, [sys.executable, "-c", code], tmp_path / name) for name, code in codes.items()}
    ended: dict[str, int] = {}
    run_all(starts, jobs=3, asked=[], ended=ended.__setitem__, limit_s=4)
    assert ended == {"quick": 0, "hears": -signal.SIGTERM, "deaf": -signal.SIGKILL}
    child = int((tmp_path / "deaf").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text(), 5)


def test_a_training_may_have_variables_of_its_own(tmp_path: Path) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], 'PATH' in os.environ)"
    trial = Trial("one", tmp_path, (sys.executable, "-c", code))
    with trial.start({"CUDA_VISIBLE_DEVICES": "3"}) as process:
        assert process.stdin is not None
        process.wait()
    assert (tmp_path / "log.txt").read_text().endswith("3 True\n")
