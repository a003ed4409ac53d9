"""What each optimisation for CPUs gives: `python benchmarks/cpu_ways.py [--output FILE]`: ours, with and without it."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from effnet_train.analysis import throughput
from effnet_train.analysis.data_speed import machine
from effnet_train.analysis.throughput import Case, Work
from effnet_train.models import folding
from effnet_train.models.layers import ConvNorm


@contextmanager
def kept() -> Iterator[None]:
    """Have BatchNorm and swish keep what autograd asks for."""
    with patch.object(ConvNorm, "_recomputes", lambda *_: False):
        yield


def within(context: Callable, make: Callable[[], Work]) -> Work:
    """Build and run a case in a context."""
    with context():
        work = make()

    def run() -> None:
        with context():
            work.run()

    return Work(run, work.device, work.path)


def ways(case: Case, training: bool) -> dict[str, Work]:
    """Return ours with all that is done for a CPU, and without one thing each."""

    def make() -> Work:
        return throughput.build(case)

    def upright() -> patch:
        return patch.object(throughput, "turn", lambda model, on=True: model)

    if training:
        return {
            "all": make(),
            "keeping swish's input": within(kept, make),
            "with padded copies": within(upright, make),
        }

    def plain() -> patch:
        return patch.object(throughput, "folded", lambda model, *_, **__: (model, folding.PLAIN))

    def unfused() -> patch:
        return patch.object(folding, "_fuses", lambda: False)

    return {"all": make(), "BatchNorm folded, no more": within(unfused, make), "not folded": within(plain, make)}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = {"width": 1.0, "depth": 1.0, "resolution": 224, "dropout": 0.2, "drop_connect": 0.2}
    found: dict[str, dict[str, float]] = {}
    for job, threads, batch_size in (("train", 0, 0), ("eval", 0, 0), ("latency", 1, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        case = Case(
            library="ours",
            variant="b0",
            config=config,
            training=job == "train",
            resolution=arguments.resolution,
            batch_size=batch_size or arguments.batch_size,
        )
        works = ways(case, job == "train")
        times = throughput.interleaved(works, rounds=arguments.rounds, seconds=arguments.seconds)
        ratios = throughput.ratios(times, "all")
        found[job] = {name: round(1 / ratios[name], 3) for name in works}
        for name in works:
            print(f"{job:8} {name:26} {1000 * median(times[name]):9.1f} ms, all has {found[job][name]:.2f} x its rate")
        torch.set_num_threads(before)
    if arguments.output:
        about = {"resolution": arguments.resolution, "batch_size": arguments.batch_size}
        arguments.output.write_text(json.dumps({"machine": machine(), **about, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
