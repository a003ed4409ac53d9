"""AdvProp: each image also as one that the network has been made to mistake, under BatchNorms of their own."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.data.preprocess import Preprocess
from effnet_train.engine.objectives import Loss
from effnet_train.models.auxiliary import through_auxiliary
from effnet_train.models.layers import frozen_statistics, uniform

_SALT = 0x616476  # neither drop connect's nor dropout's


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How images are attacked, if `epsilon` is above 0: the PGD attacker in the maximum norm. Raises ValueError.

    `epsilon` is the most that a pixel may change and `step_size` what one of the `steps` changes it by, both in levels
    of 255. Without `steps` there are as many as in the paper: one, or where that falls short of `epsilon`, one more
    than lead there.
    """

    key: ClassVar[str] = "attack"
    epsilon: float = 0.0
    steps: int | None = None
    step_size: float = 1.0

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"{self.key}.epsilon={self.epsilon} must be 0, for no attack, or positive: levels of 255")
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"{self.key}.steps={self.steps} must be at least 1; for no attack set {self.key}.epsilon=0"
            )
        if not self.step_size > 0:
            raise ValueError(f"{self.key}.step_size={self.step_size} must be more than 0: levels of 255")
        others = [one for one in fields(self) if one.name != "epsilon"]
        idle = [one for one in others if getattr(self, one.name) not in (None, one.default)]
        if not self.epsilon and idle:
            raise ValueError(
                f"{self.key}.{idle[0].name}={getattr(self, idle[0].name)} has no effect without {self.key}.epsilon=, "
                "say 1"
            )

    @property
    def count(self) -> int:
        """Return how many steps there are."""
        if self.steps is not None:
            return self.steps
        return 1 if self.epsilon <= self.step_size else math.ceil(self.epsilon / self.step_size) + 1

    def record(self) -> dict[str, float]:
        """Return what scores say of the attack they are under; of none, nothing."""
        return {"epsilon": self.epsilon, "steps": self.count, "step_size": self.step_size} if self.epsilon else {}


@dataclass(frozen=True, kw_only=True)
class AdvProp(Attack):
    """How training images are attacked; with `random_start` from a random place within `epsilon` of them."""

    key: ClassVar[str] = "advprop"
    steps: int | None = 1
    random_start: bool = True


def pgd(
    images: Tensor,
    gradient: Callable[[Tensor], Tensor],
    *,
    start: Tensor,
    epsilon: Tensor,
    step_size: Tensor,
    steps: int,
    bounds: tuple[Tensor, Tensor],
) -> Tensor:
    """Return images that `gradient`, of the loss by its argument, has led to where the loss is higher.

    They begin at `images + start`; each of the `steps` adds `step_size` in the gradient's sign, and takes back what is
    more than `epsilon` from `images` or out of `bounds`. What is no scalar meets the images' channels.
    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1.
    """
    low, high = torch.maximum(images - epsilon, bounds[0]), torch.minimum(images + epsilon, bounds[1])
    attacked = (images + start).clamp(low, high)
    for _ in range(steps):
        attacked = (attacked + step_size * gradient(attacked).sign()).clamp(low, high)
    return attacked


class Adversarial:
    """The objective of AdvProp: the loss of a batch, and that of the same images attacked, under auxiliary BatchNorms.

    `model` is the network that the step calls, without what wraps it for several ranks. The attack moves no statistics
    and no gradient of a weight.
    Source: Xie et al., "Adversarial Examples Improve Image Recognition", 2020, algorithm 1.
    """

    def __init__(self, model: nn.Module, attack: AdvProp, preprocess: Preprocess) -> None:
        self.model, self.attack = model, attack
        self.level, self.bounds = _inputs(preprocess, next(model.parameters()).device)

    def __call__(
        self, network: nn.Module, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the two losses, and the logits of the images as they are."""
        attacked = self.attacked(loss, images, targets, keys)
        first, second = network(torch.cat([images, attacked]), torch.cat([keys, keys])).chunk(2)
        return loss(first, targets) + loss(second, targets), first

    def attacked(self, loss: Loss, images: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        """Return the images (N, 3, H, W) attacked; what is dropped, and where they start, are the keys'."""

        def gradient(inputs: Tensor) -> Tensor:
            # Summed: in half precision a mean's gradients could be too small to have a sign.
            return _gradient(lambda x: loss(self.model(x, keys), targets) * len(x), inputs)

        epsilon = self.attack.epsilon * self.level
        start = torch.zeros_like(images)
        if self.attack.random_start:
            drawn = uniform(keys, images[0].numel(), salt=_SALT).T.reshape(images.shape)
            start = (2 * drawn - 1) * epsilon
        with through_auxiliary(self.model), frozen_statistics(self.model):
            return pgd(
                images,
                gradient,
                start=start,
                epsilon=epsilon,
                step_size=self.attack.step_size * self.level,
                steps=self.attack.count,
                bounds=self.bounds,
            ).detach()


class Attacker:
    """Leads images away from their labels, for a network in evaluation mode, without a random start.

    By the label and not by the class that the network takes an image for: away from a wrong one, it might become right.
    """

    def __init__(self, attack: Attack, preprocess: Preprocess, device: torch.device) -> None:
        self.attack = attack
        self.level, self.bounds = _inputs(preprocess, device)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images (N, 3, H, W) as an attacker who knows `model` and `labels` (N,) makes them."""
        with torch.inference_mode(False):
            images, labels = images.clone(), labels.clone()  # such as gradients may be taken by

            def gradient(inputs: Tensor) -> Tensor:
                return _gradient(lambda x: F.cross_entropy(model(x).float(), labels, reduction="sum"), inputs)

            return pgd(
                images,
                gradient,
                start=torch.zeros_like(images),
                epsilon=self.attack.epsilon * self.level,
                step_size=self.attack.step_size * self.level,
                steps=self.attack.count,
                bounds=self.bounds,
            )


def _inputs(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return, of each channel (3, 1, 1), what a level of 255 is in an input, and the inputs of black and white."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return 1 / 255 / std, ((0 - mean) / std, (1 - mean) / std)


def _gradient(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return the gradient of a loss, computed in autocast perhaps, by the inputs; no other is computed."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        total = loss(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.autograd.grad(total, inputs)[0]
