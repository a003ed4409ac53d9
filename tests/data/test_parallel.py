import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from effnet_train.data.parallel import map_ordered


def square(number):
    time.sleep(0.02 * (number % 3))
    return number * number


def trip(number, at):
    if number == at:
        raise ValueError(f"tripped over {number}")
    return number


def die(number, at):
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_stand_in_the_order_of_the_items(workers):
    assert list(map_ordered(square, range(20), workers=workers)) == [n * n for n in range(20)]
    assert list(map_ordered(square, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_here(workers):
    with pytest.raises(ValueError, match="tripped over 5"):
        list(map_ordered(partial(trip, at=5), range(9), workers=workers))


def test_a_dead_worker_is_told_and_nothing_hangs():
    with pytest.raises(ChildProcessError, match=r"a worker process died \(exit code -9\): .* smaller workers="):
        list(map_ordered(partial(die, at=5), range(9), workers=2))


PARENT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from effnet_train.data.parallel import map_ordered
from times import sleep
if __name__ == "__main__":
    for pid in map_ordered(sleep, range(100), workers=2):
        print(pid, flush=True)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between the two
        return False


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "times.py").write_text("import os, time\ndef sleep(n):\n    time.sleep(0.05)\n    return os.getpid()\n")
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        pids = {int(process.stdout.readline()) for _ in range(6)}
        process.kill()
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.05)
