"""Time each call of the fused kernels that a training step makes, and say how much memory a second it moves.

    python benchmarks/kernels.py --variant b0 --batch 256 --output benchmarks/results/kernels-h100.json

The step is gone through on the meta device; what it would have called is called here, on random numbers of the same
shapes, with an empty cache, ten times. Milliseconds are medians and hold no start of the host's. On a GPU; with
TRITON_INTERPRET=1 it can be rehearsed on a CPU.
"""

import argparse
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from effnet_train.analysis import data_speed
from effnet_train.cli.build import model_variants, without_weights
from effnet_train.models.fused import launch
from effnet_train.models.layers import Conv2d

CACHE = 256 * 2**20  # bytes that push out whatever a GPU's cache holds
REPEATED = 10
Call = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def main() -> None:
    """Print a row for each kernel, and for each of its calls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", default="b0")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, help="that of the variant if not given")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", help="no more than compile all, for what follows")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; TRITON_INTERPRET=1 rehearses this on a CPU")
    device = torch.device("cpu" if interpreted else "cuda")
    size = arguments.resolution or model_variants()[arguments.variant]["resolution"]
    if arguments.compile:
        with multiprocessing.get_context("spawn").Pool(arguments.compile) as pool:
            share = partial(compiled, arguments.variant, arguments.batch, size, arguments.compile)
            print(f"{sum(pool.map(share, range(arguments.compile)))} kernel calls compiled")
        return
    rows = []
    for call, count in calls(arguments.variant, arguments.batch, size).items():
        kernel, run, moved = prepared(call, device)
        milliseconds = timed(run, device)
        rows.append(
            {
                "kernel": kernel,
                "shapes": call[1],
                "calls": count,
                "ms": round(milliseconds, 4),
                "gb_per_s": round(moved / milliseconds / 1e6, 1),
            }
        )
    report(rows)
    if arguments.output:
        machine = {**data_speed.machine(), "gpu": None if interpreted else torch.cuda.get_device_name()}
        found = {"machine": machine, "variant": arguments.variant, "batch_size": arguments.batch, "resolution": size}
        arguments.output.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


Key = tuple[str, str]
_RECORDED: dict[Key, Call] = {}


def calls(variant: str, batch: int, size: int) -> Counter[Key]:
    """Return which calls a step in bf16 makes, by kernel and by shapes, and how often."""
    counts: Counter[Key] = Counter()

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        shapes = " ".join("x".join(map(str, a.shape)) if isinstance(a, Tensor) else str(a) for a in arguments)
        key = f"{kernel.fn.__module__.rpartition('.')[2].removesuffix('_kernels')} {kernel.__name__}", shapes
        _RECORDED[key] = kernel, grid, arguments, constants
        counts[key] += 1

    with torch.device("meta"):
        model = without_weights({**model_variants()[variant], "fused": True}, 1000).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) or (isinstance(module, Conv2d) and module.groups == 1):
                module.to(torch.bfloat16)
        images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        keys = torch.empty(batch, dtype=torch.int64)
    with patch.object(launch, "_launch", record):
        model(images, keys).sum().backward()
    return counts


def compiled(variant: str, batch: int, size: int, of: int, number: int) -> int:
    """Compile one of `of` shares of the step's kernels into Triton's cache, and return how many calls that were."""
    torch.cuda.init()
    share = list(calls(variant, batch, size))[number::of]
    for kernel, grid, arguments, constants in map(_RECORDED.__getitem__, share):
        options = {"num_warps": launch._WARPS, **constants}
        kernel.warmup(*launch._specialised(kernel, arguments), grid=grid, **options, ACC=launch.tl.float32)
    return len(share)


def prepared(key: Key, device: torch.device) -> tuple[str, Callable[[], object], int]:
    """Return a call's kernel, what repeats it on random numbers, and the bytes of all its tensors."""
    kernel, grid, arguments, constants = _RECORDED[key]
    real = [random_like(a, device) if isinstance(a, Tensor) else a for a in arguments]
    moved = sum(a.nbytes for a in real if isinstance(a, Tensor))
    return key[0], lambda: launch._launch(kernel, grid, *real, **constants), moved


def random_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Return random numbers that lie as those of a tensor on the meta device would."""
    numbers = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return numbers.uniform_(0.5, 1.5) if tensor.is_floating_point() else numbers.zero_()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the median of some calls, in milliseconds; the first two compile and do not count."""
    if device.type == "cpu":
        run()
        return 1.0
    run()
    graph, push = torch.cuda.CUDAGraph(), torch.empty(CACHE, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    found = []
    for _ in range(REPEATED + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        push.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return median(found[1:])


def report(rows: list[dict[str, Any]]) -> None:
    """Print the kernels' sums, the longest first, and the calls that take longest."""
    print(f"{'kernel':32} {'calls':>6} {'ms':>9} {'GB/s':>8}")
    for kernel in sorted({row["kernel"] for row in rows}, key=lambda k: -sum_of(rows, k)[1]):
        number, spent, moved = sum_of(rows, kernel)
        print(f"{kernel:32} {number:6} {spent:9.3f} {moved / spent / 1e6:8,.0f}")
    print(f"{'all':32} {sum(r['calls'] for r in rows):6} {sum(r['calls'] * r['ms'] for r in rows):9.3f}")
    for row in sorted(rows, key=lambda row: -row["calls"] * row["ms"])[:20]:
        print(f"{row['kernel']:32} {row['calls']:6} {row['ms']:9.3f} {row['gb_per_s']:8,.0f}  {row['shapes'][:100]}")


def sum_of(rows: list[dict[str, Any]], kernel: str) -> tuple[int, float, float]:
    """Return a kernel's calls, their milliseconds and bytes in a step."""
    own = [row for row in rows if row["kernel"] == kernel]
    spent = [row["calls"] * row["ms"] for row in own]
    moved = [time * row["gb_per_s"] * 1e6 for time, row in zip(spent, own, strict=True)]
    return sum(row["calls"] for row in own), sum(spent), sum(moved)


if __name__ == "__main__":
    main()
