"""MnasNet: a network of whatever stages a search has found, at any width, depth and resolution."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effnet_train.models.efficientnet import HEAD_CHANNELS, MBConv, gate
from effnet_train.models.layers import ConvNorm, Style
from effnet_train.models.network import SKIPS, Block, Network, adds_input, initialise, stack
from effnet_train.models.scaling import Stage, round_channels, scale

STEM_CHANNELS = 32
# Source: Figure 7 of Tan et al., arXiv 1807.11626.
MNASNET_A1: tuple[Mapping[str, Any], ...] = (
    {"op": "separable", "kernel": 3, "stride": 1, "channels": 16, "repeats": 1},
    {"op": "mbconv6", "kernel": 3, "stride": 2, "channels": 24, "repeats": 2},
    {"op": "mbconv3", "kernel": 5, "stride": 2, "channels": 40, "repeats": 3, "se_ratio": 0.25},
    {"op": "mbconv6", "kernel": 3, "stride": 2, "channels": 80, "repeats": 4},
    {"op": "mbconv6", "kernel": 3, "stride": 1, "channels": 112, "repeats": 2, "se_ratio": 0.25},
    {"op": "mbconv6", "kernel": 5, "stride": 2, "channels": 160, "repeats": 3, "se_ratio": 0.25},
    {"op": "mbconv6", "kernel": 3, "stride": 1, "channels": 320, "repeats": 1},
)
_KEYS = ("op", "kernel", "stride", "channels", "repeats")
_OPTIONAL = {"se_ratio": 0.0, "skip": "identity"}
STAGE_KEYS = (*_KEYS, *_OPTIONAL)


@dataclass(frozen=True)
class FoundStage(Stage):
    """Describe a stage whose blocks are of a kind of their own.

    `op` is `conv` (a regular convolution), `separable` (a depthwise one and a projection: MBConv1), or `mbconv3` and so
    on, by the expansion; `skip` one of `network.SKIPS`.
    """

    op: str
    se_ratio: float
    skip: str


def expand_ratio(op: str) -> int:
    """Return how many times wider than its input a block of the kind `op` is inside. Raises ValueError."""
    if op in ("conv", "separable"):
        return 1
    found = re.fullmatch(r"mbconv([1-9]\d?)", str(op))
    if not found:
        raise ValueError(f"op={op!r}: choose conv, separable, or mbconv and its expansion, as mbconv6")
    return int(found[1])


def found_stages(stages: Sequence[Mapping[str, Any]], stem_channels: int = STEM_CHANNELS) -> tuple[FoundStage, ...]:
    """Return the stages that a configuration describes, one after another.

    Raises: ValueError naming the stage, the key and the value.
    """
    if not stages:
        raise ValueError("stages=[] holds none: give them, as effnet-search export writes them")
    made, channels = list[FoundStage](), stem_channels
    for i, described in enumerate(stages):
        try:
            made.append(_stage(described, channels))
        except ValueError as error:
            raise ValueError(f"stages[{i}]: {error}") from None
        channels = made[-1].out_channels
    return tuple(made)


def _stage(described: Mapping[str, Any], in_channels: int) -> FoundStage:
    lacking = [key for key in _KEYS if key not in described]
    unknown = [str(key) for key in described if key not in STAGE_KEYS]
    if lacking or unknown:
        problem = f"lacks {', '.join(lacking)}" if lacking else f"holds {', '.join(unknown)}, which is not known"
        raise ValueError(f"{problem}: its keys are {', '.join(STAGE_KEYS)}")
    values = {**_OPTIONAL, **described}
    for key in ("kernel", "stride", "channels", "repeats"):
        if not (type(values[key]) is int and values[key] > 0):
            raise ValueError(f"{key}={values[key]} must be a whole number above 0")
    if values["kernel"] % 2 == 0:
        raise ValueError(f"kernel={values['kernel']} must be odd")
    if values["channels"] % 8:
        raise ValueError(f"channels={values['channels']} must be a multiple of 8, to which scaling rounds")
    if not 0 <= values["se_ratio"] <= 1:
        raise ValueError(f"se_ratio={values['se_ratio']} must lie between 0 (no squeeze-excite) and 1")
    if values["skip"] not in SKIPS:
        raise ValueError(f"skip={values['skip']!r}: choose one of {', '.join(SKIPS)}")
    return FoundStage(
        kernel=values["kernel"],
        stride=values["stride"],
        expand_ratio=expand_ratio(values["op"]),
        in_channels=in_channels,
        out_channels=values["channels"],
        repeats=values["repeats"],
        op=values["op"],
        se_ratio=float(values["se_ratio"]),
        skip=values["skip"],
    )


class RegularConv(Block):
    """Convolve all channels at once, gate them, add the input where the skip asks for it."""

    def __init__(self, shape: Stage, *, se_ratio: float, rate: float, style: Style, skip: str = "identity") -> None:
        super().__init__(shape, rate=rate, skip=adds_input(shape, skip))
        self.conv = ConvNorm(
            shape.in_channels, shape.out_channels, kernel=shape.kernel, stride=shape.stride, style=style
        )
        self.squeeze_excite = gate(shape.out_channels, shape.in_channels, se_ratio, style)

    @property
    def operator(self) -> str:
        """Return what Table 1 would call it."""
        return "Conv"

    def transform(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        return self.squeeze_excite(self.conv(x))


class MnasNet(Network):
    """Classify images with the given stages scaled in width and depth; MnasNet-A1's are those of its search.

    Each stage is a mapping: `op` (see `FoundStage`), `kernel`, `stride`, `channels`, `repeats`, and if wanted
    `se_ratio` and `skip`. Stem and head scale in width as EfficientNet's do. `drop_connect` and `checkpointing` are
    EfficientNet's.

    Raises: ValueError naming the argument, for any that is out of range.
    """

    def __init__(
        self,
        *,
        stages: Sequence[Mapping[str, Any]] = MNASNET_A1,
        stem_channels: int = STEM_CHANNELS,
        head_channels: int = HEAD_CHANNELS,
        width: float = 1.0,
        depth: float = 1.0,
        resolution: int = 224,
        dropout: float = 0.2,
        num_classes: int = 1000,
        drop_connect: float = 0.0,
        activation: str = "relu",
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
        scaled = scale(found_stages(stages, stem_channels), width, depth)
        head = round_channels(head_channels, width)

        def block(shape: Stage, rate: float) -> Block:
            assert isinstance(shape, FoundStage)
            kind = RegularConv if shape.op == "conv" else MBConv
            return kind(shape, se_ratio=shape.se_ratio, rate=rate, style=style, skip=shape.skip)

        self.stem = ConvNorm(3, scaled[0].in_channels, kernel=3, stride=2, style=style)
        self.stages = stack(scaled, drop_connect, block)
        self.head = ConvNorm(scaled[-1].out_channels, head, style=style)
        self.classifier = nn.Linear(head, num_classes)
        initialise(self)
