"""How long a training step takes on many GPUs: gradients summed in buckets while the backward pass goes on.

A model on paper: the costs of a collective are measured or assumed, the step's parts are those of one GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from effnet_train.analysis.complexity import complexity

_MIB = 2**20
_FIRST_BUCKET_MIB = 1.0  # DistributedDataParallel's own, so that the first sum begins early


@dataclass(frozen=True)
class Link:
    """How ranks are joined: seconds before the first byte of a message arrives, and bytes a second after that."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """`gpus` in machines of `per_machine`, joined by one link inside and by another, of each GPU, between machines."""

    gpus: int
    per_machine: int
    inside: Link
    between: Link

    def all_reduce_s(self, size: float) -> float:
        """Return the seconds of a sum of `size` bytes: within machines, a share each between them, within again."""
        inside = min(self.gpus, self.per_machine)
        machines = self.gpus // inside
        return ring_s(size, inside, self.inside) + ring_s(size / inside, machines, self.between)


def ring_s(size: float, ranks: int, link: Link) -> float:
    """Return the seconds of a ring's all-reduce: twice around, each time all but a rank's own part of the bytes."""
    hops = 2 * (ranks - 1)
    return hops * (link.latency_s + size / ranks / link.bytes_per_s)


@dataclass(frozen=True)
class Step:
    """One GPU's step: seconds of the forward and of the backward pass, and of all that follows the sums."""

    forward_s: float
    backward_s: float
    update_s: float


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed at once: their bytes, and the share of the backward pass after which all are there."""

    size: int
    ready: float


def buckets(model: nn.Module, resolution: int, limit_mib: float) -> list[Bucket]:
    """Return the gradient buckets of `model` as DistributedDataParallel makes them: from the last layer to the first.

    A layer's share of the backward pass is that of the numbers that it puts out, as the pass is bound by memory.
    """
    layers = [layer for layer in reversed(complexity(model, resolution, by_layer=True).parts) if layer.parameters]
    whole = sum(layer.activations for layer in layers)
    found: list[Bucket] = []
    size, done, limit = 0, 0, _FIRST_BUCKET_MIB
    for number, layer in enumerate(layers):
        size, done = size + 4 * layer.parameters, done + layer.activations
        if size >= limit * _MIB or number == len(layers) - 1:
            found.append(Bucket(size, done / whole))
            size, limit = 0, limit_mib
    return found


def step_s(step: Step, sums: Sequence[Bucket], cluster: Cluster, statistics_bytes: int = 0) -> float:
    """Return the seconds of a step: a bucket's sum begins when it is ready and the one before has ended.

    BatchNorm's statistics are averaged when all gradients are.
    """
    over = 0.0  # when the sums so far have ended, counted from the beginning of the backward pass
    for bucket in sums:
        over = max(over, bucket.ready * step.backward_s) + cluster.all_reduce_s(bucket.size)
    last = max(over, step.backward_s) + (cluster.all_reduce_s(statistics_bytes) if statistics_bytes else 0.0)
    return step.forward_s + last + step.update_s


def efficiency(step: Step, sums: Sequence[Bucket], cluster: Cluster, statistics_bytes: int = 0) -> float:
    """Return the images a second and GPU, as a share of those of a GPU alone."""
    return (step.forward_s + step.backward_s + step.update_s) / step_s(step, sums, cluster, statistics_bytes)


def fitted(sizes: Sequence[int], seconds: Sequence[float], ranks: int) -> Link:
    """Return the link with which `ring_s` comes closest to measured sums, by least squares of relative errors."""
    hops = 2 * (ranks - 1)
    # seconds = hops * latency + slope * size, each row divided by its seconds.
    rows = [(hops / s, hops * n / ranks / s) for n, s in zip(sizes, seconds, strict=True)]
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    latency, slope = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    return Link(max(latency, 0.0), 1 / slope)
