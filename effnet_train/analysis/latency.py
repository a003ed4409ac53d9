"""How long a network takes an image: batch 1, on one thread or a GPU, networks in turn."""

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn


def measure(
    networks: Mapping[str, tuple[nn.Module, int]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    threads: int = 1,
    device: str = "cpu",
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Time the forward pass of each network on one random image of its resolution, in float32.

    In each round all are measured in turn, so that a machine that gets slower does so for all. Returns mean, median
    and the single times by name, in seconds. The number of threads is what it was afterwards.
    """
    place = torch.device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ready = {name: _ready(model, size, place) for name, (model, size) in networks.items()}
        times: dict[str, list[float]] = {name: [] for name in networks}
        with torch.inference_mode():
            for number in range(warmup + rounds):
                for name, (model, images) in ready.items():
                    start = perf_counter()
                    model(images)
                    if place.type == "cuda":
                        torch.cuda.synchronize(place)
                    if number >= warmup:
                        times[name].append(perf_counter() - start)
                told(f"round {number + 1} of {warmup + rounds}")
    finally:
        torch.set_num_threads(before)
    return {
        name: {
            "mean_s": statistics.fmean(seconds),
            "median_s": statistics.median(seconds),
            "runs_s": [round(value, 5) for value in seconds],
        }
        for name, seconds in times.items()
    }


def _ready(model: nn.Module, resolution: int, place: torch.device) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, resolution, resolution, generator=generator)
    # The layout in which the CPU's convolutions are at their fastest, as in our evaluation.
    layout = torch.channels_last
    return model.eval().to(place).to(memory_format=layout), images.to(place).to(memory_format=layout)
