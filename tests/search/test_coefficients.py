import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet_train.search.coefficients import PUBLISHED_PHI, Coefficients, grid, largest_phi, scaled

B0 = {"depth": 1.0, "width": 1.0, "resolution": 224}
# Source: Table 1 and section 3.3 of the paper, `efficientnet_params` of the authors' code.
PUBLISHED = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.1, 1.0, 240),
    "b2": (1.2, 1.1, 260),
    "b3": (1.4, 1.2, 300),
    "b4": (1.8, 1.4, 380),
    "b5": (2.2, 1.6, 456),
    "b6": (2.6, 1.8, 528),
    "b7": (3.1, 2.0, 600),
}


@given(step=st.floats(0.05, 0.5), tolerance=st.floats(0, 0.5))
def test_the_grid_keeps_to_the_law(step: float, tolerance: float) -> None:
    found = grid(step=step, tolerance=tolerance)
    for one in found:
        assert abs(one.alpha * one.beta**2 * one.gamma**2 - 2) <= tolerance + 1e-6
        assert min(one.alpha, one.beta, one.gamma) >= 1
    assert len(set(found)) == len(found)


def test_the_grid_leaves_none_out() -> None:
    axis = [1 + i / 20 for i in range(25)]
    brute = {
        (round(a, 6), round(b, 6), round(c, 6))
        for a in axis
        for b in axis
        for c in axis
        if abs(a * b * b * c * c - 2) < 0.1 + 1e-9
    }
    found = {(one.alpha, one.beta, one.gamma) for one in grid(step=0.05, tolerance=0.1)}
    assert brute == found


def test_the_grid_holds_the_papers_answer_and_each_dimension_alone() -> None:
    found = grid(step=0.05, tolerance=0.1)
    assert Coefficients(1.2, 1.1, 1.15) in found
    assert {Coefficients(2, 1, 1), Coefficients(1, 1.4, 1), Coefficients(1, 1, 1.4)} <= set(found)


def test_values_given_replace_the_steps() -> None:
    assert grid(alpha=[1.2], beta=[1.1], gamma=[1.15, 3]) == [Coefficients(1.2, 1.1, 1.15)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "step=0 must be above 0"),
        ({"tolerance": -1}, "tolerance=-1 must be from 0"),
        ({"alpha": []}, r"alpha=\[\] must hold numbers of at least 1"),
        ({"gamma": [0.9]}, r"gamma=\[0.9\] must hold numbers of at least 1"),
    ],
)
def test_a_wrong_grid_is_told(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_law_gives_the_published_variants_as_far_as_they_follow_it(name: str) -> None:
    # docs/reproduce.md holds the same as a table.
    found = scaled(B0, Coefficients(), PUBLISHED_PHI[name], multiple=4)
    depth, width, resolution = PUBLISHED[name]
    rounded = (round(found["depth"], 1), round(found["width"], 1))
    deeper_than_published = {"b4": 1.9, "b5": 2.5, "b6": 3.0, "b7": 3.6}
    assert rounded == (deeper_than_published.get(name, depth), 1.9 if name == "b7" else width)
    law = {"b2": 256, "b3": 296, "b4": 364, "b5": 452, "b6": 520, "b7": 596}
    assert found["resolution"] == law.get(name, resolution)
    assert 0.95 < found["resolution"] / resolution <= 1


def test_a_resolution_is_rounded_to_the_nearest_multiple() -> None:
    alone = Coefficients(1, 1, 1.25)
    assert scaled({**B0, "resolution": 10}, alone, 1)["resolution"] == 13  # of 12.5
    assert scaled({**B0, "resolution": 100}, alone, 1, multiple=32)["resolution"] == 128
    assert scaled({**B0, "resolution": 2}, alone, -9, multiple=4)["resolution"] == 4
    with pytest.raises(ValueError, match="multiple=0 must be at least 1 pixel"):
        scaled(B0, alone, 1, multiple=0)


@given(budget=st.floats(1e-3, 1e4))
def test_the_largest_phi_within_a_budget(budget: float) -> None:
    def cost(phi: float) -> float:
        return 2 ** (math.floor(phi * 8) / 8)  # in steps, as rounding has it

    phi = largest_phi(cost, budget, precision=1e-4)
    assert cost(phi) <= budget < cost(phi + 1e-4)


@given(base=st.floats(1, 100), budget=st.floats(1, 1e4), growth=st.floats(2, 1e300))
def test_no_network_is_counted_that_costs_more_than_twice_budget_or_base(
    base: float, budget: float, growth: float
) -> None:
    counted = []

    def cost(phi: float) -> float:
        counted.append(base * 2 ** (phi * math.log2(growth)))
        return counted[-1]

    largest_phi(cost, budget, growth=growth)
    assert max(counted) <= 2.001 * max(base, budget)


def test_a_budget_out_of_reach_is_told() -> None:
    with pytest.raises(ValueError, match="phi=16 costs less than 10: these coefficients do not reach it"):
        largest_phi(lambda _: 1.0, 10)
    with pytest.raises(ValueError, match=r"phi=-16 costs more than 0\.5: raise the budget"):
        largest_phi(lambda _: 1.0, 0.5)
    with pytest.raises(ValueError, match=r"even the largest network of this law, of phi=2.5, costs 2\.5: lower"):
        largest_phi(lambda phi: math.inf if phi > 2.5 else phi, 10)
