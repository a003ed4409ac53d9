"""A search of real trainings, two at a time, that is killed again and again: itself, or one of its trainings."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from effnet_train.search.journal import Entry, Journal

pytestmark = pytest.mark.slow

COMMAND = (
    *("debug=tiny", "device=cpu", "threads=1", "workers=0", "batch_size=16", "epochs=4", "max_steps=120"),
    *("save_every.steps=15", "evaluate_every.steps=60", "run_root=.", "trials=8", "round=4", "attempts=30", "jobs=2"),
    *("space=small", "space.op=[separable,mbconv3]", "space.head_channels=32", "space.stem_channels=8"),
    "space.blocks=[{stride: 2, channels: 8, repeats: 1, layers: [0]}, {stride: 2, channels: 16, repeats: 1}]",
)
KILLS = 10


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def accounted(folder: Path) -> dict[int, tuple[object, ...]]:
    def kept(entry: Entry) -> tuple[object, ...]:
        return (entry.tokens, entry.status, entry.network, entry.top1, entry.reward, entry.same_as)

    return {number: kept(entry) for number, entry in Journal(folder / "trials.jsonl", readonly=True).entries.items()}


def test_killed_ten_times_at_random_it_ends_with_the_same_trials(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "effnet_train.cli.search", "run", *COMMAND]
    done = subprocess.run([*command, "name=whole"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    chance, kills, told = random.Random(5), 0, ""
    end = time.monotonic() + 800
    while True:
        assert time.monotonic() < end, told
        with subprocess.Popen(
            [*command, "name=killed"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                if kills < KILLS:
                    time.sleep(chance.uniform(5, 14))
                    workers = children(process.pid)
                    victim = chance.choice([process.pid, *workers])
                    if process.poll() is None:
                        with suppress(ProcessLookupError):
                            os.kill(victim, signal.SIGKILL)
                            kills += 1
                    if victim != process.pid:
                        time.sleep(chance.uniform(0, 3))
                        process.kill()
                told = process.communicate(timeout=600)[0]
            finally:
                process.kill()
        if kills >= KILLS and process.returncode == 0:
            break
        assert process.returncode in (0, -signal.SIGKILL), told
        Journal(tmp_path / "killed" / "trials.jsonl", readonly=True)  # whole, whenever it is looked at
    assert kills == KILLS
    assert accounted(tmp_path / "killed") == accounted(tmp_path / "whole")


def test_asked_to_stop_it_leaves_with_all_saved_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "effnet_train.cli.search", "run", *COMMAND, "name=asked", "trials=3"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            end = time.monotonic() + 240
            while not list((tmp_path / "asked").glob("trial*/step_*.pt")) and process.poll() is None:
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            told = process.communicate(timeout=120)[0]
        finally:
            process.kill()
    assert process.returncode == 75, told
    assert "effnet-search: stopped, all saved in asked: the same command goes on" in told
    assert not children(process.pid)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert sorted(accounted(tmp_path / "asked")) == [1, 2, 3]
    resumed = "".join(file.read_text() for file in (tmp_path / "asked").glob("trial*/log.txt"))
    assert "the same command goes on" in resumed  # of a training, which went on from there
