"""The exponential moving average of weights and of BatchNorm's running statistics."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(step: int, decay: float) -> float:
    """Return the decay of the update that follows optimizer step `step` (the first is step 1).

    Source: `tf.train.ExponentialMovingAverage(decay, num_updates=global_step)`.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """A second model that follows the first: `module` is evaluated and exported.

    With `decay=0` the average equals the model after every step, so nothing needs to ask whether there is one.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1): 0 keeps no average")
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._averages, self._sources = _pairs(self.module, model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the model, after optimizer step `step` (counted from 1)."""
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - ema_decay(step, self.decay))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return every average with what it follows: parameters, then BatchNorm's statistics."""
        return list(zip(self._averages, self._sources, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, named as the model's own."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages of `state_dict`."""
        self.module.load_state_dict(state)


def _pairs(averaged: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the floating-point parameters and buffers of both, in the same order."""

    def tensors(module: nn.Module) -> list[Tensor]:
        everything = [*module.parameters(), *module.buffers()]
        return [t.detach() for t in everything if t.is_floating_point()]

    return tensors(averaged), tensors(model)
