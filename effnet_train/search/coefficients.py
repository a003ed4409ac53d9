"""The scaling law's coefficients: their grid, the networks that they make of a base, phi for a budget."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from effnet_train.models.scaling import compound

# phi of the published variants, of which the authors say that they were rounded by hand.
# Source: the authors in tensorflow/tpu, issue 390.
PUBLISHED_PHI: Mapping[str, float] = {"b0": 0, "b1": 0.5, "b2": 1, "b3": 2, "b4": 3.5, "b5": 5, "b6": 6, "b7": 7}
DIMENSIONS = ("depth", "width", "resolution")
# Beyond these no network is meant, and merely to count one takes minutes: ten times what B7 has, and more.
LARGEST_PHI = 16.0
_LARGEST: Mapping[str, float] = {"depth": 32, "width": 32, "resolution": 8192}


class TooLargeError(ValueError):
    """A network is larger than any that is meant."""


@dataclass(frozen=True)
class Coefficients:
    """Hold by how much depth, width and resolution grow when phi grows by one."""

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    @property
    def product(self) -> float:
        """Return about how many times the multiply-adds grow with phi. Source: equation 3 of the paper."""
        return self.alpha * self.beta * self.beta * self.gamma * self.gamma  # ** raises where this is inf

    def __str__(self) -> str:
        return f"alpha {self.alpha:g}, beta {self.beta:g}, gamma {self.gamma:g}"

    @property
    def name(self) -> str:
        """Word them as the name of a folder."""
        return f"alpha{self.alpha:g}-beta{self.beta:g}-gamma{self.gamma:g}"


def grid(
    *,
    step: float = 0.05,
    tolerance: float = 0.1,
    alpha: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    gamma: Sequence[float] | None = None,
) -> list[Coefficients]:
    """Return the coefficients from 1 on, `step` apart, whose product lies within `tolerance` of 2.

    Values that are given replace the steps of their coefficient. Raises ValueError naming the argument.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step={step} must be above 0 and at most 1")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be from 0 to below 1: alpha * beta^2 * gamma^2 is 2 within it")
    given = {"alpha": alpha, "beta": beta, "gamma": gamma}
    for name, values in given.items():
        if values is not None and (not values or not all(1 <= value < math.inf for value in values)):
            raise ValueError(f"{name}={list(values)} must hold numbers of at least 1, as {name}=[1.0,1.1,1.2]")
    largest = 2 + tolerance
    ends = {"alpha": largest, "beta": math.sqrt(largest), "gamma": math.sqrt(largest)}
    axes = [values or _steps(step, ends[name]) for name, values in given.items()]
    candidates = itertools.starmap(Coefficients, itertools.product(*map(sorted, map(set, axes))))
    # A product of decimal steps misses the tolerance's edge by rounding alone.
    return [one for one in candidates if abs(one.product - 2) <= tolerance + 1e-9]


def _steps(step: float, end: float) -> list[float]:
    return [round(1 + i * step, 10) for i in range(math.floor((end - 1) / step + 1e-9) + 1)]


def scaled(base: Mapping[str, Any], coefficients: Coefficients, phi: float, *, multiple: int = 1) -> dict[str, Any]:
    """Return depth, width and resolution of a base network's scaled one, as its configuration is to hold them.

    Factors have four decimals, so that files, commands and folders agree on them; the resolution is the nearest
    multiple of `multiple` pixels. Raises ValueError, TooLargeError.
    """
    if multiple < 1:
        raise ValueError(f"multiple={multiple} must be at least 1 pixel")
    if abs(phi) > LARGEST_PHI:
        raise TooLargeError(f"phi={phi:g} must be from {-LARGEST_PHI:g} to {LARGEST_PHI:g} (B7's is 7)")
    law = asdict(coefficients)
    for (name, coefficient), (key, largest) in zip(law.items(), _LARGEST.items(), strict=True):
        # Of the logarithms: the power may be more than a float can hold.
        if phi * math.log(max(1, coefficient)) > math.log(largest / max(1e-9, base[key])):
            raise TooLargeError(
                f"phi={phi:g} with {name}={coefficient:g} takes {key} from {base[key]:g} to more than {largest:g}: "
                f"lower phi or {name}"
            )
    depth, width, resolution = compound(phi, **law)
    pixels = base["resolution"] * resolution / multiple
    return {
        "depth": max(1e-4, round(base["depth"] * depth, 4)),
        "width": max(1e-4, round(base["width"] * width, 4)),
        "resolution": multiple * max(1, math.floor(pixels + 0.5)),  # halves up: round() takes them to even numbers
    }


def largest_phi(cost: Callable[[float], float], budget: float, *, growth: float = 2, precision: float = 1e-3) -> float:
    """Return the largest phi, to `precision`, whose `cost` is within `budget`; below 0 if the base's is not.

    `cost` grows with phi, in steps, about `growth` times from one phi to the next; it is infinite where there is no
    network. Raises ValueError where no phi from -16 to 16 does.
    """
    if cost(0) > budget:
        low, high = -1.0, 0.0
        while cost(low) > budget:
            low, high = low * 2, low
            if low < -LARGEST_PHI:
                raise ValueError(f"even phi={-LARGEST_PHI:g} costs more than {budget:g}: raise the budget")
    else:
        # About twice the last one's cost at a time: what is far above the budget may take for ever to count.
        step = 1 / max(1, math.log2(min(growth, 1e300)))
        low, high = 0.0, step
        while cost(high) <= budget:
            low, high = high, high + step
            if low >= LARGEST_PHI:
                raise ValueError(f"even phi={low:g} costs less than {budget:g}: these coefficients do not reach it")
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if math.isinf(cost(high)):
        raise ValueError(
            f"even the largest network of this law, of phi={low:.3g}, costs {cost(low):.4g}: lower the budget, "
            "or give other coefficients"
        )
    return low
