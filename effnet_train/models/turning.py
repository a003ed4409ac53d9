"""TensorFlow's SAME padding without a copy: the image turned by 180 degrees once, and every kernel with it.

At a stride of 2 and an even size, SAME adds more pixels after the image than before it. torch's convolution cannot, and
`F.pad` copies the largest tensors of the network for it. In an image that stands on its head more is added before, and
`padding=kernel // 2` does just that: its last row and column after the image are never read.
"""

from torch import nn

from effnet_train.models.layers import Conv2d, MaxPool2d
from effnet_train.models.network import Network


def turn(model: nn.Module, on: bool = True) -> nn.Module:
    """Have `model` compute on turned images, where it can, or on upright ones again; return it.

    Weights, logits and `features` are what they were, to rounding.
    """
    if isinstance(model, Network):
        model.turned = on and _can_turn(model)
        for module in model.modules():
            if isinstance(module, Conv2d):
                module.turned = model.turned
    return model


def _can_turn(model: Network) -> bool:
    """Say whether every stride is SAME's, of 2 and of a kernel that covers it: then the windows are the same ones."""
    if any(getattr(module, "fused", False) is True for module in model.modules()):
        return False  # these kernels pad by an index
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride != (1, 1)]
    same = all(isinstance(c, Conv2d) and c.same and c.stride == (2, 2) and c.kernel_size[0] >= 3 for c in strided)
    return same and not any(isinstance(module, MaxPool2d) for module in model.modules())
