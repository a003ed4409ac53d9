"""How often something is done: every so many steps, or every so many epochs."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Every:
    """Say at which steps something is due; neither `steps` nor `epochs` means never.

    `epochs` may be a fraction and is read as the decimal that was written: 0.1 is exactly a tenth.

    Raises:
        ValueError: where both are given, or one is not positive.
    """

    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} are both set; choose one, the other is null")
        if self.steps is not None and (self.steps != int(self.steps) or self.steps < 1):
            raise ValueError(f"steps={self.steps} must be a whole number of at least 1, or null for never")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs} must be more than 0 and finite, or null for never")

    def due(self, step: int, batch_size: int, num_images: int) -> bool:
        """Tell whether the step just finished (the first is 1) is one of them.

        With `epochs` these are the first steps by which each multiple of `epochs * num_images` images was seen. Counted
        in whole numbers, so that nothing drifts over a long run. A run whose length is no multiple is not due at its
        last step.
        """
        if step < 1:
            return False
        if self.steps is not None:
            return step % self.steps == 0
        if self.epochs is None:
            return False
        images = num_images * Fraction(str(self.epochs))
        return step * batch_size // images > (step - 1) * batch_size // images
