"""How long training waits for a checkpoint: `python benchmarks/checkpoint.py [--batch-size 32] [override ...]`.

EfficientNet-B0 with its average and optimizer, on this machine's device, written at once and in the background, in
turn; and the share of 500 steps' time that this is. The steps are real ones, of one batch again and again.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import hydra
import torch
from omegaconf import OmegaConf

from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.provenance import provenance
from effnet_train.cli.rank import prepare
from effnet_train.distributed import open_session, resolve_device

STEPS = 500


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    with tempfile.TemporaryDirectory() as folder, open_session(device) as session:
        words = ["model=b0", "data=digits", f"data.root={folder}/digits", f"batch_size={arguments.batch_size}"]
        words += ["accumulate=1", "workers=0", "loggers=none", "name=run", f"run_root={folder}", *arguments.overrides]
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = OmegaConf.create(OmegaConf.to_container(hydra.compose("train", words), resolve=True))
        run, _ = prepare(cfg, Path(folder) / "run", session)
        batch = next(iter(run.batches(0)))

        def step() -> float:
            start = time.perf_counter()
            run.step(run.state, batch, 1e-4)
            if session.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def pause(background: bool) -> float:
            checkpoints = kept[background]
            step()
            payload = {"effnet_train": 1, "meta": dict(run.meta), **run.state.state_dict(session)}
            start = time.perf_counter()
            checkpoints.save(payload)
            waited = time.perf_counter() - start
            during.append(step())  # while the thread writes, or after
            checkpoints.settle()
            return waited

        kept = {way: replace(run.checkpoints, background=way) for way in (True, False)}
        during: list[float] = []
        step()
        pauses: dict[bool, list[float]] = {True: [], False: []}
        beside: dict[bool, list[float]] = {True: [], False: []}
        for count in range(arguments.rounds + 1):
            for way, found in pauses.items():
                during.clear()
                waited = pause(way)
                if count:  # the first makes room in memory
                    found.append(waited)
                    beside[way] += during
        size = max(path.stat().st_size for path in (Path(folder) / "run").glob("step_*.pt"))
        result = {"machine": provenance(session.device), "batch_size": arguments.batch_size, "file_bytes": size}
        usual = median(beside[False])
        result["step_s"] = round(usual, 4)
        for way, name in ((True, "background"), (False, "at_once")):
            waited = median(pauses[way])
            # A step beside the thread that writes is slower: that is waiting too.
            slower = median(beside[way]) - usual
            share = (waited + slower) / (STEPS * usual)
            result[name] = {"pause_ms": round(1000 * waited, 2), "next_step_slower_ms": round(1000 * slower, 2)}
            result[name]["share_of_500_steps"] = round(share, 6)
            print(f"{name:11} pause {1000 * waited:8.1f} ms, next step slower by {1000 * slower:8.1f} ms: {share:.3%}")
        print(f"of {STEPS} steps of {usual:.3f} s at batch_size={arguments.batch_size}; {size / 1e6:.0f} MB")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
