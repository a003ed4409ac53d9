"""Parts of a network that stay as they are while the rest trains."""

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_train.models.layers import ConvNorm
from effnet_train.models.network import Network

UpTo = int | Literal["last_norm", "classifier"]


@dataclass(frozen=True)
class Freeze:
    """What of a network stays as it is, to the bit: weights, and BatchNorm's statistics, by which it then normalises.

    `up_to` counts from the images: N, the stem and the first N stages (0: nothing); `classifier`, all before it;
    `last_norm`, all but the classifier and the BatchNorm before the average, which FixRes trains. With `batch_norm`,
    every BatchNorm stays. What is frozen drops nothing. Raises ValueError.
    """

    up_to: UpTo = 0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.up_to == "last_norm" and self.batch_norm:
            raise ValueError(
                "freeze.batch_norm=true freezes the BatchNorm that freeze.up_to=last_norm trains: use "
                "freeze.up_to=classifier, or freeze.batch_norm=false"
            )
        if isinstance(self.up_to, int) and self.up_to < 0:
            raise ValueError(f"freeze.up_to={self.up_to} must be a number of stages, last_norm or classifier")

    def __call__(self, model: Network) -> None:
        """Freeze the parts of `model`, which is in training mode, in place. Raises ValueError for too many stages."""
        for part in self._parts(model):
            part.requires_grad_(False).eval()
        if self.up_to == "last_norm":
            last_norm(model).requires_grad_(True).train()

    def _parts(self, model: Network) -> list[nn.Module]:
        stages = list(model.stages.children())
        if isinstance(self.up_to, int) and self.up_to > len(stages):
            raise ValueError(
                f"freeze.up_to={self.up_to} is more than the network's {len(stages)} stages: lower it, or give "
                "last_norm or classifier"
            )
        norms: list[nn.Module] = (
            [module for module in model.modules() if isinstance(module, _BatchNorm)] if self.batch_norm else []
        )
        if self.up_to == 0:
            return norms
        if isinstance(self.up_to, int):
            return [model.stem, *stages[: self.up_to], *norms]
        return [model.stem, model.stages, model.head, *norms]


def last_norm(model: Network) -> nn.Module:
    """Return the BatchNorm before the average: the head's, or where there is none, that of the last convolution."""
    if isinstance(model.head, ConvNorm):
        return model.head.norm
    *_, block = model.blocks()
    *_, last = (part for name, part in block.named_children() if isinstance(part, ConvNorm) and name != "shortcut")
    return last.norm
