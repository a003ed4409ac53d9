"""EfficientNet and EfficientNet-Lite: one constructor, any width, depth and resolution."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_train.models.layers import (
    ConvNorm,
    SqueezeExcite,
    Style,
    drop_connect,
    dropout,
    frozen_statistics,
    uniform,
)
from effnet_train.models.scaling import EFFICIENTNET_B0, Stage, round_channels, scale

STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class MBConv(nn.Module):
    """Expand, convolve every channel by itself, gate the channels, project back, add the input where shapes allow.

    `rate` is drop connect's for this block. A block without a skip never drops: nothing would be left.
    """

    def __init__(self, block: Stage, *, se_ratio: float, rate: float, style: Style) -> None:
        super().__init__()
        expanded = block.in_channels * block.expand_ratio
        self.skip = block.stride == 1 and block.in_channels == block.out_channels
        self.rate = rate if self.skip else 0.0
        self.expand = ConvNorm(block.in_channels, expanded, style=style) if block.expand_ratio > 1 else nn.Identity()
        self.depthwise = ConvNorm(
            expanded, expanded, kernel=block.kernel, stride=block.stride, groups=expanded, style=style
        )
        # The gate is as narrow as the block's input asks for, not as the expanded tensor would.
        squeezed = max(1, int(block.in_channels * se_ratio))
        self.squeeze_excite = SqueezeExcite(expanded, squeezed, style=style) if se_ratio > 0 else nn.Identity()
        self.project = ConvNorm(expanded, block.out_channels, style=style, activate=False)

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W); in training `u` (N,), uniform in [0, 1), decides which samples only skip."""
        y = self.project(self.squeeze_excite(self.depthwise(self.expand(x))))
        if not self.skip:
            return y
        if self.training and self.rate > 0 and u is not None:
            y = drop_connect(y, u, self.rate)
        return x + y


class TableRow(NamedTuple):
    """Hold a row of the paper's Table 1; `resolution` is of the input, as there."""

    operator: str
    kernel: int
    resolution: int
    channels: int
    layers: int


class EfficientNet(nn.Module):
    """Classify images with the baseline's stages scaled in width and depth.

    `resolution` is what the weights are trained at: preprocessing reads it, while the network takes any size.
    `fixed_ends` is Lite's: stem and head keep their width, the first and the last stage their depth.
    `drop_connect` is the rate that the last block would have at a depth one larger: block i of N has i / N of it.
    `checkpointing` saves memory by computing every block a second time in the backward pass.

    Raises: ValueError naming the argument, for any that is out of range.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        resolution: int = 224,
        dropout: float = 0.2,
        num_classes: int = 1000,
        drop_connect: float = 0.2,
        se_ratio: float = 0.25,
        activation: str = "swish",
        fixed_ends: bool = False,
        padding: str = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_whole(resolution=resolution, num_classes=num_classes)
        _check_rates(dropout=dropout, drop_connect=drop_connect)
        if not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio={se_ratio} must lie between 0 (no squeeze-excite) and 1")
        style = Style(activation=activation, padding=padding, bn_eps=bn_eps, bn_momentum=bn_momentum)
        self.resolution = resolution
        self.num_classes = num_classes
        self.dropout = dropout
        self.drop_connect = drop_connect
        self.checkpointing = checkpointing

        stages = scale(EFFICIENTNET_B0, width, depth, fixed_ends=fixed_ends)
        head_channels = round_channels(HEAD_CHANNELS, 1 if fixed_ends else width)
        rates = drop_connect_rates(sum(stage.repeats for stage in stages), drop_connect)

        self.stem = ConvNorm(3, stages[0].in_channels, kernel=3, stride=2, style=style)
        self.stages = nn.Sequential()
        for stage in stages:
            blocks = (MBConv(block, se_ratio=se_ratio, rate=next(rates), style=style) for block in stage.blocks)
            self.stages.append(nn.Sequential(*blocks))
        self.head = ConvNorm(stages[-1].out_channels, head_channels, style=style)
        self.classifier = nn.Linear(head_channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes).

        In training the int64 `keys` (N,), one a sample, settle what drop connect and dropout drop: the same key
        drops the same, whatever the batch, rank or device. Without keys they are drawn from torch's generator.
        """
        if self.training and keys is None and (self.dropout > 0 or self.drop_connect > 0):
            keys = torch.randint(2**63 - 1, (images.shape[0],), device=images.device)
        features = self.features(images, keys).mean((2, 3))
        if self.training and keys is not None and self.dropout > 0:
            features = dropout(features, keys, self.dropout)
        return self.classifier(features)

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to what the classifier averages: (N, channels, ceil(H / 32), ceil(W / 32))."""
        blocks = list(self.blocks())
        rows: list[Tensor | None] = [None] * len(blocks)
        if self.training and keys is not None and self.drop_connect > 0:
            # One call for all blocks: dropping costs a handful of small kernels, not a handful a block.
            rows = list(uniform(keys, len(blocks)))
        x = self.stem(images)
        for block, u in zip(blocks, rows, strict=True):
            x = self._recomputed(block, x, u) if self.checkpointing and self.training else block(x, u)
        return self.head(x)

    def blocks(self) -> Iterator[MBConv]:
        """Yield the blocks of all stages in order."""
        for stage in self.stages.children():
            for block in stage.children():
                assert isinstance(block, MBConv)
                yield block

    def table(self) -> list[TableRow]:
        """Describe the network as Table 1 of the paper does, a row a stage, at `self.resolution`."""
        size, channels = self.resolution, self.stem.conv.out_channels
        rows = [TableRow("Conv3x3", 3, size, channels, 1)]
        size = math.ceil(size / 2)
        for stage in self.stages.children():
            first = next(stage.children())
            assert isinstance(first, MBConv)
            conv = first.depthwise.conv
            ratio, channels = conv.in_channels // channels, first.project.conv.out_channels
            rows.append(TableRow(f"MBConv{ratio}", conv.kernel_size[0], size, channels, len(list(stage.children()))))
            size = math.ceil(size / conv.stride[0])
        return [*rows, TableRow("Conv1x1 & Pooling & FC", 1, size, self.head.conv.out_channels, 1)]

    def _recomputed(self, block: MBConv, x: Tensor, u: Tensor | None) -> Tensor:
        # The second computation must not move BatchNorm's statistics a second time. A compiler sees to that itself.
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), frozen_statistics(block)

        # `u` is given, so that nothing random is left in a block and no generator's state need be kept.
        if torch.compiler.is_compiling():
            return checkpoint(block, x, u, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(block, x, u, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


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
