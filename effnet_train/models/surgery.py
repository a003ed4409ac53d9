"""Networks changed after they were built."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effnet_train.models.layers import ConvNorm


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for evaluation whose convolutions have taken in the BatchNorm that follows them.

    The folded weights are computed in float64 and rounded once.
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        if not isinstance(module, ConvNorm) or not isinstance(module.norm, nn.BatchNorm2d):
            continue
        conv, norm = module.conv, module.norm
        assert conv.bias is None
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        module.norm = nn.Identity()  # type: ignore[assignment]
    return folded


def with_classifier_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors`, a state dict, with `model`'s own classifier, for the classes that it is to tell apart."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("classifier.")}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")} | own
