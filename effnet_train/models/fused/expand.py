"""The expansion, forward and backward: by kernels of its own where memory is what it waits for, else by cuDNN.

Ours leave BatchNorm's moments with the output, and backward read the large gradient once; after BatchNorm's own
backward pass, a convolution's two gradients are five passes over tensors of that size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_train.models import fused
from effnet_train.models.fused import expand_kernels, launch

# What is expanded by the kernels: on a CPU, under the interpreter, what tests are exact in.
_TYPES = {"cpu": torch.float64, "cuda": torch.bfloat16, "meta": torch.bfloat16}
_MOST_INPUTS, _MOST_OUTPUTS = 63, 256  # channels; of more outputs registers do not hold the backward pass's sums
# Fixed, as with them a sum's last digit would change. Backward as many as an H100 has room for: of matrices of sums.
_FORWARD_PROGRAMS = 2048
_BACKWARD_PROGRAMS = {32: 264, 64: 132}
# By the inputs' channels, filled up: rows and channels at a time, warps, and loads that are under way.
_FORWARD = {
    16: {"BM": 64, "BC": 64, "num_warps": 4, "num_stages": 3},
    32: {"BM": 64, "BC": 64, "num_warps": 4, "num_stages": 3},
    64: {"BM": 64, "BC": 64, "num_warps": 4, "num_stages": 3},
}
_BACKWARD = {
    32: {"BM": 64, "BC": 64, "num_warps": 4, "num_stages": 3},
    64: {"BM": 64, "BC": 128, "num_warps": 8, "num_stages": 2},
}


def _fits(x: Tensor) -> bool:
    return x.dtype == _TYPES.get(x.device.type) and x.shape[1] <= _MOST_INPUTS


def _sums_fit(x: Tensor, channels: int) -> bool:
    """Say whether the gradients' sums stay in registers: products of other GPUs than Hopper's have operands there."""
    hopper = x.device.type != "cuda" or fused.capability(x.device)[0] == 9
    return _fits(x) and channels <= _MOST_OUTPUTS and hopper


def expanded(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (N, K, H, W), channels-last, convolved by `weight` (C, K, 1, 1) of its type, and `launch.moments`."""
    if not _fits(x):
        y = F.conv2d(x, weight).contiguous(memory_format=torch.channels_last)
        return y, launch.moments(y)
    samples, inputs, height, width = x.shape
    rows, channels = samples * height * width, weight.shape[0]
    y = x.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
    filled = launch.filled(inputs)
    constants = {"K": inputs, "BK": filled, **_FORWARD[filled]}
    blocks = math.ceil(channels / constants["BC"])
    programs, chunk = launch.shares(rows, constants["BM"], _FORWARD_PROGRAMS // blocks)
    partial = x.new_empty(3, programs, channels, dtype=launch.accumulator(x))
    arguments = (x, _matrix(weight), y, partial, rows, channels, chunk, programs)
    launch._launch(expand_kernels.expand, (programs * blocks,), *arguments, **constants)
    return y, partial


def gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    affine: Sequence[Tensor],
    over_all: tuple[Tensor, int],
    needed: Sequence[bool],
    own_sums: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the weights, where they are needed, from that of BatchNorm's output.

    `y` is what `expanded` returned, `affine` and `over_all` are what `launch.input_gradient` takes. `own_sums` are
    BatchNorm's of this rank's rows, where others share its statistics: then there is the mean of these rows, too.
    """
    if not any(needed):
        return None, None
    if not _sums_fit(x, weight.shape[0]):
        dy = launch.input_gradient(y, affine, launch.NONE, g, *over_all)
        rest = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [*needed, False])
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *rest)[:2]
    (channels, inputs), (statistics, norm_weight, _), (sums, count) = weight.shape[:2], affine, over_all
    filled = max(32, launch.filled(inputs + 1))
    constants = {"K": inputs, "BK": filled, **_BACKWARD[filled]}
    rows = x.numel() // inputs
    programs, chunk = launch.shares(rows, constants["BM"], _BACKWARD_PROGRAMS[filled])
    dx = torch.empty_like(x) if needed[0] else None
    products = (channels + inputs + 1) * (inputs + 1)
    partial = x.new_empty(1, programs, products, dtype=launch.accumulator(x)) if needed[1] else None
    norm, sizes = (statistics, norm_weight, sums), (rows, channels, count, chunk)
    constants["BLOCKS"] = math.ceil(channels / constants["BC"])
    arguments = (g, x, _matrix(weight), *norm, dx, partial, *sizes)
    launch._launch(expand_kernels.expand_gradients, (programs,), *arguments, **constants)
    if partial is None:
        return dx, None
    own = None if own_sums is None else _sum_over_own_rows(own_sums, affine, sums, rows)
    return dx, _weight_gradient(launch.add_rows(partial), weight, (*norm, own), rows, count)


def _sum_over_own_rows(sums: Tensor, affine: Sequence[Tensor], means: Tensor, rows: int) -> Tensor:
    """Return the sum of y's gradient over this rank's rows (C,): it is 0 over those of all ranks alone.

    `sums` are BatchNorm's of these rows, `means` (2, C) what became of all ranks', and `affine`'s statistics have the
    mean of these rows at their end. So the ranks' results cancel, whatever was rounded before.
    """
    (mean, _, rstd, own_mean), weight, _ = affine
    plain, times_x = means
    scale = rstd * weight
    return scale * (sums[0] - rows * plain) - scale * rstd * times_x * (own_mean - mean) * rows


def _weight_gradient(products: Tensor, weight: Tensor, norm: Sequence[Tensor | None], rows: int, count: int) -> Tensor:
    channels, inputs = weight.shape[:2]
    out = products.new_empty(weight.shape)
    constants = {"K": inputs, "BK": launch.filled(inputs + 1), "BC": 16}
    arguments = (products, _matrix(weight), *norm, out, channels, rows, count)
    launch._launch(expand_kernels.expand_weight_gradient, (math.ceil(channels / 16),), *arguments, **constants)
    return out


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()
