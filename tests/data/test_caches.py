"""What is made once is made by one process, and neither kills nor other users' files spoil it for the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effnet_train.data.tar_index import Entry, TarIndex, open_index

# Opens an index; what is noted in the file `made` is each making, which takes the given time.
OPENER = """
import sys, time
from pathlib import Path
from effnet_train.data.tar_index import Entry, open_index
cache, made, state, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
def make():
    with made.open("a") as file:
        file.write(f"{state}\\n")
    time.sleep(seconds)
    return ["a", "b"], [Entry(0, 7 * i, 7, i % 2, f"{state}{i}") for i in range(5)]
print("ready", flush=True)
sys.stdin.readline()
index = open_index(["x.tar"], lambda _: state, make, kind="kind", cache=cache)
print(*(index[i].name for i in range(len(index))), flush=True)
"""


def opener(tmp_path: Path, state: str, seconds: float) -> "subprocess.Popen[str]":
    words = [str(tmp_path / "cache"), str(tmp_path / "made"), state, str(seconds)]
    process = subprocess.Popen(
        [sys.executable, "-c", OPENER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def open_all(processes: "list[subprocess.Popen[str]]") -> list[tuple[str, str]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), found
    return found


def here(tmp_path: Path, state: str) -> TarIndex:
    return open_index(
        ["x.tar"], lambda _: state, lambda: (["a"], [Entry(0, 0, 1, 0, "y")]), kind="kind", cache=tmp_path / "cache"
    )


def test_of_many_processes_one_makes_the_index(tmp_path: Path) -> None:
    """Also of archives that have changed, whose former index makes way."""
    for state in ("old", "new"):
        found = open_all([opener(tmp_path, state, 0.5) for _ in range(3)])
        assert [out.split() for out, _ in found] == [[f"{state}{i}" for i in range(5)]] * 3
        assert sum("waiting for the process that holds" in err for _, err in found) == 2
        assert sum("indexing 1 archives, once" in err for _, err in found) == 1
    assert (tmp_path / "made").read_text().split() == ["old", "new"]


def test_a_process_that_is_killed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    kill = "import os, numpy as np; np.save = lambda *_: os.kill(os.getpid(), 9)\n"
    words = [str(tmp_path / "cache"), str(tmp_path / "made"), "state", "0"]
    killed = subprocess.run([sys.executable, "-c", kill + OPENER, *words], input="\n", text=True, capture_output=True)
    assert killed.returncode == -9
    assert [name for name in os.listdir(tmp_path / "cache") if name[0] == "."] != []
    assert here(tmp_path, "state")[0].name == "y"
    assert [name for name in os.listdir(tmp_path / "cache") if name[0] == "."] == []


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_an_index_is_for_all_whom_the_umask_lets(tmp_path: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        folder = here(tmp_path, "state").folder
    finally:
        os.umask(former)
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask
