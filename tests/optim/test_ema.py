import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet_train.optim.ema import EMA, ema_decay

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/optim.json").read_text())["moving_average"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def followers(model):
    """Return a bias, BatchNorm's weight and its running statistics: three numbers each."""
    return [model[0].bias, model[1].weight, model[1].running_mean, model[1].running_var]


@torch.no_grad()
def fill(model, values):
    for tensor in followers(model):
        tensor.copy_(torch.tensor(values))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['decay']} from {case['first']}")
def test_parameters_and_statistics_follow_as_in_tensorflow(case):
    model = network()
    fill(model, case["values"][0])
    ema = EMA(model, case["decay"])
    for step, (now, average) in enumerate(zip(case["values"][1:], case["averages"], strict=True), case["first"] + 1):
        fill(model, now)
        ema.update(step)
        for tensor in followers(ema.module):
            torch.testing.assert_close(tensor.detach(), torch.tensor(average), rtol=2e-6, atol=2e-7)


def test_golden_crosses_the_end_of_the_ramp():
    first, count = GOLDEN[1]["first"], len(GOLDEN[1]["averages"])
    decays = [ema_decay(step, 0.9999) for step in range(first + 1, first + count + 1)]
    assert decays[0] < 0.9999 == decays[-1]


def test_decay_ramps():
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (90, 91 / 100), (89_990, 0.9999), (10**6, 0.9999)):
        assert ema_decay(step, 0.9999) == pytest.approx(decay, rel=1e-12)


def test_decay_zero_equals_the_model():
    model = network()
    ema = EMA(model, 0.0)
    for step in (1, 2, 3):
        model(torch.randn(5, 2)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        ema.update(step)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(ema.state_dict()[name], tensor), name


def test_average_is_apart_from_the_model():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model, 0.9)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    with torch.no_grad():
        ema.module[0].bias += 1
    ema.update(1)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_goes_on_from_a_saved_state():
    model, other = network(), network()
    fill(model, [1.0, 2.0, 3.0])
    ema = EMA(model, 0.9)
    fill(model, [4.0, 5.0, 6.0])
    ema.update(7)

    fill(other, [4.0, 5.0, 6.0])
    resumed = EMA(other, 0.9)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each, follower in ((model, ema), (other, resumed)):
        fill(each, [7.0, 8.0, 9.0])
        follower.update(8)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in ema.state_dict().items())
    assert not torch.equal(ema.module[0].bias, model[0].bias)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=rf"ema_decay={decay} must lie in \[0, 1\)"):
        EMA(network(), decay)
