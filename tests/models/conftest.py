"""Networks of other libraries, with weights that matter."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import nn

from effnet_train.cli.build import model_variants


class Library(NamedTuple):
    """Hold how to build a library's network of a variant, its names, and what ours must be set to."""

    build: Callable[..., nn.Module]
    fmt: str
    settings: dict[str, Any]


SAME: dict[str, Any] = {"padding": "same", "bn_eps": 1e-3}
SYMMETRIC: dict[str, Any] = {"padding": "symmetric", "bn_eps": 1e-5}


def _lukemelas(variant: str) -> nn.Module:
    import efficientnet_pytorch

    # Without an image size it pads by the input's; with one, always as that size would want it.
    return efficientnet_pytorch.EfficientNet.from_name(f"efficientnet-{variant}", image_size=None)


def _lite(variant: str) -> nn.Module:
    import efficientnet_lite_pytorch

    return efficientnet_lite_pytorch.EfficientNet.from_name(f"efficientnet-{variant}", image_size=None)


def _geffnet(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        import geffnet

        return geffnet.create_model(name)


LIBRARIES = {
    "timm_tf": Library(lambda variant: timm.create_model(f"tf_efficientnet_{variant}"), "timm", SAME),
    "timm": Library(lambda variant: timm.create_model(f"efficientnet_{variant}"), "timm", SYMMETRIC),
    "geffnet_tf": Library(lambda variant: _geffnet(f"tf_efficientnet_{variant}"), "timm", SAME),
    "geffnet": Library(lambda variant: _geffnet(f"efficientnet_{variant}"), "timm", SYMMETRIC),
    "torchvision": Library(
        lambda variant: torchvision.models.get_model(f"efficientnet_{variant}"), "torchvision", SYMMETRIC
    ),
    "torchvision_large": Library(  # B5 to B7
        lambda variant: torchvision.models.get_model(f"efficientnet_{variant}"),
        "torchvision",
        {**SYMMETRIC, "bn_eps": 1e-3},
    ),
    "lukemelas": Library(_lukemelas, "lukemelas", SAME),
    "lite": Library(_lite, "lukemelas", SAME),
}


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    return LIBRARIES


@pytest.fixture(scope="session")
def variants() -> dict[str, dict[str, Any]]:
    return model_variants()


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """Return a function that gives a network affine parameters, biases and BatchNorm statistics that matter.

    The statistics are near those of its own features: with others, logits would hardly depend on the image.
    """

    def run(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.data.uniform_(-0.5, 0.5, generator=generator)
        model.eval()
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.train().momentum = 1.0
        with torch.no_grad():
            model(torch.randn(4, 3, 64, 64, generator=generator).to(norms[0].weight.dtype))
        for module, momentum in zip(norms, momenta, strict=True):
            module.eval().momentum = momentum
            mean, var = module.running_mean, module.running_var
            assert mean is not None
            assert var is not None
            mean += var.sqrt() * torch.empty_like(mean).uniform_(-0.5, 0.5, generator=generator)
            var *= torch.empty_like(var).uniform_(0.5, 2.0, generator=generator)
            # A channel that varied little by chance would make rounding errors large.
            var.clamp_(min=0.3 * float(var.mean()))
        return model

    return run


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Return a function that gives a network in float64 statistics that are not those of a new one."""

    def change(model: nn.Module) -> nn.Module:
        for module in model.double().modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model

    return change
