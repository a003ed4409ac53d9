"""What summing gradients costs: `python benchmarks/all_reduce.py [--output FILE]`.

Measured on two ranks of this machine (gloo): sums of several sizes, the step of DistributedDataParallel with several
bucket sizes and options, in turn. Modelled from that, and from links that are assumed: 8, 64 and 512 GPUs.
"""

import argparse
import json
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from effnet_train.analysis.data_speed import machine
from effnet_train.analysis.scaling_model import Cluster, Link, Step, buckets, efficiency, fitted
from effnet_train.models.efficientnet import EfficientNet

RANKS = 2
SIZES = [2**n for n in range(12, 27, 2)]  # bytes
OPTIONS: dict[str, dict[str, Any]] = {
    "25 MiB, copies": {},
    "25 MiB, views": {"gradient_as_bucket_view": True},
    "25 MiB, views, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
    **{f"{size} MiB, views": {"gradient_as_bucket_view": True, "bucket_cap_mb": size} for size in (2, 8, 100)},
}
# Assumed, from data sheets at 80 % of what they name: NVLink 4 (450 GB/s each way), 400 Gbit/s of InfiniBand a GPU.
NVLINK, INFINIBAND = Link(5e-6, 360e9), Link(10e-6, 40e9)
VARIANTS = {"b0": (1.0, 1.0, 224), "b4": (1.4, 1.8, 380), "b7": (2.0, 3.1, 600)}


def measured(rank: int, port: int, arguments: argparse.Namespace, box: Any) -> None:
    """Measure as one rank; rank 0 puts what it found into `box`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))
    sums = {size: _sum_s(size, arguments.rounds) for size in SIZES}
    steps = _steps(arguments)
    if rank == 0:
        box.put({"sums": sums, "steps": steps})
    dist.barrier()
    dist.destroy_process_group()


def _sum_s(size: int, rounds: int) -> float:
    tensor, seconds = torch.ones(size // 4), []
    for _ in range(rounds + 2):
        dist.barrier()
        start = perf_counter()
        dist.all_reduce(tensor)
        tensor.fill_(1)
        seconds.append(perf_counter() - start)
    return median(seconds[2:])


def _steps(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of B0's forward and backward pass by options, in turn; alone: without sums."""
    networks: dict[str, Any] = {"alone": EfficientNet().train()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in OPTIONS.items():
            networks[name] = DistributedDataParallel(EfficientNet().train(), broadcast_buffers=False, **options)
    images = torch.randn(arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(arguments.rounds + 2):
        for name, network in networks.items():
            dist.barrier()
            start = perf_counter()
            network(images).square().mean().backward()
            if number >= 2:
                times[name].append(perf_counter() - start)
            for parameter in network.parameters():
                parameter.grad = None
    return times


def modelled(step_ms: dict[str, float]) -> list[dict[str, Any]]:
    """Return the efficiency of 8, 64 and 512 GPUs by bucket size, for steps of so many milliseconds a GPU."""
    rows = []
    for name, milliseconds in step_ms.items():
        width, depth, resolution = VARIANTS[name]
        with torch.device("meta"):
            model = EfficientNet(width=width, depth=depth, resolution=resolution)
        statistics = 4 * sum(b.numel() for b in model.buffers() if b.is_floating_point())
        gradients = 4 * sum(p.numel() for p in model.parameters())
        seconds = milliseconds / 1000
        step = Step(0.3 * seconds, 0.65 * seconds, 0.05 * seconds)
        for gpus in (8, 64, 512):
            cluster = Cluster(gpus, 8, NVLINK, INFINIBAND)
            found = {
                size: round(efficiency(step, buckets(model, resolution, size), cluster, statistics), 4)
                for size in (2, 8, 25, 100)
            }
            sums = 1000 * cluster.all_reduce_s(gradients)
            about = {
                "variant": name,
                "step_ms": milliseconds,
                "gpus": gpus,
                "gradient_mib": round(gradients / 2**20, 1),
            }
            rows.append({**about, "sum_ms": round(sums, 3), "efficiency_by_bucket_mib": found})
    return rows


def main() -> None:
    """Measure, model, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument(
        "--step-ms",
        nargs="*",
        default=["b0=100", "b4=100", "b7=100"],
        help="of a GPU alone; assumed where not measured",
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = multiprocessing.spawn(measured, (port, arguments, box), nprocs=RANKS, join=False)
    found = box.get()
    while not ranks.join():
        pass
    link = fitted(list(found["sums"]), list(found["sums"].values()), RANKS)
    rows = modelled({name: float(ms) for name, ms in (text.split("=") for text in arguments.step_ms)})
    print(f"gloo, {RANKS} ranks: {link.latency_s * 1e6:,.0f} us and {link.bytes_per_s / 1e9:.2f} GB/s a message")
    for size, seconds in found["sums"].items():
        print(f"  {size / 2**10:10,.0f} KiB {seconds * 1000:9.3f} ms")
    steps = {name: median(times) for name, times in found["steps"].items()}
    ratios = {
        name: median(t / a for t, a in zip(times, found["steps"]["alone"], strict=True))
        for name, times in found["steps"].items()
    }
    for name, seconds in steps.items():
        print(f"  {name:28} {seconds * 1000:9.1f} ms a step, {ratios[name]:.3f} of it alone")
    for row in rows:
        print(f"  {row['variant']} on {row['gpus']:3} GPUs: {row['efficiency_by_bucket_mib']} (bucket MiB: efficiency)")
    if arguments.output:
        result = {
            "machine": machine(),
            "command": " ".join(sys.argv),
            "link": vars(link),
            "sums_s": found["sums"],
            "step_s": steps,
            "step_ratio": ratios,
            "assumed": {"inside": vars(NVLINK), "between": vars(INFINIBAND), "per_machine": 8},
            "modelled": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
