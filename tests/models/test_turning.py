import copy

import pytest
import torch
from torch import nn

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.layers import Conv2d
from effnet_train.models.mobilenet import MobileNetV2
from effnet_train.models.resnet import ResNet
from effnet_train.models.turning import turn

SMALL = {"width": 0.5, "depth": 0.5, "num_classes": 7, "drop_connect": 0.0, "dropout": 0.0}


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (70, 37), (1, 2)])
def test_logits_and_features_are_what_they_were(size, randomised):
    torch.manual_seed(0)
    model = randomised(EfficientNet(**SMALL)).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, features = model(images), model.features(images)
        assert turn(model).turned
        torch.testing.assert_close(model(images), logits)
        torch.testing.assert_close(model.features(images), features)
        assert not turn(model, on=False).turned
        torch.testing.assert_close(model(images), logits, rtol=0, atol=0)


def test_gradients_and_statistics_are_what_they_were_and_the_state_dict_is(randomised):
    torch.manual_seed(0)
    plain = randomised(EfficientNet(**SMALL)).train()
    turned = turn(copy.deepcopy(plain))
    images = torch.randn(3, 3, 48, 33, dtype=torch.float64)
    for model in (plain, turned):
        model(images).square().sum().backward()
    torch.testing.assert_close(turned.state_dict(), plain.state_dict())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(turned.get_parameter(name).grad, parameter.grad, msg=name, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kernel", "size"), [(3, 8), (3, 7), (5, 8), (5, 9), (7, 10), (3, 2), (5, 2), (5, 1)])
def test_a_convolution_turned_is_the_convolution(kernel, size):
    conv = Conv2d(4, 4, kernel=kernel, stride=2, groups=4).double()
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    expected = conv(x)
    conv.turned = True
    torch.testing.assert_close(conv(x.flip((2, 3))).flip((2, 3)), expected)


def test_only_networks_that_can_be_are_turned():
    assert turn(MobileNetV2(width=0.35, num_classes=3)).turned
    for model in (EfficientNet(**SMALL, padding="symmetric"), ResNet(num_classes=3, padding="same")):
        assert not turn(model).turned
        assert not any(module.turned for module in model.modules() if isinstance(module, Conv2d))
    linear = nn.Linear(2, 2)
    assert turn(linear) is linear
