"""How long training waits for a checkpoint: `python benchmarks/checkpoint.py [--batch-size 32] [override ...]`.

EfficientNet-B0 with its average and optimizer, on the GPU where there is one, saved by the loop's own function,
in the background and at once in turn. What a save costs is the pause, and that the steps beside the writing thread
take longer than steps without; the share is that of 500 steps. The steps are real ones, of one batch again and again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.provenance import provenance
from effnet_train.cli.rank import prepare
from effnet_train.distributed import Session, resolve_device
from effnet_train.engine.train import Run, _save

INTERVAL = 500
WAYS = {"background": True, "at once": False}


def built(folder: Path, session: Session, batch_size: int, overrides: list[str]) -> Run:
    """Return a run of B0 with its first batch's worth of everything."""
    words = ["model=b0", "data=digits", f"data.root={folder}/digits", "data.preprocess.resolution=224", "workers=0"]
    words += [f"batch_size={batch_size}", "accumulate=1", "loggers=none", "name=run", f"run_root={folder}", *overrides]
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train", words), resolve=True)
    return prepare(OmegaConf.create(config), folder / "run", session)[0]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long a function and what it asks of the device take."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(run: Run, rounds: int, steps: int) -> dict[str, Any]:
    """Return the medians over rounds, in milliseconds, and the shares."""
    batch, device = next(iter(run.batches(0))), run.session.device
    ways = {way: replace(run, checkpoints=replace(run.checkpoints, background=on)) for way, on in WAYS.items()}

    def train() -> float:
        return seconds(lambda: [run.step(run.state, batch, 1e-4) for _ in range(steps)], device)

    pauses: dict[str, list[float]] = {way: [] for way in WAYS}
    beside: dict[str, list[float]] = {way: [] for way in WAYS}
    alone = []
    for count in range(rounds + 1):
        for way, kept in ways.items():
            without = train()
            pause, after = seconds(lambda kept=kept: _save(kept, must=False), device), train()  # type: ignore[misc]
            kept.checkpoints.settle()
            if count:  # the first makes room in memory
                alone.append(without)
                pauses[way].append(pause)
                beside[way].append(after - without)
    step = median(alone) / steps
    result: dict[str, Any] = {"step_ms": round(1000 * step, 2)}
    for way in WAYS:
        pause, slower = median(pauses[way]), median(beside[way])
        result[way] = {
            "pause_ms": round(1000 * pause, 2),
            "pause_share_of_500_steps": round(pause / (INTERVAL * step), 6),
            "steps_beside_slower_ms": round(1000 * slower, 2),
            "share_of_500_steps": round((pause + max(0.0, slower)) / (INTERVAL * step), 6),
        }
    return result


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="beside each save; writing should end within them")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="of effnet-train")
    arguments = parser.parse_args()
    session = Session(device=torch.device(resolve_device("auto")))
    with tempfile.TemporaryDirectory() as made:
        run = built(Path(made), session, arguments.batch_size, arguments.overrides)
        found = measured(run, arguments.rounds, arguments.steps)
        size = max(path.stat().st_size for path in (Path(made) / "run").glob("step_*.pt"))
    about = {"command": " ".join(sys.argv), "batch_size": arguments.batch_size, "file_bytes": size}
    result = {"machine": provenance(session.device), **about, **found}
    print(f"{result['machine']['device']}: {found['step_ms']:,.1f} ms a step of {arguments.batch_size} images")
    for way in WAYS:
        row = found[way]
        print(
            f"{way:10}  pause {row['pause_ms']:8.1f} ms, {row['pause_share_of_500_steps']:.3%} of {INTERVAL} steps; "
            f"with what the steps beside it take longer {row['share_of_500_steps']:.3%}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
