"""The least time that a step can take on a device, and where the time of one goes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from effnet_train.analysis.complexity import complexity

# How often a number that a convolution puts out must cross memory: BatchNorm needs the sums of the whole batch before
# it changes any. Forward it is written and read; backward it is read for BatchNorm's sums and again for the gradient,
# which is written and read. In evaluation BatchNorm is in the convolution.
_CROSSINGS = {True: 6, False: 2}
# Of a weight, in float32: read forward and backward; its gradient written and read; read and written by the optimizer,
# as are its two slots and the average.
_WEIGHT_CROSSINGS = {True: 12, False: 1}
_MEASURED_S = 1.0


@dataclass(frozen=True)
class Device:
    """What a device was measured to do: bytes read or written a second in a copy, operations a second in a product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Floor:
    """What a step cannot do without: operations and bytes of memory; and the seconds that the slower of both takes."""

    flops: float
    bytes: float
    seconds: float


def floor(
    model: nn.Module, resolution: int, batch_size: int, *, training: bool, number_bytes: int, device: Device
) -> Floor:
    """Return the floor of a step of `batch_size` images, or of their evaluation; a number takes `number_bytes`."""
    cost = complexity(model, resolution)
    # The gradients of the input and of the weights each cost what the forward pass does.
    flops = 2.0 * cost.multiply_adds * batch_size * (3 if training else 1)
    moved = cost.activations * batch_size * number_bytes * _CROSSINGS[training]
    moved += cost.parameters * 4 * _WEIGHT_CROSSINGS[training]
    return Floor(flops, float(moved), max(flops / device.flops_per_s, moved / device.bytes_per_s))


def measure_device(device: str, precision: str) -> Device:
    """Measure a large copy and a large product of matrices on a device, in the precision of a network."""
    on_gpu = device == "cuda"
    source = torch.ones(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 2048
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    matrix = torch.randn(side, side, device=device, dtype=halves.get(precision, torch.float32))
    multiplied = _best(lambda: matrix @ matrix, device)
    return Device(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def _best(function: Callable[[], object], device: str) -> float:
    """Return the least seconds of a call: the device's rate is that at which nothing else disturbs it."""
    seconds: list[float] = []
    while len(seconds) < 10 or (sum(seconds) < _MEASURED_S and len(seconds) < 1000):
        start = perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return min(seconds)


# Parts of the operators' names, the first that fits; a convolution is looked at once more.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "convolution, depthwise": ("NormActDepthwise",),  # with expansion, BatchNorm and activation before it
    "gate and projection": ("NormActProject",),  # with BatchNorm and activation before them
    "convolution": ("conv",),
    "normalisation": ("batch_norm", "norm_swish", "NormSwish", "NormAct"),
    "padding": ("pad", "flip"),
    "optimizer and average": ("Optimizer", "_foreach", "lerp", "addcmul", "addcdiv", "sqrt"),
    "activation, gate, residual": ("silu", "sigmoid", "mul", "mean", "sum", "add", "where", "div"),
    "compiled": ("triton", "CompiledFx", "Torch-Compiled", "graph_"),
    "matrix products": ("mm",),
    "copies": ("copy", "clone", "contiguous", "fill", "zero", "empty", "to"),
}


def by_kind(run: Callable[[], object], device: str) -> dict[str, float]:
    """Return the shares of a call's time by kind of layer, the largest first; they add up to 1."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of itself on standard error
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as found:
        run()
        if device == "cuda":
            torch.cuda.synchronize()  # what is under way when the profile ends is not in it
    times: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        # A GPU's kernels are listed once more by themselves, under names that tell little.
        if spent and event.device_type == DeviceType.CPU:
            kind = _kind(event)
            times[kind] = times.get(kind, 0.0) + spent
    whole = sum(times.values())
    return {kind: round(spent / whole, 4) for kind, spent in sorted(times.items(), key=lambda pair: -pair[1])}


def _kind(event: Any) -> str:
    kind = next((kind for kind, parts in _KINDS.items() if any(part in event.key for part in parts)), "other")
    if kind != "convolution":
        return kind
    weights = [shape for shape in event.input_shapes if len(shape) == 4]
    depthwise = any(shape[1] == 1 and shape[2] > 1 for shape in weights)
    return "convolution, depthwise" if depthwise else "convolution, other"
