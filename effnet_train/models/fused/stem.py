"""The convolution of few channels that a network begins with, by our own kernels: cuDNN would fill its channels up."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnet_train.models.fused import launch, stem_kernels
from effnet_train.models.fused.launch import Padding
from effnet_train.models.layers import Conv2d

_SEEN = 32  # numbers that a pixel of the output may see
_MOST_CHANNELS = 64
# Pixels at a time, and programs: fixed, as with them a sum's last digit would change.
_BLOCK, _PROGRAMS = 128, 1024


def fits(conv: Conv2d, x: Tensor) -> bool:
    """Say whether the kernels compute this convolution: in half precision, and without a gradient of its input."""
    seen = conv.kernel_size[0] ** 2 * conv.in_channels
    few = conv.groups == 1 and conv.bias is None and seen <= _SEEN and conv.out_channels <= _MOST_CHANNELS
    half = launch.autocast_type(x) in (torch.bfloat16, torch.float16) or x.device.type == "cpu"
    return few and half and not x.requires_grad


class StemConv(torch.autograd.Function):
    """Convolve x (N, Cin, H, W), which has no gradient; the second result holds moments of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """Return (N, C, ceil(H / stride), ceil(W / stride)) and its moments."""
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = (math.ceil(side / padding.stride) for side in x.shape[2:])
        channels = weight.shape[0]
        y = x.new_empty(x.shape[0], height, width, channels, dtype=launch.autocast_type(x)).permute(0, 3, 1, 2)
        sizes, programs, constants = _sizes(x, y, padding)
        partial = y.new_empty(3, programs, channels, dtype=launch.accumulator(y))
        rows = weight.to(y.dtype).permute(0, 2, 3, 1).reshape(channels, -1)
        launch._launch(stem_kernels.forward, (programs,), x, rows, y, partial, *sizes, programs, **constants)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        ctx.mark_non_differentiable(partial)
        ctx.set_materialize_grads(False)
        return y, partial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the weights' gradient."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        sizes, programs, constants = _sizes(x, dy, ctx.padding)
        channels, seen = weight.shape[0], weight[0].numel()
        partial = dy.new_empty(1, programs, channels * seen, dtype=launch.accumulator(dy))
        launch._launch(stem_kernels.weight_gradient, (programs,), x, dy, partial, *sizes, programs, **constants)
        kernel = ctx.padding.kernel
        found = launch.add_rows(partial).view(channels, kernel, kernel, -1).permute(0, 3, 1, 2)
        return None, found.to(dy.dtype).to(weight.dtype), None  # rounded as autocast would have it


def _sizes(x: Tensor, y: Tensor, padding: Padding) -> tuple[tuple[int, ...], int, dict[str, int]]:
    rows, channels = launch._rows(y), y.shape[1]
    programs, chunk = launch.shares(rows, _BLOCK, _PROGRAMS)
    sizes = (rows, channels, *launch._geometry(x, y, padding), chunk)
    constants = {"K": padding.kernel, "STRIDE": padding.stride, "CIN": x.shape[1]}
    return sizes, programs, {**constants, "BM": _BLOCK, "BC": launch.filled(channels), "BK": _SEEN}
