"""EfficientNet and EfficientNet-Lite: one constructor, any width, depth and resolution."""

from typing import Literal

from torch import Tensor, nn

from effnet_train.models import fused as kernels
from effnet_train.models.layers import ConvNorm, SqueezeExcite, Style
from effnet_train.models.network import Block, Network, adds_input, initialise, stack
from effnet_train.models.scaling import EFFICIENTNET_B0, Stage, round_channels, scale

HEAD_CHANNELS = 1280


class MBConv(Block):
    """Expand, convolve every channel by itself, gate the channels, project back, add the input where shapes allow."""

    def __init__(self, shape: Stage, *, se_ratio: float, rate: float, style: Style, skip: str = "identity") -> None:
        super().__init__(shape, rate=rate, skip=adds_input(shape, skip))
        # The kernels add the input as it is.
        self.fused: kernels.Fused = False if skip == "pool" else style.fused
        expanded = shape.in_channels * shape.expand_ratio
        self.expand = ConvNorm(shape.in_channels, expanded, style=style) if shape.expand_ratio > 1 else nn.Identity()
        self.depthwise = ConvNorm(
            expanded, expanded, kernel=shape.kernel, stride=shape.stride, groups=expanded, style=style
        )
        self.squeeze_excite = gate(expanded, shape.in_channels, se_ratio, style)
        self.project = ConvNorm(expanded, shape.out_channels, style=style, activate=False)

    @property
    def operator(self) -> str:
        """Return Table 1's name."""
        return f"MBConv{self.shape.expand_ratio}"

    def transform(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        return self.project(self.squeeze_excite(self.depthwise(self.expand(x))))

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Map as `Block` does; in training by fused kernels, where they run."""
        convolutions = [part for part in (self.expand, self.depthwise, self.project) if isinstance(part, ConvNorm)]
        if not (all(part.fusable for part in convolutions) and kernels.runs(self.fused, x)):
            return super().forward(x, u)
        from effnet_train.models.fused.layers import block

        parts = self.expand, self.depthwise, self.squeeze_excite, self.project
        return block(*parts, x, skip=self.skip, u=u, rate=0.0 if u is None else self.rate)


def gate(channels: int, in_channels: int, se_ratio: float, style: Style) -> nn.Module:
    """Return the squeeze-excite of a block that takes `in_channels`, or the identity for a ratio of 0.

    It is as narrow as the block's input asks for, not as the `channels` that it scales would.
    """
    narrow = squeezed(in_channels, se_ratio)
    return SqueezeExcite(channels, narrow, style=style) if narrow else nn.Identity()


def squeezed(in_channels: int, se_ratio: float) -> int:
    """Return the width of the squeeze-excite of a block that takes `in_channels`, 0 where it has none."""
    return max(1, int(in_channels * se_ratio)) if se_ratio > 0 else 0


class EfficientNet(Network):
    """Classify images with the baseline's stages scaled in width and depth.

    `fixed_ends` is Lite's: stem and head keep their width, the first and the last stage their depth.
    `drop_connect` is the rate that the last block would have at a depth one larger: block i of N has i / N of it.
    `checkpointing` saves memory by computing every block a second time in the backward pass. `fused` asks for the
    kernels of `models.fused`.

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
        fused: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(
            resolution=resolution,
            num_classes=num_classes,
            dropout=dropout,
            drop_connect=drop_connect,
            checkpointing=checkpointing,
        )
        if not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio={se_ratio} must lie between 0 (no squeeze-excite) and 1")
        style = Style(activation=activation, padding=padding, bn_eps=bn_eps, bn_momentum=bn_momentum, fused=fused)
        stages = scale(EFFICIENTNET_B0, width, depth, fixed_ends=fixed_ends)
        head_channels = round_channels(HEAD_CHANNELS, 1 if fixed_ends else width)

        def block(shape: Stage, rate: float) -> MBConv:
            return MBConv(shape, se_ratio=se_ratio, rate=rate, style=style)

        self.stem = ConvNorm(3, stages[0].in_channels, kernel=3, stride=2, style=style)
        self.stages = stack(stages, drop_connect, block)
        self.head = ConvNorm(stages[-1].out_channels, head_channels, style=style)
        self.classifier = nn.Linear(head_channels, num_classes)
        initialise(self)
