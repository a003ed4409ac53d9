"""The layers of `models.layers` and the block of EfficientNet, in training, by the functions of `fused`."""

from torch import Tensor, nn

from effnet_train.models.fused import stem
from effnet_train.models.fused.functions import NormAct, NormActDepthwise, NormActProject
from effnet_train.models.fused.launch import NONE, Padding, autocast_type
from effnet_train.models.layers import ACTIVATIONS, Conv2d, ConvNorm, SqueezeExcite


def conv_norm(layer: ConvNorm, x: Tensor) -> Tensor:
    """Convolve as the layer does, then normalise and activate in one."""
    if not stem.fits(layer.conv, x):
        return norm_act(layer, layer.conv(x))
    y, moments = stem.StemConv.apply(x, layer.conv.weight, padding(layer.conv, x))
    return norm_act(layer, y, moments=moments)


def norm_act(
    layer: ConvNorm,
    x: Tensor,
    *,
    moments: Tensor | None = None,
    residual: Tensor | None = None,
    u: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Normalise and activate the layer's convolution's output, drop the samples that `u` asks for, add the residual."""
    norm = layer.norm
    return NormAct.apply(x, moments, norm.weight, norm.bias, residual, u, norm, activation(layer), rate)


def block(
    expand: nn.Module,
    depthwise: ConvNorm,
    squeeze_excite: nn.Module,
    project: ConvNorm,
    x: Tensor,
    *,
    skip: bool,
    u: Tensor | None,
    rate: float,
) -> Tensor:
    """Map (N, C, H, W) as `MBConv` does in training."""
    act = activation(depthwise)
    weight, place = depthwise.conv.weight, padding(depthwise.conv, x)
    if isinstance(expand, ConvNorm):
        norm = expand.norm
        rest = norm.weight, norm.bias, weight, norm, act, place, expand.conv.weight
        y, moments = NormActDepthwise.apply(x.to(autocast_type(x)), *rest)
    else:
        y, moments = NormActDepthwise.apply(x, None, None, weight, None, act, place)
    norm = depthwise.norm
    gate = (
        [*squeeze_excite.reduce.parameters(), *squeeze_excite.expand.parameters()]
        if isinstance(squeeze_excite, SqueezeExcite)
        else []
    )
    y, moments = NormActProject.apply(y, moments, norm.weight, norm.bias, project.conv.weight, norm, act, *gate)
    return norm_act(project, y, moments=moments, residual=x if skip else None, u=u if rate > 0 else None, rate=rate)


def padding(conv: Conv2d, x: Tensor) -> Padding:
    """Return what the convolution adds above and on the left of x."""
    (top, _), (left, _) = conv.padding_of(x)
    return Padding(conv.kernel_size[0], conv.stride[0], top, left)


def activation(layer: ConvNorm) -> str:
    """Return the name of what the layer activates by."""
    return next((name for name, kind in ACTIVATIONS.items() if type(getattr(layer, "act", None)) is kind), NONE)
