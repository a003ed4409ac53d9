"""MobileNetV1 and MobileNetV2: the paper's Table 3 scales them, here at any width, depth and resolution."""

from torch import Tensor, nn

from effnet_train.models.efficientnet import MBConv
from effnet_train.models.layers import ConvNorm, Style
from effnet_train.models.network import Block, Network, initialise, stack
from effnet_train.models.scaling import MOBILENET_V1, MOBILENET_V2, Stage, round_channels, scale

HEAD_CHANNELS = 1280  # MobileNetV2's


class DepthwiseSeparable(Block):
    """Convolve every channel by itself, then all of them at every place; nothing is added to it."""

    def __init__(self, shape: Stage, *, rate: float, style: Style) -> None:
        super().__init__(shape, rate=rate, skip=False)
        channels = shape.in_channels
        self.depthwise = ConvNorm(
            channels, channels, kernel=shape.kernel, stride=shape.stride, groups=channels, style=style
        )
        self.pointwise = ConvNorm(channels, shape.out_channels, style=style)

    def transform(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        return self.pointwise(self.depthwise(x))


class MobileNetV1(Network):
    """Classify images with MobileNetV1's stages scaled in width and depth.

    No block has a skip, so that `drop_connect` finds nothing to drop at any depth; it is there so that whatever
    recipe says how to train one network says it for all. `checkpointing` is EfficientNet's.

    Source: Howard et al., arXiv 1704.04861, Table 1.
    Raises: ValueError naming the argument, for any that is out of range.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        resolution: int = 224,
        dropout: float = 0.0,
        num_classes: int = 1000,
        drop_connect: float = 0.0,
        activation: str = "relu6",
        padding: str = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            resolution=resolution,
            num_classes=num_classes,
            dropout=dropout,
            drop_connect=drop_connect,
            checkpointing=checkpointing,
        )
        style = Style(activation=activation, padding=padding, bn_eps=bn_eps, bn_momentum=bn_momentum)
        stages = scale(MOBILENET_V1, width, depth)
        self.stem = ConvNorm(3, stages[0].in_channels, kernel=3, stride=2, style=style)
        self.stages = stack(stages, drop_connect, lambda shape, rate: DepthwiseSeparable(shape, rate=rate, style=style))
        self.head = nn.Identity()
        self.classifier = nn.Linear(stages[-1].out_channels, num_classes)
        initialise(self)


class MobileNetV2(Network):
    """Classify images with MobileNetV2's stages scaled in width and depth.

    `drop_connect` and `checkpointing` are EfficientNet's.

    Source: Sandler et al., arXiv 1801.04381, Table 2.
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
        drop_connect: float = 0.0,
        activation: str = "relu6",
        padding: str = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            resolution=resolution,
            num_classes=num_classes,
            dropout=dropout,
            drop_connect=drop_connect,
            checkpointing=checkpointing,
        )
        style = Style(activation=activation, padding=padding, bn_eps=bn_eps, bn_momentum=bn_momentum)
        stages = scale(MOBILENET_V2, width, depth)
        # Its paper: below a width of 1 the head stays as wide as it is.
        head_channels = round_channels(HEAD_CHANNELS, max(1.0, width))
        self.stem = ConvNorm(3, stages[0].in_channels, kernel=3, stride=2, style=style)
        self.stages = stack(
            stages, drop_connect, lambda shape, rate: MBConv(shape, se_ratio=0.0, rate=rate, style=style)
        )
        self.head = ConvNorm(stages[-1].out_channels, head_channels, style=style)
        self.classifier = nn.Linear(head_channels, num_classes)
        initialise(self)
