import math

import pytest

from effnet_train.search.reward import Reward, reward


def test_a_soft_target_is_the_papers() -> None:
    """MnasNet, section 3: twice the latency is worth 5 % more accuracy (0.5 against 0.525)."""
    assert reward(0.5, 80, 80) == 0.5
    assert reward(0.525, 160, 80) == pytest.approx(reward(0.5, 80, 80), rel=2e-3)
    assert reward(0.76, 200e6, 400e6) == pytest.approx(0.76 * math.exp(0.07 * math.log(2)))


def test_a_hard_target_counts_accuracy_alone_within_it_and_falls_beyond() -> None:
    hard = {"alpha": 0.0, "beta": -1.0}
    assert reward(0.5, 10, 80, **hard) == reward(0.5, 80, 80, **hard) == 0.5
    assert reward(0.5, 160, 80, **hard) == 0.25


@pytest.mark.parametrize("kind", ["flops", "params", "latency_ms"])
def test_the_kind_of_cost_is_the_one_asked_for(kind: str) -> None:
    costs = {"flops": 1e6, "params": 1e3, "latency_ms": 2.0}
    own = Reward(cost=kind, target=costs[kind])  # type: ignore[arg-type]
    assert own(0.3, costs) == 0.3
    assert own(0.3, {**costs, kind: 2 * costs[kind]}) == pytest.approx(0.3 * 2**-0.07)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": 0}, "reward.target=0 must be above 0"),
        ({"alpha": 0.07}, "reward.alpha=0.07 must be at most 0"),
        ({"beta": math.nan}, "reward.beta=nan must be at most 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reward(**values)  # type: ignore[arg-type]
