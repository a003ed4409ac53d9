"""How long the commands take to start, each in a process of its own."""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

# Words after effnet-train, the exit status that belongs to them, and the seconds that they may take.
_STARTS: dict[str, tuple[tuple[str, ...], int, float]] = {
    "--help": (("--help",), 0, 1.0),
    "config error": (("model.widht=2",), 2, 1.0),
    "debug=tiny": (("debug=tiny",), 0, 15.0),
}


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return the median seconds of each start, all of them, and its limit."""
    times: dict[str, list[float]] = {name: [] for name in _STARTS}
    for _ in range(rounds):
        for name, (words, status, _) in _STARTS.items():
            times[name].append(_seconds(words, status))
    return {
        name: {"seconds": round(median(times[name]), 3), "limit_s": limit, "runs_s": [round(t, 3) for t in times[name]]}
        for name, (_, _, limit) in _STARTS.items()
    }


def _seconds(words: tuple[str, ...], status: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given = [*words, f"run_root={root}/runs", f"data.root={root}/data"] if words[0].startswith("debug") else words
        start = perf_counter()
        done = subprocess.run([sys.executable, "-m", "effnet_train.cli.train", *given], capture_output=True, text=True)
        seconds = perf_counter() - start
    if done.returncode != status:
        raise ValueError(f"effnet-train {' '.join(given)} ended with status {done.returncode}: {done.stderr.strip()}")
    return seconds
