"""Parity with timm and torchvision: same weights, same logits, same gradients; float64 leaves no room for rounding."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from effnet_train.models.efficientnet import EfficientNet

Randomise = Callable[..., nn.Module]


def copy_by_order(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy a state whose tensors come in the same order under other names."""
    theirs_state, ours_state = theirs.state_dict(), ours.state_dict()
    pairs = zip(ours_state.items(), theirs_state.values(), strict=True)
    for (name, mine), value in pairs:
        assert mine.shape == value.shape, name
    ours.load_state_dict(dict(zip(ours_state, theirs_state.values(), strict=True)))


def images(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tf_efficientnet_b0", {}),
        ("tf_efficientnet_b2", {"width": 1.1, "depth": 1.2}),
        ("tf_efficientnet_lite0", {"activation": "relu6", "se_ratio": 0.0, "fixed_ends": True}),
        (
            "tf_efficientnet_lite2",
            {"activation": "relu6", "se_ratio": 0, "fixed_ends": True, "width": 1.1, "depth": 1.2},
        ),
    ],
)
def test_logits_equal_timm(randomise: Randomise, name: str, arguments: dict) -> None:
    theirs = timm.create_model(name, num_classes=10).double().eval()
    randomise(theirs)
    ours = EfficientNet(num_classes=10, **arguments).double().eval()
    copy_by_order(theirs, ours)
    with torch.no_grad():
        for x in (images(1, 3, 64, 64), images(1, 3, 65, 47)):
            expected = theirs(x)
            assert expected.std() > 0.1  # logits that differ
            torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


def test_logits_equal_torchvision(randomise: Randomise) -> None:
    theirs = torchvision.models.efficientnet_b0(num_classes=10).double().eval()
    randomise(theirs)
    ours = EfficientNet(num_classes=10, padding="symmetric", bn_eps=1e-5).double().eval()
    copy_by_order(theirs, ours)
    with torch.no_grad():
        for x in (images(1, 3, 64, 64), images(1, 3, 65, 47)):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_gradients_equal_timm(randomise: Randomise) -> None:
    theirs = timm.create_model("tf_efficientnet_b0", num_classes=10, drop_rate=0.0, drop_path_rate=0.0).double()
    randomise(theirs).train()
    ours = EfficientNet(num_classes=10, dropout=0.0, drop_connect=0.0).double().train()
    copy_by_order(theirs, ours)
    starts = [m.running_mean.clone() for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    x, labels = images(4, 3, 64, 64), torch.arange(4)
    losses = [nn.functional.cross_entropy(model(x), labels) for model in (theirs, ours)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: name + text)
    means = [[m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (ours, theirs)]
    # timm leaves the momentum at 0.1: a tenth of the way is ten times ours.
    for mine, other, start in zip(*means, starts, strict=True):
        torch.testing.assert_close((mine - start) * 10, other - start, rtol=1e-6, atol=1e-9)
