"""BatchNorm and swish in training, for the CPU: one function that keeps its input alone and computes the rest again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Numbers that are normalised and activated at a time: what lies between the two stays in a core's cache.
_PIECE = 2**17


def norm_swish(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return the swish of `x` (N, C, H, W) normalised by its batch, and move the running statistics of `norm`.

    The same as `models.layers.BatchNorm2d` and SiLU, to rounding. Autograd would keep the input of both.
    """
    y, mean, variance = _NormSwish.apply(x, norm.weight, norm.bias, norm.eps)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
    return y


class _NormSwish(torch.autograd.Function):
    """(x, weight, bias, eps) to swish(norm(x)), and the batch's mean and biased variance, which carry no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # Given none to move, torch would take the statistics of halves in halves.
        unused = torch.zeros_like(weight)
        mean, variance = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
        y = torch.empty_like(x)
        for piece, out in zip(_pieces(x, y), _pieces(y, y), strict=True):
            torch.ops.aten.silu.out(F.batch_norm(piece, mean, variance, weight, bias, eps=eps), out=out)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        normalised = torch.empty_like(x)  # at first; then the gradient of it
        for piece, gradient, out in zip(*(_pieces(t, x) for t in (x, gradients[0], normalised)), strict=True):
            again = F.batch_norm(piece, mean, variance, weight, bias, eps=ctx.eps)
            torch.ops.aten.silu_backward.grad_input(gradient, again, grad_input=out)
        found = torch.ops.aten.native_batch_norm_backward(
            normalised, x, weight, None, None, mean, (variance + ctx.eps).rsqrt(), True, ctx.eps, [True, True, True]
        )
        return (*found, None)


def _pieces(tensor: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor by images, as many to a piece as `_PIECE` numbers of `whole` hold."""
    return tensor.split(max(1, _PIECE * len(whole) // max(1, whole.numel())))
