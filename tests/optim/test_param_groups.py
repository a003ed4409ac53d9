import pytest
import torch
from torch import nn

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.optim.param_groups import param_groups


@pytest.fixture(scope="module")
def model():
    return EfficientNet(width=0.25, depth=0.25, num_classes=10)


def names(model, group):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in group["params"]]


def test_every_trainable_parameter_stands_in_one_group(model):
    groups = param_groups(model, 1e-5)
    found = [name for group in groups for name in names(model, group)]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert [group["weight_decay"] for group in groups] == [1e-5, 0.0]


def test_all_but_batch_norm_decays(model):
    decayed, spared = (set(names(model, group)) for group in param_groups(model, 1e-5))
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert spared == {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}

    biases = {name for name in decayed if name.endswith("bias")}
    gates = [name for name in biases if "squeeze_excite" in name]
    blocks = len(list(model.blocks()))
    assert "classifier.bias" in biases
    # Two a block: neither of squeeze-excite's convolutions goes without.
    assert len(gates) == 2 * blocks
    assert biases == {"classifier.bias", *gates}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_every_kind_of_batch_norm_is_spared(norm):
    model = nn.Sequential(nn.Linear(2, 3), norm(3))
    assert names(model, param_groups(model, 0.1)[1]) == ["1.weight", "1.bias"]


def test_other_norms_decay():
    # The authors spare what is named batch_normalization, no more.
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    assert names(model, param_groups(model, 0.1)[0]) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_frozen_and_shared_parameters():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    decayed, spared = param_groups(model, 0.1)
    assert names(model, decayed) == ["0.weight", "1.bias"]
    assert names(model, spared) == ["2.bias"]


def test_groups_reach_the_optimizer():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(param_groups(model, 0.1), lr=1.0).step()
    assert [round(parameter.item(), 6) for parameter in model.parameters()] == [0.9, 0.9, 1.0, 1.0]


def test_negative_decay_is_refused(model):
    with pytest.raises(ValueError, match=r"optim.weight_decay=-0.1 is negative: use 0 for none"):
        param_groups(model, -0.1)


def test_each_part_has_the_rate_of_the_next_times_the_decay(model):
    """Ten parts: stem, seven stages, head, classifier."""
    groups = param_groups(model, 0.1, layer_decay=0.5)
    found = {name: group["lr_scale"] for group in groups for name in names(model, group)}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, scale in found.items():
        first, second, *_ = name.split(".")
        depth = {"classifier": 0, "head": 1, "stem": 9}[first] if first != "stages" else 8 - int(second)
        assert scale == 0.5**depth, name
    plain = {name: group["weight_decay"] for group in param_groups(model, 0.1) for name in names(model, group)}
    assert {name: group["weight_decay"] for group in groups for name in names(model, group)} == plain
    assert all(group["params"] for group in groups)


def test_without_decay_the_groups_are_what_former_checkpoints_hold(model):
    assert [set(group) for group in param_groups(model, 0.1, 1.0)] == [{"params", "weight_decay"}] * 2


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_a_layer_decay_is_a_share(model, decay):
    with pytest.raises(ValueError, match=rf"layer_decay={decay} must lie in \(0, 1\]"):
        param_groups(model, 0.1, decay)
