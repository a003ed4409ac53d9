"""What all networks of scaled stages share: blocks that may be dropped, the pass through them, their table."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from effnet_train.models.layers import ConvNorm, MaxPool2d, drop_connect, dropout, frozen_statistics, uniform
from effnet_train.models.scaling import Stage

# What a block adds its input to: its output where shapes allow, its output whatever the shapes, nothing.
SKIPS = ("identity", "pool", "none")


class Block(nn.Module):
    """Change an image's features by `transform`, and add the input where the kind of block and the shapes allow.

    `shape` is a stage of this block alone, `rate` drop connect's. A block without a skip never drops: nothing would
    be left.
    """

    def __init__(self, shape: Stage, *, rate: float, skip: bool) -> None:
        super().__init__()
        assert shape.repeats == 1
        self.shape = shape
        self.skip = skip
        self.rate = rate if skip else 0.0

    @property
    def operator(self) -> str:
        """Return what the paper's Table 1 would call the block."""
        return type(self).__name__

    def transform(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to what is added to the input, or stands in its place."""
        raise NotImplementedError

    def dropped(self, y: Tensor, u: Tensor | None) -> Tensor:
        """Drop the samples of `y` that `u` asks for, in training."""
        return drop_connect(y, u, self.rate) if self.training and self.rate > 0 and u is not None else y

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W); in training `u` (N,), uniform in [0, 1), decides which samples only skip."""
        y = self.transform(x)
        return pooled(x, self.shape) + self.dropped(y, u) if self.skip else y


def adds_input(shape: Stage, skip: str) -> bool:
    """Say whether a block of that shape has a skip, by one of SKIPS."""
    return skip == "pool" or (skip == "identity" and shape.stride == 1 and shape.in_channels == shape.out_channels)


def pooled(x: Tensor, shape: Stage) -> Tensor:
    """Map a block's input to the shape of its output: averaged over the stride, channels cut off or added as zeros."""
    if shape.stride > 1:
        x = F.avg_pool2d(x, shape.stride, ceil_mode=True)
    added = shape.out_channels - shape.in_channels
    return F.pad(x, (0, 0, 0, 0, 0, added)) if added else x


class TableRow(NamedTuple):
    """Hold a row of the paper's Table 1; `resolution` is of the input, as there."""

    operator: str
    kernel: int
    resolution: int
    channels: int
    layers: int


class Network(nn.Module):
    """Classify images with a stem, stages of blocks, a head (or none: the identity), averaging and a linear classifier.

    A subclass's constructor makes these parts. `resolution` is what the weights are trained at: preprocessing reads
    it, while the network takes any size.

    Raises: ValueError naming the argument, for any that is out of range.
    """

    stem: ConvNorm
    stages: nn.Sequential
    head: nn.Module
    classifier: nn.Linear

    def __init__(
        self, *, resolution: int, num_classes: int, dropout: float, drop_connect: float, checkpointing: bool
    ) -> None:
        super().__init__()
        _check_whole(resolution=resolution, num_classes=num_classes)
        _check_rates(dropout=dropout, drop_connect=drop_connect)
        self.resolution = resolution
        self.num_classes = num_classes
        self.dropout = dropout
        self.drop_connect = drop_connect
        self.checkpointing = checkpointing
        self.turned = False  # models/turning.py: inside, images stand on their heads

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes).

        In training the int64 `keys` (N,), one a sample, settle what drop connect and dropout drop: the same key
        drops the same, whatever the batch, rank or device. Without keys they are drawn from torch's generator.
        """
        if self.training and keys is None and (self.dropout > 0 or self.drop_connect > 0):
            keys = torch.randint(2**63 - 1, (images.shape[0],), device=images.device)
        features = self._features(images, keys).mean((2, 3))
        if self.training and keys is not None and self.dropout > 0:
            features = dropout(features, keys, self.dropout)
        return self.classifier(features)

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to what the classifier averages: (N, channels, ceil(H / 32), ceil(W / 32))."""
        features = self._features(images, keys)
        return features.flip((2, 3)) if self.turned else features

    def _features(self, images: Tensor, keys: Tensor | None) -> Tensor:
        """Return the features, on their heads where the network is turned."""
        blocks = list(self.blocks())
        rows: list[Tensor | None] = [None] * len(blocks)
        if self.training and keys is not None and self.drop_connect > 0:
            # One call for all blocks: dropping costs a handful of small kernels, not a handful a block.
            rows = list(uniform(keys, len(blocks)))
        x = self.stem(images.flip((2, 3)) if self.turned else images)
        for block, u in zip(blocks, rows, strict=True):
            x = self._recomputed(block, x, u) if self.checkpointing and self.training else block(x, u)
        return self.head(x)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of all stages in order."""
        for stage in self.stages.children():
            for block in stage.children():
                assert isinstance(block, Block)
                yield block

    def table(self) -> list[TableRow]:
        """Describe the network as Table 1 of the paper does, a row a stage, at `self.resolution`."""
        size, kernel = self.resolution, self.stem.conv.kernel_size[0]
        rows = [TableRow(f"Conv{kernel}x{kernel}", kernel, size, self.stem.conv.out_channels, 1)]
        size = math.ceil(size / self.stem.conv.stride[0])
        for module in self.stem.children():
            if isinstance(module, MaxPool2d):
                rows.append(TableRow("MaxPool", module.kernel_size, size, rows[0].channels, 1))
                size = math.ceil(size / module.stride)
        for stage in self.stages.children():
            first = next(stage.children())
            assert isinstance(first, Block)
            shape, count = first.shape, len(list(stage.children()))
            rows.append(TableRow(first.operator, shape.kernel, size, shape.out_channels, count))
            size = math.ceil(size / shape.stride)
        conv = "" if isinstance(self.head, nn.Identity) else "Conv1x1 & "
        return [*rows, TableRow(f"{conv}Pooling & FC", 1, size, self.classifier.in_features, 1)]

    def _recomputed(self, block: Block, x: Tensor, u: Tensor | None) -> Tensor:
        # The second computation must not move BatchNorm's statistics a second time. A compiler sees to that itself.
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), frozen_statistics(block)

        # `u` is given, so that nothing random is left in a block and no generator's state need be kept.
        if torch.compiler.is_compiling():
            return checkpoint(block, x, u, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(block, x, u, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def stack(stages: Sequence[Stage], drop_connect: float, make: Callable[[Stage, float], Block]) -> nn.Sequential:
    """Make the blocks of all stages, each from its shape and its rate of drop connect."""
    rates = drop_connect_rates(sum(stage.repeats for stage in stages), drop_connect)
    return nn.Sequential(*(nn.Sequential(*(make(shape, next(rates)) for shape in stage.blocks)) for stage in stages))


def drop_connect_rates(count: int, rate: float) -> Iterator[float]:
    """Yield the rates of `count` blocks, linear in depth from 0: the last has `rate * (count - 1) / count`."""
    return (rate * i / count for i in range(count))


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Draw a network's weights as the authors' code does, from torch's generator.

    Source: `conv_kernel_initializer` and `dense_kernel_initializer` there; fan-out counts one group's outputs, and
    the normal distribution is not truncated.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            module.weight.normal_(0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.out_features)
            module.weight.uniform_(-bound, bound)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
            module.bias.zero_()


def _check_whole(**values: int) -> None:
    for name, value in values.items():
        if not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name}={value} must be a whole number above 0")


def _check_rates(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be a rate from 0 (off) to below 1")
