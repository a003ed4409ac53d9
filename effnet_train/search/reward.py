"""What a search maximises: accuracy, weighed with what the network costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CostKind = Literal["flops", "params", "latency_ms"]


def reward(accuracy: float, cost: float, target: float, *, alpha: float = -0.07, beta: float = -0.07) -> float:
    """Return `accuracy * (cost / target) ** w`, where w is `alpha` within the target and `beta` beyond.

    With alpha = beta = -0.07 the target is soft: a network of twice the cost is as good with 5 % (not points) more
    accuracy. With alpha = 0, beta = -1 it is hard: within it only accuracy counts, beyond it the reward falls sharply.

    Source: Tan et al., arXiv 1807.11626, equations 2 and 3; EfficientNet's: -0.07, multiply-adds, 400 million.
    """
    assert cost > 0
    return accuracy * (cost / target) ** (alpha if cost <= target else beta)


@dataclass(frozen=True)
class Reward:
    """Weigh accuracy with one kind of cost, as `reward` does: `flops` are multiply-adds.

    Raises: ValueError naming the key.
    """

    cost: CostKind = "flops"
    target: float = 400e6
    alpha: float = -0.07
    beta: float = -0.07

    def __post_init__(self) -> None:
        if not self.target > 0:
            raise ValueError(f"reward.target={self.target:g} must be above 0")
        for name, value in {"alpha": self.alpha, "beta": self.beta}.items():
            if not value <= 0:
                raise ValueError(f"reward.{name}={value:g} must be at most 0: above, costly networks would be rewarded")

    def __call__(self, accuracy: float, costs: Mapping[str, float]) -> float:
        """Return the reward of a network of that accuracy (a fraction) and those costs, by kind."""
        return reward(accuracy, costs[self.cost], self.target, alpha=self.alpha, beta=self.beta)
