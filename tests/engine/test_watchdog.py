"""A process that hangs ends itself; one that is slow, or was stopped as a whole, does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, threading, time
from effnet_train.distributed import Session
from effnet_train.engine.watchdog import Watchdog

def long_step(seconds):
    time.sleep(seconds)

with Watchdog(Session(), 1.0) as watchdog:
    long_step(1.4)  # the first may take twice as long
    for pause in map(float, sys.argv[1:]):
        watchdog.beat()
        print("beat", flush=True)
        long_step(pause)
print("left", flush=True)
"""


def start(*pauses: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", PROGRAM, *map(str, pauses)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_who_hangs_ends_and_says_where() -> None:
    began = time.monotonic()
    process = start(0.3, 60)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "left" not in output
    assert time.monotonic() - began < 50
    assert "[rank 0] error: no step for 1 s (timeout_s=1)" in errors
    assert "in long_step" in errors


def test_who_goes_on_stays() -> None:
    process = start(*[0.3] * 6)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.count("beat"), output.count("left")) == (0, 6, 1), errors


def test_who_was_stopped_as_a_whole_stays() -> None:
    """As `scontrol suspend` and gang scheduling do."""
    process = start(*[0.3] * 6)
    assert process.stdout is not None
    assert process.stdout.readline() == "beat\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.count("left")) == (0, 1), errors


@pytest.mark.parametrize("timeout", ["None", "1.0"])
def test_the_threads_end_with_it(timeout: str) -> None:
    program = (
        "import threading\nfrom effnet_train.distributed import Session\n"
        "from effnet_train.engine.watchdog import Watchdog\n"
        f"with Watchdog(Session(), {timeout}): count = threading.active_count()\n"
        "print(count, threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == (["1", "1"] if timeout == "None" else ["2", "1"])
