"""Compound scaling: the baselines' stages, and every other variant as a function of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Stage:
    """Describe `repeats` blocks in a row, of which the first has the stride and takes `in_channels`.

    `expand_ratio` is how many times wider than its input (MBConv), or narrower than its output (a ResNet's bottleneck),
    a block is inside.
    """

    kernel: int
    stride: int
    expand_ratio: int
    in_channels: int
    out_channels: int
    repeats: int

    @property
    def blocks(self) -> tuple["Stage", ...]:
        """Split into stages of one block each."""
        first = replace(self, repeats=1)
        return (first,) + (replace(first, stride=1, in_channels=self.out_channels),) * (self.repeats - 1)


# Source: Table 1 of the paper, rows 2 to 8.
EFFICIENTNET_B0: tuple[Stage, ...] = (
    Stage(kernel=3, stride=1, expand_ratio=1, in_channels=32, out_channels=16, repeats=1),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=16, out_channels=24, repeats=2),
    Stage(kernel=5, stride=2, expand_ratio=6, in_channels=24, out_channels=40, repeats=2),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=40, out_channels=80, repeats=3),
    Stage(kernel=5, stride=1, expand_ratio=6, in_channels=80, out_channels=112, repeats=3),
    Stage(kernel=5, stride=2, expand_ratio=6, in_channels=112, out_channels=192, repeats=4),
    Stage(kernel=3, stride=1, expand_ratio=6, in_channels=192, out_channels=320, repeats=1),
)

# Of these the paper's Table 3 scales every stage in depth and all channels in width, stem and head too: it does not say
# so, but its FLOPS do (docs/deviations.md).
# Source: Table 1 of Howard et al., arXiv 1704.04861; a stage ends before each stride.
MOBILENET_V1: tuple[Stage, ...] = (
    Stage(kernel=3, stride=1, expand_ratio=1, in_channels=32, out_channels=64, repeats=1),
    Stage(kernel=3, stride=2, expand_ratio=1, in_channels=64, out_channels=128, repeats=2),
    Stage(kernel=3, stride=2, expand_ratio=1, in_channels=128, out_channels=256, repeats=2),
    Stage(kernel=3, stride=2, expand_ratio=1, in_channels=256, out_channels=512, repeats=6),
    Stage(kernel=3, stride=2, expand_ratio=1, in_channels=512, out_channels=1024, repeats=2),
)

# Source: Table 2 of Sandler et al., arXiv 1801.04381.
MOBILENET_V2: tuple[Stage, ...] = (
    Stage(kernel=3, stride=1, expand_ratio=1, in_channels=32, out_channels=16, repeats=1),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=16, out_channels=24, repeats=2),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=24, out_channels=32, repeats=3),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=32, out_channels=64, repeats=4),
    Stage(kernel=3, stride=1, expand_ratio=6, in_channels=64, out_channels=96, repeats=3),
    Stage(kernel=3, stride=2, expand_ratio=6, in_channels=96, out_channels=160, repeats=3),
    Stage(kernel=3, stride=1, expand_ratio=6, in_channels=160, out_channels=320, repeats=1),
)


def _resnet(*repeats: int) -> tuple[Stage, ...]:
    ends = pairwise((64, 256, 512, 1024, 2048))
    return tuple(
        Stage(kernel=3, stride=1 if i == 0 else 2, expand_ratio=4, in_channels=c, out_channels=d, repeats=count)
        for i, ((c, d), count) in enumerate(zip(ends, repeats, strict=True))
    )


# Source: Table 1 of He et al., arXiv 1512.03385, by number of layers.
RESNETS: Mapping[int, tuple[Stage, ...]] = {
    50: _resnet(3, 4, 6, 3),
    101: _resnet(3, 4, 23, 3),
    152: _resnet(3, 8, 36, 3),
}


def round_channels(channels: int, width: float, *, divisor: int = 8) -> int:
    """Scale a number of channels to the nearest multiple of `divisor` that loses no more than a tenth.

    Source: `round_filters` of the authors' code.
    """
    _check_positive("channels", channels)
    _check_positive("width", width)
    _check_positive("divisor", divisor)
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Scale a number of blocks, rounding up.

    Source: `round_repeats` of the authors' code.
    """
    _check_positive("repeats", repeats)
    _check_positive("depth", depth)
    return math.ceil(depth * repeats)


def scale(stages: Sequence[Stage], width: float, depth: float, *, fixed_ends: bool = False) -> tuple[Stage, ...]:
    """Scale stages in width and depth; with `fixed_ends` the first and the last keep their depth.

    The first stage's `in_channels` are the stem's, which fixed ends leave as they are.
    """
    scaled = []
    for i, stage in enumerate(stages):
        in_channels = round_channels(stage.in_channels, 1 if fixed_ends and i == 0 else width)
        repeats = round_repeats(stage.repeats, 1 if fixed_ends and i in (0, len(stages) - 1) else depth)
        out_channels = round_channels(stage.out_channels, width)
        scaled.append(replace(stage, in_channels=in_channels, out_channels=out_channels, repeats=repeats))
    return tuple(scaled)


def compound(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> tuple[float, float, float]:
    """Return the factors of depth, width and resolution that cost about `2 ** phi` times the multiply-adds.

    Source: equation 3 of the paper. The published variants do not follow it exactly: theirs are in `configs/model`.
    """
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
        if not value >= 1:
            raise ValueError(f"{name}={value}: a scaling coefficient is at least 1 (the paper's: 1.2, 1.1, 1.15)")
    return alpha**phi, beta**phi, gamma**phi


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be a number above 0")
