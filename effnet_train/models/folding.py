"""Networks for evaluation: BatchNorm inside the convolutions, and on a CPU swish and sigmoid too."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from effnet_train.models.layers import Conv2d, ConvNorm, SqueezeExcite
from effnet_train.models.network import Network
from effnet_train.models.surgery import fold_batch_norm
from effnet_train.models.turning import turn

Fold = Literal["auto", True, False]
PLAIN, FOLDED, FUSED = "plain", "folded", "folded, oneDNN"
# By how much of the largest logit a folded float32 network may differ from the plain one on noise.
_TOLERANCE = 1e-3
# What oneDNN calls activations, and their parameters.
_ACTIVATIONS: dict[type, tuple[str, tuple[float, ...]]] = {
    nn.SiLU: ("swish", ()),
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("hardtanh", (0.0, 6.0)),
    nn.Identity: ("none", ()),
}
_SIGMOID = ("sigmoid", ())


def folded(model: nn.Module, fold: Fold, *, device: torch.device, precision: str) -> tuple[nn.Module, str]:
    """Return `model` or a copy of it that evaluates faster, and which: PLAIN, FOLDED or FUSED.

    `fold="auto"` folds in float32 on a CPU, where the copy computes the same to rounding, which is tried on an image.
    True folds in any case; the copy is for evaluation only.
    """
    cpu = device.type == "cpu" and precision == "fp32"
    if not fold or (fold == "auto" and not cpu):
        return model, PLAIN
    copy, path = fold_batch_norm(model), FOLDED
    if cpu and _fuses() and isinstance(copy, Network):
        copy, path = _fuse(copy), FUSED
    if fold == "auto" and not _alike(copy, model):
        return model, PLAIN
    return copy, path


@torch.inference_mode()
def _alike(copy: nn.Module, model: nn.Module) -> bool:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(images.to(memory_format=torch.channels_last))
    found = copy(images.to(memory_format=torch.channels_last))
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _fuses() -> bool:
    """Say whether this torch has the operators that its compiler puts in a convolution's and an activation's place."""
    found = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight"
    )
    return found and torch.backends.mkldnn.is_available()


class FusedConv(nn.Module):
    """A convolution and its activation in one call of oneDNN, with the weights in the layout that it likes best."""

    def __init__(self, conv: Conv2d, activation: tuple[str, tuple[float, ...]]) -> None:
        super().__init__()
        weight = conv.weight.flip((2, 3)) if conv.turned else conv.weight
        self.where: list[Any] = [conv.padding, conv.stride, conv.dilation, conv.groups]
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.detach().to_mkldnn(), *self.where)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.activation, self.limits = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, D, ceil(H / stride), ceil(W / stride))."""
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.where, self.activation, self.limits, ""
        )


class FusedSqueezeExcite(nn.Module):
    """Squeeze-excite of two fused convolutions; its input is lost."""

    def __init__(self, plain: SqueezeExcite) -> None:
        super().__init__()
        self.reduce = FusedConv(plain.reduce, _ACTIVATIONS[type(plain.act)])
        self.expand = FusedConv(plain.expand, _SIGMOID)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x.mul_(self.expand(self.reduce(x.mean((2, 3), keepdim=True))))


def _fuse(model: nn.Module) -> nn.Module:
    """Put fused modules in the place of a folded network's, turned where it can be; return it."""
    turn(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SqueezeExcite) and type(child.act) in _ACTIVATIONS:
                setattr(parent, name, FusedSqueezeExcite(child))
            elif isinstance(child, ConvNorm) and _fusible(child):
                setattr(parent, name, FusedConv(child.conv, _ACTIVATIONS[type(getattr(child, "act", nn.Identity()))]))
    return model


def _fusible(part: ConvNorm) -> bool:
    """Say whether oneDNN can do all of a folded part: SAME's padding only turned, and no other layers in it."""
    known = {"conv", "norm", "act"}.issuperset(name for name, _ in part.named_children())
    padded = not part.conv.same or part.conv.turned
    return known and padded and type(getattr(part, "act", nn.Identity())) in _ACTIVATIONS
