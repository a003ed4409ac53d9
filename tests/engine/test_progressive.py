"""Stages as functions of the step, against the formula of EfficientNetV2."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnet_train.data.augment import Augment
from effnet_train.data.autoaugment import RandAugment
from effnet_train.data.mixing import Mixing
from effnet_train.engine.progressive import Progressive, Stage, Strength, stage_at

V2_S = Strength(resolution=300, dropout=0.3, magnitude=15, mixup_alpha=0.0)


def test_efficientnet_v2s_four_stages() -> None:
    """Algorithm 1 with the row of Table 6: 128 to 300 pixels, RandAugment 5 to 15, dropout 0.1 to 0.3."""
    begin = Progressive(stages=4, resolution=128, dropout=0.1, magnitude=5)
    stages = begin(V2_S, 350 * 1000)
    assert [stage.start for stage in stages] == [0, 87500, 175000, 262500]
    assert [stage.strength.resolution for stage in stages] == [int(size) for size in np.linspace(128, 300, 4)]
    np.testing.assert_allclose([stage.strength.magnitude for stage in stages], np.linspace(5, 15, 4))
    np.testing.assert_allclose([stage.strength.dropout for stage in stages], np.linspace(0.1, 0.3, 4))
    assert stages[-1].strength == V2_S


def test_linear_has_a_stage_for_every_multiple() -> None:
    stages = Progressive(stages="linear", resolution=128, mixup_alpha=0.2)(V2_S, 700)
    assert [stage.strength.resolution for stage in stages] == [128, 160, 192, 224, 256, 288, 300]
    assert [stage.start for stage in stages] == [0, 100, 200, 300, 400, 500, 600]
    np.testing.assert_allclose([s.strength.mixup_alpha for s in stages], np.linspace(0.2, 0, 7), atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 1000), st.integers(1, 300))
def test_every_step_has_one_stage_and_pixels_never_shrink(count: int, steps: int, first: int) -> None:
    begin = Progressive(stages=count, resolution=first if count > 1 else None)
    stages = begin(V2_S, steps)
    assert [step for stage in stages for step in range(stage.start, stage.stop)] == list(range(steps))
    sizes = [stage.strength.resolution for stage in stages]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 300
    for place, stage in enumerate(stages):
        assert {stage_at(stages, step) for step in (stage.start, stage.stop - 1)} == {place}


def test_a_stage_changes_copies_alone() -> None:
    augment, mixing = Augment(policy=RandAugment(magnitude=15)), Mixing(0.5)
    stage = Stage(start=0, stop=1, strength=Strength(resolution=8, dropout=0.0, magnitude=5, mixup_alpha=0.1))
    assert stage.augment(augment).policy.magnitude == 5  # type: ignore[union-attr]
    assert stage.mixing(mixing).mixup_alpha == 0.1
    assert (augment.policy.magnitude, mixing.mixup_alpha) == (15, 0.5)  # type: ignore[union-attr]
    images, keys = torch.rand(8, 3, 8, 8), torch.arange(8)
    mixed = stage.mixing(mixing)(images, torch.arange(8), keys, 8)[0]
    torch.testing.assert_close(mixed, Mixing(0.1)(images, torch.arange(8), keys, 8)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "progressive.stages=0 must be at least 1, or linear"),
        ({"resolution": 128}, "progressive.stages=1 begins as it ends, without progressive.resolution=128: give more"),
        ({"stages": 4}, "progressive.stages=4 and nothing to change: give progressive.resolution=128"),
        ({"stages": "linear", "dropout": 0.1}, "progressive.stages=linear follows progressive.resolution="),
        (
            {"stages": 4, "resolution": 128, "multiple": 16},
            "progressive.multiple=16 has no effect without progressive.sta",
        ),
        ({"stages": 4, "resolution": 320}, "progressive.resolution=320 is more than the 300 pixels that the run ends"),
        ({"stages": 4, "dropout": 1.0}, "progressive.dropout=1.0 is out of range"),
        ({"stages": 4, "magnitude": -1.0}, "progressive.magnitude=-1.0 is out of range"),
    ],
)
def test_what_is_no_progress_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Progressive(**options)(V2_S, 10)


def test_magnitude_needs_randaugment() -> None:
    plain = Strength(resolution=32, dropout=0.0, magnitude=None, mixup_alpha=0.0)
    with pytest.raises(ValueError, match=r"progressive\.magnitude=5 is RandAugment's: choose augment=randaugment"):
        Progressive(stages=2, magnitude=5)(plain, 10)
