"""Whole networks trained by the kernels and by the plain layers, from the same seed."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.optim.rmsprop_tf import RMSpropTF
from torch import Tensor, nn

from effnet_train.analysis import roofline
from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.distributed import Session
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.engine.train import Stepper
from effnet_train.engine.working_weights import WorkingWeights
from effnet_train.models.efficientnet import EfficientNet, MBConv
from effnet_train.models.freezing import Freeze
from effnet_train.models.fused import launch
from effnet_train.models.layers import Style
from effnet_train.models.scaling import Stage
from effnet_train.optim.ema import EMA
from effnet_train.optim.losses import CrossEntropy
from effnet_train.optim.param_groups import param_groups


def trained(
    device: torch.device,
    *,
    steps: int,
    precision: str = "fp32",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    size: int = 32,
    **model: Any,
) -> tuple[TrainState, list[float]]:
    """Train a new network on random images, of which a label is seen in the colour; return state and losses."""
    torch.manual_seed(0)
    network = EfficientNet(num_classes=4, **model).to(device, dtype).to(memory_format=torch.channels_last).train()
    optimizer = RMSpropTF(param_groups(network, 1e-5), lr=0.0, alpha=0.9, momentum=0.9, eps=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = TrainState(network, EMA(network, 0.9), optimizer, scaler, no_statistics(device))
    step = Stepper(
        network=network if dtype == torch.float32 else Wide(network),
        loss=CrossEntropy(label_smoothing=0.1),
        preprocess=Preprocess(resolution=size),
        num_classes=4,
        precision=precision,
        session=Session(device=device),
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for i in range(steps):
        labels = torch.randint(4, (batch_size,), generator=generator)
        images = torch.randint(200, (batch_size, size, size, 3), generator=generator)
        images[torch.arange(batch_size), ..., labels % 3] += 18 * (1 + labels // 3)[:, None, None]
        keys = torch.arange(i * batch_size, (i + 1) * batch_size)
        state.statistics.copy_(no_statistics(device))
        step(state, [Batch(images.to(torch.uint8), labels, keys, [])], 0.002)
        losses.append((state.statistics[0] / state.statistics[2]).item())
    return state, losses


class Wide(nn.Module):
    """A network in float64, called on the step's float32 images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        return self.network(images.double(), keys)


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have few programs: to an interpreter their number matters, not their size."""
    monkeypatch.setattr(launch, "_NUMBERS", dict.fromkeys(launch._NUMBERS, 128))
    monkeypatch.setattr(launch, "_columns", lambda channels, most: 1 << (channels - 1).bit_length())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("large_blocks")
def test_a_step(device: torch.device, checkpointing: bool) -> None:
    model = {"size": 16, "width": 0.25, "depth": 0.25, "drop_connect": 0.5, "bn_momentum": 0.1}
    (plain, expected), (fused, losses) = (
        trained(device, steps=1, dtype=torch.float64, fused=choice, checkpointing=checkpointing and choice, **model)
        for choice in (False, True)
    )
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(fused.model.state_dict(), plain.model.state_dict(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused.ema.state_dict(), plain.ema.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("large_blocks")
def test_weights_cast_before_they_are_used_are_the_same_bits(device: torch.device) -> None:
    """Of a captured step all are cast at once, but for the depthwise convolution's, which the kernels read whole."""
    found = []
    for at_once in (False, True):
        torch.manual_seed(0)
        block = MBConv(Stage(3, 1, 2, 8, 8, 1), se_ratio=0.25, rate=0.0, style=Style(fused=True))
        block = block.to(device).to(memory_format=torch.channels_last).train()
        x = torch.randn(4, 8, 6, 5, device=device, requires_grad=True)
        with WorkingWeights(block, torch.bfloat16).at_work() if at_once else nullcontext():
            with torch.autocast(device.type, torch.bfloat16):
                y = block(x)
            y.float().square().sum().backward()
        found.append({"y": y, "dx": x.grad, **{name: p.grad for name, p in block.named_parameters()}})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.usefixtures("large_blocks")
def test_the_time_of_fused_layers_has_its_kinds(device: torch.device) -> None:
    network = EfficientNet(width=0.25, depth=0.25, num_classes=4, fused=True).to(device).train()
    images = torch.randn(2, 3, 32, 32, device=device)
    shares = roofline.by_kind(lambda: network(images).sum().backward(), device.type)
    assert {"convolution, depthwise", "gate and projection", "normalisation"} <= shares.keys()
    assert shares.get("other", 0) < 0.3


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_hundred_steps(device: torch.device, precision: str) -> None:
    """Rounding sets two trainings apart more and more; their losses stay together, and where they go is the same.

    The tolerances: 0.1 % over the first 20 steps in float32, 2 % over 5 in bf16, and 10 % of the mean of the last 50.
    """
    options: dict[str, Any] = {"steps": 200, "batch_size": 64, "size": 64, "width": 0.5, "depth": 0.3}
    _, expected = trained(device, precision=precision, fused=False, **options)
    _, losses = trained(device, precision=precision, fused=True, **options)
    first = 20 if precision == "fp32" else 5
    assert losses[:first] == pytest.approx(expected[:first], rel=1e-3 if precision == "fp32" else 2e-2)
    assert sum(losses[-50:]) / 50 == pytest.approx(sum(expected[-50:]) / 50, rel=0.1)
    assert sum(losses[-50:]) / 50 < 0.8 * losses[0]


@pytest.mark.usefixtures("large_blocks")
def test_what_has_another_batch_norm_is_left_to_the_plain_layers(device: torch.device) -> None:
    network = EfficientNet(width=0.25, depth=0.25, num_classes=4, fused=True).to(device).train()
    Freeze(batch_norm=True)(network)
    images = torch.randn(2, 3, 32, 32, device=device)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(images).sum().backward()
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name
