"""Differentiable pieces of a block that keep the convolutions' outputs alone, and compute the rest of them again.

Gradients of a BatchNorm: with b its output and n its normalised input, both of the sums of db and of db * n give the
gradients of bias and weight, and over all rows of the batch (of all ranks that share it) what its input's needs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnet_train.models.fused import expand, gate, launch, project
from effnet_train.models.fused.launch import NONE, Drop, Padding
from effnet_train.models.layers import BatchNorm2d

Reduce = Callable[[Tensor], Tensor]


def _statistics(x: Tensor, norm: BatchNorm2d, partial: Tensor | None = None) -> Tensor:
    """Return mean, variance and 1 / deviation (3, C) of x and of what other ranks share; move the running ones.

    Where there are other ranks, the mean of x alone comes after them, (4, C).
    Raises ValueError for a single value a channel, as the plain layer does.
    """
    if norm.reduce_statistics is None and launch._rows(x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    partial = launch.moments(x) if partial is None else partial
    if norm.reduce_statistics is None:
        return launch.finish_moments(partial, x, norm, norm.momentum)
    own_mean, variance, _ = launch.finish_moments(partial, x, norm, 0.0)
    moments = torch.cat([own_mean, variance + own_mean.square(), own_mean.new_ones(1)]) * launch._rows(x)
    total = norm.reduce_statistics(moments)
    mean, square = (total[:-1] / total[-1]).chunk(2)
    variance = (square - mean.square()).clamp(min=0)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
    return torch.stack([mean, variance, (variance + norm.eps).rsqrt(), own_mean])


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _over_all(sums: Tensor, x: Tensor, reduce: Reduce | None) -> tuple[Tensor, int]:
    """Return BatchNorm's sums over all rows that share its statistics, and the number of these; or means, and 1."""
    if reduce is None:
        return sums, launch._rows(x)
    total = reduce(torch.cat([sums.flatten(), sums.new_full((1,), launch._rows(x))]))
    return (total[:-1] / total[-1]).view_as(sums), 1


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _as_matrix(x: Tensor) -> Tensor:
    """View (N, C, H, W), channels-last, as (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _drop(u: Tensor | None, rate: float) -> Drop | None:
    return None if u is None else Drop(u, rate)


class NormAct(torch.autograd.Function):
    """Compute act(BatchNorm(x)), dropped, plus a residual; keep x.

    `partial` are moments of x, if they are known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        partial: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        u: Tensor | None,
        norm: BatchNorm2d,
        act: str,
        rate: float,
    ) -> Tensor:
        x = _channels_last(x)
        statistics = _statistics(x, norm, partial)
        ctx.save_for_backward(x, statistics, weight, bias, u)
        ctx.rest = norm.reduce_statistics, act, rate, None if residual is None else residual.dtype
        residual = None if residual is None else _channels_last(residual)
        return launch.normalise(x, (statistics, weight, bias), act, gate=None, drop=_drop(u, rate), residual=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias, u = ctx.saved_tensors
        reduce, act, rate, residual = ctx.rest
        affine, drop = (statistics, weight, bias), _drop(u, rate)
        dense = _channels_last(dy)
        sums = launch.norm_sums(x, affine, act, dense, drop)
        dx = launch.input_gradient(x, affine, act, dense, *_over_all(sums, x, reduce), drop=drop)
        d_residual = None if residual is None else dy.to(residual)
        return dx, None, sums[1].to(weight.dtype), sums[0].to(bias.dtype), d_residual, None, None, None, None


class NormActDepthwise(torch.autograd.Function):
    """Convolve act(BatchNorm(x)), or x itself without a norm, channel by channel; keep x.

    With the weights of an expansion, x is expanded first, and its expansion is kept, too. The second result holds
    moments of the first, for the BatchNorm that follows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        norm: BatchNorm2d | None,
        act: str,
        padding: Padding,
        expand_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = _channels_last(x)
        narrow, lowered, moments = None, None, None
        if expand_weight is not None:
            narrow, lowered = x, expand_weight.to(x.dtype)
            x, moments = expand.expanded(narrow, lowered)
        a, statistics, reduce = x, None, None
        if norm is not None:
            assert norm_weight is not None
            assert norm_bias is not None
            statistics, reduce = _statistics(x, norm, moments), norm.reduce_statistics
            affine = statistics, norm_weight, norm_bias
            a = launch.normalise(x, affine, act, gate=None, drop=None, residual=None)
        y, partial = launch.depthwise(a, weight, padding)
        ctx.save_for_backward(x, statistics, norm_weight, norm_bias, weight, narrow, lowered)
        ctx.rest = reduce, act, padding, None if expand_weight is None else expand_weight.dtype
        ctx.mark_non_differentiable(partial)
        ctx.set_materialize_grads(False)  # moments have none, and no zeros in its place
        return y, partial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, statistics, norm_weight, norm_bias, weight, narrow, lowered = ctx.saved_tensors
        reduce, act, padding, expand_type = ctx.rest
        dy = _channels_last(dy)
        affine = statistics, norm_weight, norm_bias
        dx, d_weight, sums = launch.depthwise_gradients(x, affine, act, dy, weight, padding)
        d_weight = d_weight.to(weight.dtype)
        if sums is None:
            return dx, None, None, d_weight, None, None, None, None
        # `dx` has come through the activation already.
        over_all = _over_all(sums, x, reduce)
        gradients = sums[1].to(norm_weight.dtype), sums[0].to(norm_bias.dtype), d_weight, None, None, None
        if narrow is None:
            return launch.input_gradient(x, affine, NONE, dx, *over_all), *gradients, None
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
        own = None if reduce is None else sums
        d_narrow, d_expand = expand.gradients(dx, narrow, lowered, x, affine, over_all, needed, own)
        return d_narrow, *gradients, None if d_expand is None else d_expand.to(x.dtype).to(expand_type)


class NormActProject(torch.autograd.Function):
    """Project act(BatchNorm(x)) by a matrix, gated by squeeze-excite where `gate` holds its weights; keep x.

    The second result holds moments of the first, where they came with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        partial: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        norm: BatchNorm2d,
        act: str,
        *gate_weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        x = _channels_last(x)
        affine = _statistics(x, norm, partial), norm_weight, norm_bias
        gated: gate.Gate | tuple[None, ...] = (None, None, None)
        # Types are as autocast would have them: it has chosen that of x.
        if gate_weights:
            gated = gate.forward(launch.pooled(x, affine, act), _pixels(x), gate_weights, x.dtype, act)
        y, moments = _project(x, affine, act, gated[0], _weights_as_matrix(weight, x))
        ctx.save_for_backward(x, affine[0], norm_weight, norm_bias, weight, *gated, *gate_weights)
        ctx.rest = norm.reduce_statistics, act
        if moments is not None:
            ctx.mark_non_differentiable(moments)
            ctx.set_materialize_grads(False)
        return y, moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, statistics, norm_weight, norm_bias, weight, *rest = ctx.saved_tensors
        gated, gate_weights = gate.Gate(*rest[:3]), rest[3:]
        reduce, act = ctx.rest
        affine = statistics, norm_weight, norm_bias
        dy, matrix = _channels_last(dy), _weights_as_matrix(weight, x)
        sums, d_matrix, dz = _project_sums(x, affine, act, gated.gate, dy, matrix)
        shift: Tensor | None = None
        d_gate_weights: tuple[Tensor, ...] = ()
        if gate_weights:
            shift, sums, d_gate_weights = gate.backward(sums, _pixels(x), gated, gate_weights, act)
        over_all = _over_all(sums, x, reduce)
        if dz is None:
            dx = project.input_gradient(x, affine, act, (gated.gate, shift), dy, matrix, over_all)
        else:
            dx = launch.input_gradient(x, affine, act, dz, *over_all, gate=gated.gate, shift=shift)
        d_weight = d_matrix.view_as(weight).to(x.dtype).to(weight.dtype)  # rounded as autocast would have it
        d_norm = sums[1].to(norm_weight.dtype), sums[0].to(norm_bias.dtype)
        return dx, None, *d_norm, d_weight, None, None, *d_gate_weights


def _weights_as_matrix(weight: Tensor, x: Tensor) -> Tensor:
    """Return a 1x1 convolution's weights as (D, C), in x's type."""
    return weight.to(x.dtype).flatten(1).contiguous()


def _as_image(flat: Tensor, x: Tensor) -> Tensor:
    """View (N * H * W, D) as (N, D, H, W), where x is (N, C, H, W)."""
    return flat.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def _project(
    x: Tensor, affine: Sequence[Tensor], act: str, gates: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the projection, and its moments if they come with it."""
    if project.fits(x, len(matrix)):
        return project.forward(x, affine, act, gates, matrix)
    z = launch.normalise(x, affine, act, gate=gates, drop=None, residual=None)
    return _as_image(_as_matrix(z) @ matrix.T, x), None


def _project_sums(
    x: Tensor, affine: Sequence[Tensor], act: str, gates: Tensor | None, dy: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sums of `launch.gated_sums` or `norm_sums`, the matrix's gradient, and that of what it multiplied.

    The last is None where it is made anew.
    """
    if project.fits(x, len(matrix)):
        return *project.sums(x, affine, act, gates, dy, matrix), None
    flat = _as_matrix(dy)
    dz = _as_image(flat @ matrix, x)
    if gates is None:
        z = launch.normalise(x, affine, act, gate=None, drop=None, residual=None)
        sums = launch.norm_sums(x, affine, act, dz, None)
    else:
        z, sums = launch.gated_sums(x, affine, act, gates, dz)
    return sums, flat.T @ _as_matrix(z), dz
