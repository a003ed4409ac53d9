"""RMSProp and the average in one pass, against the optimizer and the average themselves."""

import copy
from typing import Any

import pytest
import torch
from timm.optim.rmsprop_tf import RMSpropTF
from torch import nn

from effnet_train.optim.ema import EMA, ema_decay
from effnet_train.optim.one_pass import OnePass
from effnet_train.optim.param_groups import param_groups

pytest.importorskip("triton", reason="Triton is not here: pip install triton")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 9 * 9, 6))
    return model.to(memory_format=torch.channels_last)


def make(model: nn.Module) -> tuple[RMSpropTF, EMA]:
    return RMSpropTF(param_groups(model, 0.1), lr=0.0, alpha=0.8, momentum=0.7, eps=1e-3), EMA(model, 0.9)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(torch.randn(parameter.shape, generator=generator))


def advance(model: nn.Module, optimizer: RMSpropTF, ema: EMA, pass_: OnePass | None, steps: range) -> None:
    for step in steps:
        lr = 0.01 * step
        set_gradients(model, step)
        with torch.no_grad():
            model[1].running_mean += step
        if pass_ is None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
        else:
            pass_(torch.tensor(lr), torch.tensor(1 - ema_decay(step, ema.decay)))
            pass_.count()
            assert not any(parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]


def state_of(model: nn.Module, optimizer: RMSpropTF, ema: EMA) -> dict[str, Any]:
    return copy.deepcopy(
        {"model": model.state_dict(), "ema": ema.state_dict(), "slots": optimizer.state_dict()["state"]}
    )


def test_it_is_the_optimizer_and_the_average() -> None:
    results = []
    for one_pass in (False, True):
        model = network()
        optimizer, ema = make(model)
        advance(model, optimizer, ema, OnePass(optimizer, ema) if one_pass else None, range(1, 5))
        results.append(state_of(model, optimizer, ema))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert results[1]["slots"][0]["step"] == 4


def test_without_an_average_it_is_the_model_to_the_last_bit() -> None:
    model = network()
    optimizer, ema = make(model)
    ema.decay = 0.0
    for average, _ in ema.pairs():
        average.fill_(1000.1)  # so far away that the difference has lost digits
    advance(model, optimizer, ema, OnePass(optimizer, ema), range(1, 4))
    torch.testing.assert_close(ema.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_going_on_is_exact_and_the_state_dicts_are_the_same() -> None:
    model = network()
    optimizer, ema = make(model)
    one_pass = OnePass(optimizer, ema)
    advance(model, optimizer, ema, one_pass, range(1, 3))
    between, slots = state_of(model, optimizer, ema), copy.deepcopy(optimizer.state_dict())
    advance(model, optimizer, ema, one_pass, range(3, 5))

    again = network()
    other, other_ema = make(again)
    again.load_state_dict(between["model"])
    other_ema.load_state_dict(between["ema"])
    other.load_state_dict(slots)
    advance(again, other, other_ema, OnePass(other, other_ema), range(3, 5))
    torch.testing.assert_close(state_of(again, other, other_ema), state_of(model, optimizer, ema), rtol=0, atol=0)


def test_what_it_cannot_do_is_refused() -> None:
    model = network()
    ema = EMA(model)
    with pytest.raises(ValueError, match="cuda_graph=true works with optim=rmsprop, without another optimizer"):
        OnePass(torch.optim.SGD(model.parameters(), lr=0.1), ema)
    with pytest.raises(ValueError, match="without centered: or use cuda_graph=false"):
        OnePass(RMSpropTF(model.parameters(), momentum=0.9, centered=True), ema)
    with pytest.raises(ValueError, match="without its momentum of 0"):
        OnePass(RMSpropTF(model.parameters(), momentum=0.0), ema)
