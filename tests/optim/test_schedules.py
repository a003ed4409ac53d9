import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate

from effnet_train.optim.schedules import Constant, Cosine, Exponential, Steps

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((REPOSITORY / "tests/golden/optim.json").read_text())["learning_rates"]
# 4,096 images a batch, 100 steps an epoch, 350 epochs: the base rate is 0.256, the warm-up 500 steps.
ROUND = {"batch_size": 4096, "steps_per_epoch": 100.0, "epochs": 350.0}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['batch_size']} of {case['num_images']}")
def test_rates_are_the_authors(case):
    schedule = instantiate(yaml.safe_load((REPOSITORY / "configs/schedule/exponential.yaml").read_text()))
    batch_size = case["batch_size"]
    found = [
        schedule.lr(step, batch_size=batch_size, steps_per_epoch=case["num_images"] / batch_size, epochs=350)
        for step in case["steps"]
    ]
    assert found == pytest.approx(case["rates"], rel=1e-5)


@pytest.mark.parametrize(("batch_size", "base"), [(4096, 0.256), (2048, 0.128), (256, 0.016), (96, 0.006)])
def test_after_warmup_two_stairs_have_gone_down(batch_size, base):
    steps_per_epoch = 1281167 / batch_size
    rate = Exponential().lr(
        int(5 * steps_per_epoch), batch_size=batch_size, steps_per_epoch=steps_per_epoch, epochs=350
    )
    assert rate == pytest.approx(base * 0.97**2, rel=1e-12)


def test_stairs_stand_at_whole_steps():
    rates = [Exponential().lr(step, **ROUND) for step in (719, 720, 959, 960)]
    assert rates == pytest.approx([0.256 * 0.97**stair for stair in (2, 3, 3, 4)], rel=1e-12)


@pytest.mark.parametrize("schedule", [Exponential(), Cosine(), Constant(warmup_epochs=5.0)])
def test_warmup_rises_in_a_line_from_zero(schedule):
    rates = [schedule.lr(step, **ROUND) for step in (0, 1, 250, 499)]
    assert rates == pytest.approx([0, 0.256 / 500, 0.128, 0.256 * 499 / 500], rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine(final):
    def share(progress):
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    rates = [Cosine(final=final).lr(step, **ROUND) for step in (500, 17_500, 35_000, 40_000)]
    assert rates == pytest.approx([0.256 * share(p) for p in (500 / 35_000, 0.5, 1, 1)], abs=1e-12)
    assert rates[2] == pytest.approx(0.256 * final, abs=1e-12)


@pytest.mark.parametrize(
    "schedule", [Exponential(warmup_epochs=0.0), Cosine(warmup_epochs=0.0), Constant(), Constant(warmup_epochs=0.001)]
)
def test_without_warmup_the_first_step_has_the_base_rate(schedule):
    assert schedule.lr(0, **ROUND) == 0.256


def test_constant_stays():
    assert {Constant().lr(step, **ROUND) for step in (0, 1, 10**4, 10**7)} == {0.256}


@pytest.mark.parametrize("kind", [Exponential, Cosine, Constant])
@pytest.mark.parametrize("name", ["lr_per_256", "warmup_epochs"])
def test_negative_settings_are_refused(kind, name):
    with pytest.raises(ValueError, match=rf"schedule.{name}=-1.0 is negative"):
        kind(**{name: -1.0})


@pytest.mark.parametrize("setting", [{"decay": 0.0}, {"decay": 1.01}, {"decay_epochs": 0.0}])
def test_meaningless_stairs_are_refused(setting):
    with pytest.raises(ValueError, match=r"decay lies in \(0, 1\], decay_epochs is positive"):
        Exponential(**setting)


@pytest.mark.parametrize("final", [-0.1, 1.1])
def test_meaningless_final_share_is_refused(final):
    with pytest.raises(ValueError, match=rf"schedule.final={final} must lie in \[0, 1\]"):
        Cosine(final=final)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_steps_are_torchs_multi_step():
    schedule = instantiate(yaml.safe_load((REPOSITORY / "configs/schedule/steps.yaml").read_text()))
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=0.1), [30, 60, 80], gamma=0.1)
    for epoch in range(90):
        rates = [schedule.lr(10 * epoch + i, batch_size=256, steps_per_epoch=10.0, epochs=90) for i in range(10)]
        assert rates == pytest.approx(theirs.get_last_lr() * 10)
        theirs.step()


def test_steps_warm_up_and_stand_at_fractions_of_epochs():
    rates = [Steps(warmup_epochs=5.0).lr(step, **ROUND) for step in (250, 500, 2999, 3000)]
    assert rates == pytest.approx([0.8, 1.6, 1.6, 0.16])
    halves = [Steps(at=[0.5]).lr(step, **ROUND) for step in (49, 50)]
    assert halves == pytest.approx([1.6, 0.16])


@pytest.mark.parametrize("setting", [{"decay": 0.0}, {"at": [60, 30]}, {"at": [0, 30]}, {"at": ["30"]}])
def test_meaningless_steps_are_refused(setting):
    with pytest.raises(ValueError, match=f"schedule.{next(iter(setting))}="):
        Steps(**setting)


def test_rate_zero_is_allowed():
    assert Exponential(lr_per_256=0.0).lr(900, **ROUND) == 0
