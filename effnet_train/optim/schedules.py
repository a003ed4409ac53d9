"""Learning rates as pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Anything that gives the learning rate of a step."""

    def lr(self, step: int, *, batch_size: int, steps_per_epoch: float, epochs: float) -> float:
        """Return the learning rate of `step` (from 0); `steps_per_epoch` is num_images / batch_size, a fraction."""
        ...


def warmup(step: int, warmup_steps: int, base: float, decayed: float) -> float:
    """Return `base * step / warmup_steps` in the first `warmup_steps` steps and `decayed` from then on.

    Source: tensorflow/tpu, efficientnet/utils.py, `build_learning_rate`.
    """
    return base * step / warmup_steps if step < warmup_steps else decayed


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """The authors' schedule: a linear warm-up, then a staircase that falls by `decay` every `decay_epochs`.

    The staircase is counted from step 0, underneath the warm-up: with the defaults the rate that follows five
    epochs of warm-up is `base * 0.97 ** 2`.
    """

    lr_per_256: float = 0.016
    decay: float = 0.97
    decay_epochs: float = 2.4
    warmup_epochs: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or self.decay_epochs <= 0:
            raise ValueError(
                f"schedule.decay={self.decay}, schedule.decay_epochs={self.decay_epochs}: "
                "decay lies in (0, 1], decay_epochs is positive"
            )
        _check(self.lr_per_256, self.warmup_epochs)

    def lr(self, step: int, *, batch_size: int, steps_per_epoch: float, epochs: float) -> float:
        """Return the learning rate of `step`."""
        base = self.lr_per_256 * batch_size / 256
        stairs = math.floor(step / (steps_per_epoch * self.decay_epochs))
        return warmup(step, int(steps_per_epoch * self.warmup_epochs), base, base * self.decay**stairs)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A linear warm-up, then the base rate, multiplied by `decay` once for each of the epochs `at` that have passed."""

    lr_per_256: float = 0.1
    decay: float = 0.1
    at: Sequence[float] = (30, 60, 80)
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"schedule.decay={self.decay} must lie in (0, 1]")
        wrong = [epoch for epoch in self.at if isinstance(epoch, bool) or not isinstance(epoch, int | float)]
        if wrong or list(self.at) != sorted(self.at) or any(epoch <= 0 for epoch in self.at):
            raise ValueError(f"schedule.at={list(self.at)} must be epochs above 0 in rising order, as [30,60,80]")
        _check(self.lr_per_256, self.warmup_epochs)

    def lr(self, step: int, *, batch_size: int, steps_per_epoch: float, epochs: float) -> float:
        """Return the learning rate of `step`."""
        base = self.lr_per_256 * batch_size / 256
        passed = sum(step >= epoch * steps_per_epoch for epoch in self.at)
        return warmup(step, int(steps_per_epoch * self.warmup_epochs), base, base * self.decay**passed)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """A linear warm-up, then half a cosine from the base rate at step 0 to `final` of it at the end of training."""

    lr_per_256: float = 0.016
    final: float = 0.0
    warmup_epochs: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise ValueError(f"schedule.final={self.final} must lie in [0, 1]: it is a fraction of the base rate")
        _check(self.lr_per_256, self.warmup_epochs)

    def lr(self, step: int, *, batch_size: int, steps_per_epoch: float, epochs: float) -> float:
        """Return the learning rate of `step`."""
        base = self.lr_per_256 * batch_size / 256
        progress = min(1.0, step / (steps_per_epoch * epochs))
        share = self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return warmup(step, int(steps_per_epoch * self.warmup_epochs), base, base * share)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A linear warm-up, then the base rate to the end."""

    lr_per_256: float = 0.016
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr_per_256, self.warmup_epochs)

    def lr(self, step: int, *, batch_size: int, steps_per_epoch: float, epochs: float) -> float:
        """Return the learning rate of `step`."""
        base = self.lr_per_256 * batch_size / 256
        return warmup(step, int(steps_per_epoch * self.warmup_epochs), base, base)


def _check(lr_per_256: float, warmup_epochs: float) -> None:
    if lr_per_256 < 0:
        raise ValueError(f"schedule.lr_per_256={lr_per_256} is negative: a learning rate is zero or more")
    if warmup_epochs < 0:
        raise ValueError(f"schedule.warmup_epochs={warmup_epochs} is negative: use 0 for no warm-up")
