"""Kill a training run again and again, and hold what is left against a run that nobody disturbed.

    python scripts/chaos.py --kills 50 --ranks 2 --how kill

`--how`: kill (SIGKILL to all processes), term (SIGTERM to all), rank (SIGKILL to one rank alone, which must take the
others with it). The moments are random, from before the first step to after some saves; every other time it is the
first save from there on that is hit. Weights, averages, optimizer, scores, metrics files and TensorBoard's events must
be equal, to the last bit and row; the exit status is 1 where they are not, and where a run ends with another status
than what was done to it explains. Runs on a CPU.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from effnet_train.engine.checkpoint import load_checkpoint

VARYING = ("train/images_per_s", "train/data_wait")  # what depends on the clock
FIXED = (
    *(
        "recipe=demo",
        "epochs=200",
        "device=cpu",
        "model.width=0.25",
        "batch_size=48",
        "threads=1",
        "run_root=.",
        "log_every.steps=3",
    ),
    *("save_every.steps=5", "save_every.epochs=null", "evaluate_every.steps=50", "evaluate_every.epochs=null"),
)
# What a run may leave with that was hit, beside 0: it was at its end. A command without ranks yet is hit itself.
EXPLAINED = {
    "kill": {-signal.SIGKILL},
    "term": {75, -signal.SIGTERM, 128 + signal.SIGTERM},
    "rank": {1, -signal.SIGKILL},
}
AIM_S = 60.0  # how long a save is waited for


def start(folder: Path, name: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the training command in a session of its own."""
    words = [*FIXED, f"max_steps={arguments.steps}", f"ranks={arguments.ranks}", f"name={name}", *arguments.overrides]
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("effnet-train")), *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for the end and return what went to standard error. Raises TimeoutError where it does not end."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"a run did not end within {seconds} s:\n{process.communicate()[1]}") from error


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the ranks: those processes of the session that `multiprocessing` spawned, its resource tracker left out.

    Data workers are not among them: they are forked by a server.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if os.getsid(int(folder.name)) == process.pid and any(b"spawn_main" in word for word in words):
                found.append(int(folder.name))
        except (ProcessLookupError, FileNotFoundError):
            pass
    return found


def unfinished(folder: Path) -> set[str]:
    """Return the names of the checkpoints that are being written, or that a killed writer has left."""
    return {path.name for path in (folder / "disturbed").glob(".*.pt-*")}


def disturb(process: subprocess.Popen[str], how: str, chance: random.Random) -> None:
    """Send the signal."""
    if how == "rank":
        ranks = ranks_of(process)
        # Before there are ranks, the command itself is all there is.
        os.kill(chance.choice(ranks) if ranks else process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)


def hit(
    process: subprocess.Popen[str], folder: Path, left: set[str], arguments: argparse.Namespace, *, aim: bool
) -> bool:
    """Disturb the run now or, with `aim`, at its next save; say whether one was under way, `left` being older files."""
    deadline = time.monotonic() + AIM_S
    while aim and unfinished(folder) <= left and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    before = unfinished(folder)
    with suppress(ProcessLookupError):  # it has come to its end
        disturb(process, arguments.how, arguments.chance)
    # A writer that was killed leaves its file: then it is certain.
    return bool((unfinished(folder) if arguments.how == "kill" else before) - left)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's numbers as its own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag not in VARYING]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def exported(file: Path) -> dict[str, Any]:
    """Return tensors and metadata; the bytes differ from run to run, as the library orders its header at random."""
    with safe_open(file, framework="pt") as opened:
        return {"metadata": opened.metadata(), **{name: opened.get_tensor(name) for name in opened.keys()}}  # noqa: SIM118


def contents(folder: Path, steps: int) -> dict[str, Any]:
    """Return all of a run that must not depend on what happened to it."""
    last, best = (load_checkpoint(folder / name) for name in (f"step_{steps:09d}.pt", "best.pt"))
    for payload in (last, best):
        payload.pop("provenance", None)
    with (folder / "metrics.csv").open() as file:
        table = [{key: value for key, value in row.items() if key not in VARYING} for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{f"the last checkpoint's {key}": value for key, value in last.items()},
        **{f"best.pt's {key}": value for key, value in best.items()},
        "model.safetensors": exported(folder / "model.safetensors"),
        "metrics.csv": table,
        "metrics.jsonl": [{key: value for key, value in line.items() if key not in VARYING} for line in lines],
        "TensorBoard's events": scalars(folder),
    }


def same(one: Any, other: Any) -> bool:
    """Compare nested plain values and tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def main() -> int:
    """Run the trial and tell what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--how", choices=("kill", "term", "rank"), default="kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are kept; else they are removed")
    parser.add_argument("overrides", nargs="*", help="further overrides of the training command")
    arguments = parser.parse_args()
    chance = arguments.chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = (arguments.folder or Path(made)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        whole = start(folder, "undisturbed", arguments)
        while not list((folder / "undisturbed").glob("step_*.pt")) and whole.poll() is None:
            time.sleep(0.05)
        first = time.monotonic() - began  # until the first save
        errors = finish(whole, 3600)
        if whole.returncode:
            print(errors, file=sys.stderr)
            return 1
        print(f"undisturbed: {time.monotonic() - began:.0f} s, the first save after {first:.0f} s", flush=True)
        kills, in_saves, reached, done = 0, 0, [], False
        statuses: Counter[int] = Counter()
        while not done:
            was_hit, left = False, unfinished(folder)
            process = start(folder, "disturbed", arguments)
            if kills < arguments.kills:
                try:
                    process.wait(chance.uniform(0.2, 1.3) * first)
                except subprocess.TimeoutExpired:
                    in_saves += hit(process, folder, left, arguments, aim=kills % 2 == 1)
                    was_hit = True
                    kills += 1
            errors = finish(process, 3600)
            statuses[process.returncode] += 1
            done = process.returncode == 0
            saved = sorted(path.name for path in (folder / "disturbed").glob("step_*.pt"))
            reached.append(saved[-1][5:-3].lstrip("0") if saved else "0")
            if not done and not (was_hit and process.returncode in EXPLAINED[arguments.how]):
                print(f"status {process.returncode}, which nothing explains:\n{errors}", file=sys.stderr)
                return 1
        found, expected = (contents(folder / name, arguments.steps) for name in ("disturbed", "undisturbed"))
        wrong = [key for key in expected if key not in found or not same(found[key], expected[key])]
        print(f"{kills} times {arguments.how}, {arguments.ranks} ranks, {time.monotonic() - began:.0f} s in all")
        told = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
        print(f"{in_saves} hits in the midst of a save; statuses: {told}")
        print(f"steps saved at each end: {' '.join(reached)}")
        print(f"different: {', '.join(wrong)}" if wrong else f"equal: {', '.join(expected)}")
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
