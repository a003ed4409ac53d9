"""Two real processes over gloo whose fused BatchNorms share their statistics: together they are the plain block."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effnet_train import distributed
from effnet_train.models.efficientnet import MBConv
from effnet_train.models.layers import Style
from effnet_train.models.scaling import Stage

SAMPLES = 5  # three for one rank and two for the other, whose counts then matter


def block(*, fused: bool) -> MBConv:
    torch.manual_seed(0)
    style = Style(fused=fused, bn_momentum=0.3)
    return MBConv(Stage(3, 1, 2, 4, 4, 1), se_ratio=0.25, rate=0.0, style=style).double().train()


def trained(module: MBConv, mine: slice) -> dict[str, Tensor]:
    """Return what a pass over some of the samples leaves: output, gradients and running statistics."""
    generator = torch.Generator().manual_seed(1)
    x, wanted = torch.randn(2, SAMPLES, 4, 5, 4, dtype=torch.float64, generator=generator)
    leaf = x[mine].requires_grad_()
    y = module(leaf)
    (y * wanted[mine]).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return copy.deepcopy({"y": y.detach(), "dx": leaf.grad, **found, **dict(module.named_buffers())})


def work(folder: str) -> None:
    with distributed.open_session("cpu") as session:
        module = block(fused=True)
        distributed.sync_batch_norm(module, session, 2)
        found = trained(module, (slice(0, 3), slice(3, None))[session.rank])
        torch.save(found, Path(folder) / f"{session.rank}.pt")


def test_two_ranks_are_one(device: torch.device, tmp_path: Path) -> None:
    if device.type != "cpu":
        pytest.skip("two ranks on one GPU have nothing to meet by")
    distributed.launch(work, str(tmp_path), ranks=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    module = block(fused=False)
    expected = trained(module, slice(None))
    parameters = {name for name, _ in module.named_parameters()}
    found = {
        name: torch.cat([one[name], other[name]])
        if name in ("y", "dx")
        else one[name] + other[name]
        if name in parameters
        else one[name]
        for name in expected
    }
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
