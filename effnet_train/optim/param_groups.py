"""Which parameters weight decay touches."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into those that decay and BatchNorm's, which do not.

    The authors decay every trainable variable whose name lacks "batch_normalization": the biases of the classifier
    and of squeeze-excite decay too.
    Source: tensorflow/tpu, efficientnet/main.py, `model_fn`.
    """
    if weight_decay < 0:
        raise ValueError(f"optim.weight_decay={weight_decay} is negative: use 0 for none")
    norm = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in norm], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in norm], "weight_decay": 0.0},
    ]
