"""What a step minimises, a function of network and micro-batch: the labels' loss, unless a recipe adds to it."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """What `Stepper.learn` calls in autocast."""

    def __call__(
        self, network: nn.Module, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar to minimise and the logits (N, K) of the images, whose hits are counted."""
        ...


def supervised(network: nn.Module, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss by the targets alone."""
    logits = network(images, keys)
    return loss(logits, targets), logits
