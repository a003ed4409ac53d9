"""BatchNorm and swish in training, for the CPU: one function that keeps its input alone and computes the rest again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def norm_swish(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return the swish of `x` (N, C, H, W) normalised by its batch, and move the running statistics of `norm`.

    The same as `models.layers.BatchNorm2d` and SiLU, to rounding. Autograd would keep the input of both.
    """
    if x.numel() == x.shape[1]:
        return F.silu(norm(x))  # which refuses a single value a channel
    y, mean, variance = _NormSwish.apply(x, norm.weight, norm.bias, norm.eps)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
    return y


class _NormSwish(torch.autograd.Function):
    """(x, weight, bias, eps) to swish(norm(x)), and the batch's mean and biased variance, which carry no gradient.

    What takes the time on a CPU is memory that is touched for the first time: each direction asks for no more of it
    than its results need.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normalised, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        variance = scale.square().reciprocal().sub(eps).clamp(min=0)  # of which torch gives (variance + eps) ** -0.5
        ctx.save_for_backward(x, weight, bias, mean, scale, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.silu(normalised, inplace=True), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, scale, variance = ctx.saved_tensors
        again = F.batch_norm(x, mean, variance, weight, bias, eps=ctx.eps)
        gradient = torch.ops.aten.silu_backward.grad_input(gradients[0], again, grad_input=again)
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        return (*found, None)
