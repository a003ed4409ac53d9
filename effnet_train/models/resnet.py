"""ResNets with bottlenecks: the paper's Table 3 scales ResNet-50, here at any width, depth and resolution."""

from torch import Tensor, nn

from effnet_train.models.layers import ConvNorm, MaxPool2d, Style
from effnet_train.models.network import Block, Network, initialise, stack
from effnet_train.models.scaling import RESNETS, Stage, round_channels, scale

STRIDES_AT = ("1x1", "3x3")


class Bottleneck(Block):
    """Reduce the channels, convolve, expand again, and add the input, itself projected where shapes differ.

    The shape's `expand_ratio` is how many times narrower than its output the block is inside.
    `stride_at` is the convolution that has the stride: the 3x3, or the 1x1 before it.
    """

    def __init__(self, shape: Stage, *, rate: float, stride_at: str, style: Style) -> None:
        super().__init__(shape, rate=rate, skip=True)
        inner = round_channels(shape.out_channels, 1 / shape.expand_ratio)
        first, second = (shape.stride, 1) if stride_at == "1x1" else (1, shape.stride)
        self.reduce = ConvNorm(shape.in_channels, inner, stride=first, style=style)
        self.conv = ConvNorm(inner, inner, kernel=shape.kernel, stride=second, style=style)
        self.expand = ConvNorm(inner, shape.out_channels, style=style, activate=False)
        self.shortcut: nn.Module = nn.Identity()
        if shape.stride > 1 or shape.in_channels != shape.out_channels:
            self.shortcut = ConvNorm(
                shape.in_channels, shape.out_channels, stride=shape.stride, style=style, activate=False
            )
        self.act = style.make_activation()

    def transform(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        return self.expand(self.conv(self.reduce(x)))

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W); in training `u` (N,), uniform in [0, 1), decides which samples only take the shortcut."""
        return self.act(self.shortcut(x) + self.dropped(self.transform(x), u))


class PooledStem(ConvNorm):
    """Convolve, normalise and activate at half the size, and take maxima at half of that."""

    def __init__(self, channels: int, *, style: Style) -> None:
        super().__init__(3, channels, kernel=7, stride=2, style=style)
        self.pool = MaxPool2d(kernel=3, stride=2, padding=style.padding)


class ResNet(Network):
    """Classify images with the stages of the ResNet of `layers` (50, 101 or 152) scaled in width and depth.

    `stride_at="1x1"` is the network of its paper, "3x3" that of the later code and of all whose accuracy is compared.
    `last_gamma` is what the last BatchNorm of each block scales by at first: with 0 a block begins as its shortcut
    (Goyal et al., arXiv 1706.02677, section 5.1). `drop_connect` and `checkpointing` are EfficientNet's.

    Source: He et al., arXiv 1512.03385, Table 1.
    Raises: ValueError naming the argument, for any that is out of range.
    """

    def __init__(
        self,
        *,
        layers: int = 50,
        width: float = 1.0,
        depth: float = 1.0,
        resolution: int = 224,
        dropout: float = 0.0,
        num_classes: int = 1000,
        drop_connect: float = 0.0,
        stride_at: str = "3x3",
        last_gamma: float = 0.0,
        activation: str = "relu",
        padding: str = "symmetric",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            resolution=resolution,
            num_classes=num_classes,
            dropout=dropout,
            drop_connect=drop_connect,
            checkpointing=checkpointing,
        )
        if layers not in RESNETS:
            raise ValueError(f"layers={layers}: choose one of {', '.join(map(str, RESNETS))}")
        if stride_at not in STRIDES_AT:
            raise ValueError(f"stride_at={stride_at!r}: choose one of {', '.join(STRIDES_AT)}")
        style = Style(activation=activation, padding=padding, bn_eps=bn_eps, bn_momentum=bn_momentum)
        stages = scale(RESNETS[layers], width, depth)
        self.stem = PooledStem(stages[0].in_channels, style=style)
        self.stages = stack(
            stages,
            drop_connect,
            lambda shape, rate: Bottleneck(shape, rate=rate, stride_at=stride_at, style=style),
        )
        self.head = nn.Identity()
        self.classifier = nn.Linear(stages[-1].out_channels, num_classes)
        initialise(self)
        for block in self.stages.modules():
            if isinstance(block, Bottleneck):
                nn.init.constant_(block.expand.norm.weight, last_gamma)
