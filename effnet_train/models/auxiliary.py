"""A second set of BatchNorms for training images of another kind, which evaluation and export know nothing of."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effnet_train.models.layers import BatchNorm2d

_NAME = "auxiliary"


class TwoBatchNorm2d(BatchNorm2d):
    """Normalise, in training, the first half of a batch by `norm`'s parameters and statistics, the second by others.

    The others are `auxiliary`'s, at first the same. In evaluation there is `norm` alone, whose tensors these stay.
    """

    def __init__(self, norm: BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.auxiliary = copy.deepcopy(norm)
        self.alone = False  # all of a batch is for `auxiliary`: see `through_auxiliary`
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training N is even."""
        if not self.training:
            return super().forward(x)
        if self.alone:
            return self.auxiliary(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.auxiliary(second)])


def add_auxiliary(model: nn.Module) -> None:
    """Give every BatchNorm of `model` an auxiliary one, in place. Raises ValueError where there is none."""
    norms = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BatchNorm2d)
    ]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm, and AdvProp keeps adversarial images' statistics apart in such: "
            "choose a model with BatchNorm, or advprop.epsilon=0"
        )
    for parent, name, norm in norms:
        setattr(parent, name, TwoBatchNorm2d(norm))


@contextmanager
def through_auxiliary(model: nn.Module) -> Iterator[None]:
    """Have all of a batch normalised by the auxiliary BatchNorms."""
    norms = [module for module in model.modules() if isinstance(module, TwoBatchNorm2d)]
    try:
        for norm in norms:
            norm.alone = True
        yield
    finally:
        for norm in norms:
            norm.alone = False


def main_tensors(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict without the auxiliary BatchNorms': the one itself, where there are none."""
    own = {name: tensor for name, tensor in state.items() if not _is_auxiliary(name)}
    return state if len(own) == len(state) else own


def auxiliary_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the auxiliary BatchNorms' tensors of a state dict."""
    return {name: tensor for name, tensor in state.items() if _is_auxiliary(name)}


def _is_auxiliary(name: str) -> bool:
    return _NAME in name.split(".")
