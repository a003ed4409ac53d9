"""Layers as the authors' TensorFlow code has them, and dropping that depends on the sample alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_train.models import fused as kernels
from effnet_train.models.recompute import norm_swish

# Constants of splitmix64 (Steele, Lea & Flood 2014) as signed 64-bit integers.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
DROPOUT_SALT = 0x5851F42D4C957F2D  # any number but 0, which is drop connect's

ACTIVATIONS: dict[str, type[nn.Module]] = {"swish": nn.SiLU, "relu6": nn.ReLU6, "relu": nn.ReLU}
PADDINGS = ("same", "symmetric")


def uniform(keys: Tensor, count: int, *, salt: int = 0) -> Tensor:
    """Return `count` random numbers in [0, 1) for every key, as float32 of shape (count, N).

    A number depends on its key (int64), its row and the salt, and on nothing else: neither on the other keys
    of the batch, nor on the device, nor on how often it is asked for.
    """
    # Multiples by summing: Inductor takes those of `arange` for an index, and computes them in 32 bits.
    gammas = torch.full((count,), GOLDEN_GAMMA, device=keys.device).cumsum(0)
    bits = _mixed(_mixed(keys ^ salt) + gammas[:, None])
    return _shifted(bits, 40).float() * 2.0**-24


def _mixed(bits: Tensor) -> Tensor:
    """Apply splitmix64's finaliser to int64, which wraps as its unsigned original does."""
    bits = (bits ^ _shifted(bits, 30)) * MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 27)) * MULTIPLIERS[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift int64 to the right, zeros coming in: torch's own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def drop_connect(x: Tensor, u: Tensor, rate: float) -> Tensor:
    """Zero the samples whose `u` (N,) is below `rate` and divide the others by the survival probability."""
    keep = (u >= rate).view(-1, *[1] * (x.ndim - 1))
    return torch.where(keep, x / (1 - rate), 0)


def dropout(features: Tensor, keys: Tensor, rate: float) -> Tensor:
    """Zero elements of `features` (N, F) at `rate` and divide the others by the survival probability."""
    u = uniform(keys, features.shape[1], salt=DROPOUT_SALT).T
    return torch.where(u >= rate, features / (1 - rate), 0)


class Conv2d(nn.Conv2d):
    """Convolve with an odd square kernel, padded so that the output has ceil(size / stride) pixels a side.

    `padding="same"` is TensorFlow's: where the total is odd, the extra pixel goes to the right and the bottom.
    `padding="symmetric"` puts `kernel // 2` on every side. They differ at even sizes and a stride above 1 only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        padding: str = "same",
    ) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r}: choose one of {', '.join(PADDINGS)}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd")
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias
        )
        self.same = padding == "same" and stride > 1  # at stride 1 both paddings are one
        self.turned = False  # what it is given stands on its head: see models/turning.py

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        if self.turned:
            weight = self.weight.flip((2, 3)) if self.kernel_size[0] > 1 else self.weight
            return self._conv_forward(x, weight, self.bias)
        if not self.same:
            return super().forward(x)
        (top, bottom), (left, right) = self.padding_of(x)
        if top == bottom and left == right:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def padding_of(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the pixels added above and below `x`, and on its left and right."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if not self.same:
            return (kernel // 2, kernel // 2), (kernel // 2, kernel // 2)
        return _same_padding(x.shape[-2], kernel, stride), _same_padding(x.shape[-1], kernel, stride)


class MaxPool2d(nn.MaxPool2d):
    """Take the maximum of an odd square window, padded as `Conv2d` is; what is padded is never the maximum."""

    kernel_size: int
    stride: int

    def __init__(self, *, kernel: int, stride: int, padding: str = "same") -> None:
        super().__init__(kernel, stride, kernel // 2)
        self.same = padding == "same"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        if not self.same:
            return super().forward(x)
        top, bottom = _same_padding(x.shape[-2], self.kernel_size, self.stride)
        left, right = _same_padding(x.shape[-1], self.kernel_size, self.stride)
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=float("-inf")), self.kernel_size, self.stride)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return what TensorFlow's SAME adds before and after `size` pixels."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class BatchNorm2d(nn.BatchNorm2d):
    """Normalise by the batch as torch does, and keep the biased variance for evaluation as the authors do.

    Theirs is TensorFlow's unfused BatchNorm; the fused one would keep the unbiased variance, like torch.
    `num_batches_tracked` is there for the sake of other libraries' state dicts, and stays 0.
    `reduce_statistics`, where set, sums a tensor over the ranks that share their batch statistics; it must be
    differentiable.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-3, momentum: float = 0.01) -> None:
        if not eps > 0:
            raise ValueError(f"bn_eps={eps} must be above 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"bn_momentum={momentum} must lie between 0 and 1 (0.01 is TensorFlow's decay of 0.99)")
        super().__init__(channels, eps=eps, momentum=momentum)
        self.reduce_statistics: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training also move the running statistics."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.reduce_statistics is not None:
            return self._shared(x, self.reduce_statistics)
        # Torch moves the variance it is given by momentum * unbiased; given zeros, that product is what it leaves.
        moved = torch.zeros_like(self.running_var)
        y = F.batch_norm(x, self.running_mean, moved, self.weight, self.bias, True, self.momentum, self.eps)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_var.mul_(1 - self.momentum).add_(moved, alpha=(count - 1) / count)
        return y

    def _shared(self, x: Tensor, reduce_statistics: Callable[[Tensor], Tensor]) -> Tensor:
        variance, mean = torch.var_mean(x.to(self.weight.dtype), (0, 2, 3), correction=0)
        moments = torch.cat([mean, variance + mean.square(), mean.new_ones(1)]) * (x.numel() // x.shape[1])
        total = reduce_statistics(moments)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep every BatchNorm in `module` from moving its running statistics, also in training."""
    norms = [(norm, norm.momentum) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


@dataclass(frozen=True)
class Style:
    """Say what the convolutions of one network have in common; `fused` is whether `models.fused` trains them."""

    activation: str = "swish"
    padding: str = "same"
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    fused: kernels.Fused = False

    def __post_init__(self) -> None:
        kernels.check_choice(self.fused)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    def make_activation(self) -> nn.Module:
        """Return a new activation layer."""
        # In place, ReLU saves a tensor; swish, whose gradient needs the input, would only copy it first.
        kind = ACTIVATIONS[self.activation]
        return kind() if self.activation == "swish" else kind(inplace=True)


class ConvNorm(nn.Sequential):
    """Convolve without a bias, normalise, and (unless told not to) activate."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        style: Style,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel=kernel, stride=stride, groups=groups, padding=style.padding
        )
        self.norm = BatchNorm2d(out_channels, eps=style.bn_eps, momentum=style.bn_momentum)
        if activate:
            self.act = style.make_activation()
        self.fused = style.fused

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        if self.fusable and kernels.runs(self.fused, x):
            from effnet_train.models.fused.layers import conv_norm

            return conv_norm(self, x)
        if self._recomputes(x):
            return norm_swish(self.conv(x), self.norm)
        return super().forward(x)

    @property
    def fusable(self) -> bool:
        """Say whether the layer normalises by the batch, in one way: what `models.fused` has kernels for."""
        return self.norm.training and type(self.norm) is BatchNorm2d

    def _recomputes(self, x: Tensor) -> bool:
        """Say whether to keep less in training: on a CPU, where it also is faster; a compiler sees to it itself."""
        norm = self.norm
        swish = len(self) == 3 and type(getattr(self, "act", None)) is nn.SiLU and type(norm) is BatchNorm2d
        trained = swish and norm.training and norm.reduce_statistics is None and torch.is_grad_enabled()
        return trained and x.device.type == "cpu" and not torch.compiler.is_compiling()


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate in (0, 1) computed from all channels' means."""

    def __init__(self, channels: int, squeezed_channels: int, *, style: Style) -> None:
        super().__init__()
        self.reduce = Conv2d(channels, squeezed_channels, bias=True)
        self.act = style.make_activation()
        self.expand = Conv2d(squeezed_channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        gate = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()
