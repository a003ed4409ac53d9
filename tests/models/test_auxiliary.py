import copy

import pytest
import torch
from torch import nn

from effnet_train.models.auxiliary import (
    TwoBatchNorm2d,
    add_auxiliary,
    auxiliary_tensors,
    main_tensors,
    through_auxiliary,
)
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.layers import BatchNorm2d

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(8, 5, 4, 4, generator=GENERATOR) * torch.linspace(1, 3, 8).view(8, 1, 1, 1)


def test_the_halves_of_a_batch_are_normalised_apart():
    norm, first, second = (BatchNorm2d(5, momentum=0.3) for _ in range(3))
    both = TwoBatchNorm2d(norm)
    wanted = torch.cat([first(IMAGES[:4]), second(IMAGES[4:])])
    torch.testing.assert_close(both(IMAGES), wanted, rtol=0, atol=0)
    for one, other in ((both, first), (both.auxiliary, second), (norm, first)):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var)
    assert not torch.allclose(first.running_var, second.running_var)
    evaluated = copy.deepcopy(first).eval()(IMAGES)
    torch.testing.assert_close(both.eval()(IMAGES), evaluated)


def network() -> EfficientNet:
    return EfficientNet(width=0.1, depth=0.1, resolution=32, num_classes=3)


def test_a_network_keeps_its_own_tensors_by_their_names():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model.eval()(torch.ones(2, 3, 32, 32))
    add_auxiliary(model)
    after = model.state_dict()
    assert main_tensors(before) is before
    assert {name: tensor.tolist() for name, tensor in main_tensors(after).items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    norms = [module for module in model.modules() if isinstance(module, TwoBatchNorm2d)]
    assert len(auxiliary_tensors(after)) == 5 * len(norms) > 0
    torch.testing.assert_close(model.eval()(torch.ones(2, 3, 32, 32)), logits, rtol=0, atol=0)


def test_all_of_a_batch_through_the_auxiliary_ones():
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    add_auxiliary(model)
    images, keys = torch.randn(4, 3, 32, 32, generator=GENERATOR), torch.arange(4)
    with through_auxiliary(model):
        torch.testing.assert_close(model(images, keys), plain(images, keys), rtol=1e-4, atol=1e-5)
    moved = dict(model.named_buffers())
    assert torch.equal(moved["stem.norm.running_mean"], torch.zeros_like(moved["stem.norm.running_mean"]))
    assert moved["stem.norm.auxiliary.running_mean"].abs().max() > 0


def test_a_model_without_batch_norm():
    with pytest.raises(
        ValueError, match="Sequential has no BatchNorm, and AdvProp keeps adversarial images' statistics"
    ):
        add_auxiliary(nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm(4)))
