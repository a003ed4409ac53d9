"""Progressive learning: fewer pixels and less regularisation first, as functions of the step."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from effnet_train.data.augment import Augment
from effnet_train.data.datasets import Data
from effnet_train.data.loader import Batch
from effnet_train.data.mixing import Mixing
from effnet_train.engine.state import TrainState
from effnet_train.engine.train import Stepper


@dataclass(frozen=True, kw_only=True)
class Strength:
    """What changes from stage to stage; `magnitude` is RandAugment's, None where there is none."""

    resolution: int
    dropout: float
    magnitude: float | None
    mixup_alpha: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The steps from `start` to before `stop`, and what they train with."""

    start: int
    stop: int
    strength: Strength

    def data(self, data: Data) -> Data:
        """Return the data set at the stage's resolution."""
        return replace(data, preprocess=data.preprocess.at(self.strength.resolution))

    def augment(self, augment: Augment) -> Augment:
        """Return the augmentation at the stage's magnitude."""
        if self.strength.magnitude is None:
            return augment
        changed = copy.copy(augment)
        changed.policy = copy.copy(augment.policy)
        changed.policy.magnitude = self.strength.magnitude  # type: ignore[union-attr]
        return changed

    def mixing(self, mixing: Mixing) -> Mixing:
        """Return the mixing with the stage's mixup."""
        changed = copy.copy(mixing)
        changed.mixup_alpha = self.strength.mixup_alpha
        return changed


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Begin with these values and end with those of the rest of the configuration, in equally long stages.

    Stage i of M has S_0 + (S_e - S_0) * i / (M - 1) pixels, rounded down, and of each regularisation as much; None does
    not change. `stages="linear"` makes a stage for every `multiple` pixels. With one stage nothing changes.

    Source: Tan & Le, "EfficientNetV2", arXiv 2104.00298, algorithm 1. The authors' code has (i + 1) / M instead, and
    leaves dropout as it is.
    Raises ValueError.
    """

    stages: int | Literal["linear"] = 1
    resolution: int | None = None
    dropout: float | None = None
    magnitude: float | None = None
    mixup_alpha: float | None = None
    multiple: int = 32

    def __post_init__(self) -> None:
        first = {name: getattr(self, name) for name in ("resolution", "dropout", "magnitude", "mixup_alpha")}
        given = [f"progressive.{name}={value}" for name, value in first.items() if value is not None]
        if isinstance(self.stages, int) and self.stages < 1:
            raise ValueError(f"progressive.stages={self.stages} must be at least 1, or linear")
        if self.stages == 1 and given:
            raise ValueError(f"progressive.stages=1 begins as it ends, without {given[0]}: give more, 4 say, or linear")
        if self.stages != 1 and not given:
            raise ValueError(
                f"progressive.stages={self.stages} and nothing to change: give progressive.resolution=128, or another "
                "of its values to begin with, or progressive.stages=1"
            )
        if self.stages == "linear" and self.resolution is None:
            raise ValueError("progressive.stages=linear follows progressive.resolution=, which is null: give it")
        if self.stages != "linear" and self.multiple != Progressive.multiple:
            raise ValueError(f"progressive.multiple={self.multiple} has no effect without progressive.stages=linear")
        limits = {"resolution": (1, math.inf), "multiple": (1, math.inf), "dropout": (0, math.nextafter(1, 0))}
        for name in ("resolution", "dropout", "magnitude", "mixup_alpha", "multiple"):
            value, (least, most) = getattr(self, name), limits.get(name, (0, math.inf))
            if value is not None and not least <= value <= most:
                raise ValueError(f"progressive.{name}={value} is out of range: it is at least {least}")

    def __call__(self, final: Strength, total_steps: int) -> list[Stage]:
        """Return the stages of a run of `total_steps` that ends with `final`; without those that get no step.

        Raises ValueError where it would begin with more pixels than it ends with, or with what it does not have.
        """
        if self.resolution is not None and self.resolution > final.resolution:
            raise ValueError(
                f"progressive.resolution={self.resolution} is more than the {final.resolution} pixels that the run "
                "ends with: lower it, or raise model.resolution="
            )
        if self.magnitude is not None and final.magnitude is None:
            raise ValueError(
                f"progressive.magnitude={self.magnitude} is RandAugment's: choose augment=randaugment, or "
                "progressive.magnitude=null"
            )
        count = self._count(final)
        bounds = [total_steps * i // count for i in range(count + 1)]
        stages = [
            Stage(start=start, stop=stop, strength=self.strength(final, i, count))
            for i, (start, stop) in enumerate(pairwise(bounds))
        ]
        return [stage for stage in stages if stage.start < stage.stop]

    def strength(self, final: Strength, i: int, count: int) -> Strength:
        """Return what stage `i` of `count` trains with."""

        def between(first: float | None, last: float) -> float:
            return last if first is None or i == count - 1 else first + (last - first) * i / (count - 1)

        pixels = int(between(self.resolution, final.resolution))
        if self.stages == "linear" and self.resolution is not None:
            pixels = min(self.resolution + i * self.multiple, final.resolution)
        return Strength(
            resolution=pixels,
            dropout=between(self.dropout, final.dropout),
            magnitude=None if final.magnitude is None else between(self.magnitude, final.magnitude),
            mixup_alpha=between(self.mixup_alpha, final.mixup_alpha),
        )

    def _count(self, final: Strength) -> int:
        if self.stages == "linear":
            assert self.resolution is not None
            return math.ceil((final.resolution - self.resolution) / self.multiple) + 1
        return self.stages


def staged(stepper: Stepper, stages: Sequence[Stage], accumulate: Sequence[int]) -> "StagedStepper":
    """Return `stepper`, of a run's end, as it is in each stage, with so many micro-batches there."""
    steppers = [
        replace(
            stepper,
            accumulate=count,
            mixing=stage.mixing(stepper.mixing),
            preprocess=stepper.preprocess.at(stage.strength.resolution),
        )
        for stage, count in zip(stages, accumulate, strict=True)
    ]
    return StagedStepper(stages, steppers)


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """Return the place of the stage of a step, counted from 0; past the end it is the last."""
    return max(place for place, stage in enumerate(stages) if stage.start <= step or place == 0)


@dataclass(frozen=True)
class StagedStepper:
    """The step of a run in stages: each stage has its own, with its micro-batches and its mixing."""

    stages: Sequence[Stage]
    steppers: Sequence[Stepper]

    def __call__(self, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        """Train `state` on a batch of the stage of its step, as `Stepper` does."""
        return self._now(state)(state, batch, lr)

    def settle(self, state: TrainState, batch_size: int) -> None:
        """Do what a stepper does before the first step of a process."""
        self._now(state).settle(state, batch_size)

    def _now(self, state: TrainState) -> Stepper:
        place = stage_at(self.stages, state.step)
        state.model.dropout = self.stages[place].strength.dropout  # type: ignore[assignment]
        return self.steppers[place]
