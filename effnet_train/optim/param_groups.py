"""Which parameters weight decay touches, and by how much the learning rate of each is scaled."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into those that decay and BatchNorm's, which do not.

    The authors decay every trainable variable whose name lacks "batch_normalization": the biases of the classifier
    and of squeeze-excite decay too. With a `layer_decay` below 1 each part of the network (see `layer_scales`) has
    groups of its own, whose `lr_scale` the step multiplies the learning rate by.
    Source: tensorflow/tpu, efficientnet/main.py, `model_fn`.
    """
    if weight_decay < 0:
        raise ValueError(f"optim.weight_decay={weight_decay} is negative: use 0 for none")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must lie in (0, 1]: 1 is one learning rate for all")
    norm = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if layer_decay == 1:
        return _split(list(trainable.values()), norm, weight_decay)
    scales = layer_scales([name for name, _ in model.named_parameters()], layer_decay)
    groups: list[dict[str, Any]] = []
    for scale in dict.fromkeys(scales.values()):
        found = _split([p for name, p in trainable.items() if scales[name] == scale], norm, weight_decay)
        groups += [{**group, "lr_scale": scale} for group in found if group["params"]]
    return groups


def _split(parameters: list[nn.Parameter], norm: set[int], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if id(p) not in norm], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in norm], "weight_decay": 0.0},
    ]


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return the factor of each named parameter's learning rate: 1 in the last part, `decay` of the next one's before.

    The parts are the stem, each stage, the head and the classifier, in the order of `names`.
    Source: Howard & Ruder, "Universal Language Model Fine-tuning", arXiv 1801.06146, section 3.2 (its decay: 1 / 2.6).
    """
    names = list(names)
    parts = list(dict.fromkeys(_part(name) for name in names))
    return {name: decay ** (len(parts) - 1 - parts.index(_part(name))) for name in names}


def _part(name: str) -> str:
    first, *rest = name.split(".")
    return f"stages.{rest[0]}" if first == "stages" else first
