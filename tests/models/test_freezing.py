"""What is frozen stays to the bit, and nothing else does."""

from typing import Any

import pytest
import torch
from torch import nn

from effnet_train.engine.evaluate import _evaluating
from effnet_train.engine.state import TrainState, no_statistics
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.freezing import Freeze, last_norm
from effnet_train.models.mobilenet import MobileNetV1
from effnet_train.models.network import Network
from effnet_train.models.resnet import ResNet
from effnet_train.optim.ema import EMA

CLASSIFIER = {"classifier.weight", "classifier.bias"}
STATISTICS = ("running_mean", "running_var")


def network(kind: type[Network] = EfficientNet, **options: Any) -> Network:
    torch.manual_seed(0)
    return kind(width=0.25, depth=0.25, num_classes=5, resolution=32, **options).train()


def moved(model: Network, freeze: Freeze) -> set[str]:
    """Return the names of the tensors that a step with every kind of random dropping changes."""
    freeze(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        images = torch.randn(6, 3, 32, 32, generator=generator)
        loss = nn.functional.cross_entropy(model(images, torch.arange(6) + step), torch.arange(6) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def all_of(model: Network, *prefixes: str) -> set[str]:
    names = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    return {name for name in names if name.startswith(prefixes)}


def test_fixres_trains_the_classifier_and_the_last_batch_norm() -> None:
    """Its paper, section 5: "the batch normalization that precedes the global pooling" and the classifier."""
    model = network()
    norm = {f"head.norm.{name}" for name in ("weight", "bias", *STATISTICS)}
    assert moved(model, Freeze(up_to="last_norm")) == CLASSIFIER | norm


@pytest.mark.parametrize(("kind", "name"), [(ResNet, "expand"), (MobileNetV1, None)])
def test_without_a_head_the_last_batch_norm_is_the_last_blocks(kind: type[Network], name: str | None) -> None:
    model = network(kind)
    found = {key for key, module in model.named_modules() if module is last_norm(model)}
    *_, block = model.blocks()
    if name is None:
        *_, expected = (key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
        assert found == {expected}
    else:
        assert last_norm(model) is getattr(block, name).norm
    changed = moved(model, Freeze(up_to="last_norm"))
    assert changed == CLASSIFIER | {f"{next(iter(found))}.{part}" for part in ("weight", "bias", *STATISTICS)}


def test_before_the_classifier_everything_stays() -> None:
    assert moved(network(), Freeze(up_to="classifier")) == CLASSIFIER


def test_stages_are_frozen_from_the_images_on() -> None:
    model = network()
    frozen = all_of(model, "stem.", "stages.0.", "stages.1.")
    assert moved(model, Freeze(up_to=2)) == all_of(model, "") - frozen
    assert moved(network(), Freeze()) == all_of(model, "")


def test_a_frozen_batch_norm_keeps_weights_and_statistics_and_normalises_by_them() -> None:
    model = network(drop_connect=0.0, dropout=0.0)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    frozen = {name for name in all_of(model, "") if name.rpartition(".")[0] in norms}
    images = torch.randn(4, 3, 32, 32)
    freeze = Freeze(batch_norm=True)
    freeze(model)
    logits = model(images)
    torch.testing.assert_close(logits, model.eval()(images))
    assert moved(network(), freeze) == all_of(model, "") - frozen


def test_frozen_parts_drop_nothing() -> None:
    model = network(drop_connect=0.9, dropout=0.0)
    Freeze(up_to="classifier")(model)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images, torch.arange(4)), model(images, torch.arange(4) + 100))


def test_an_evaluation_leaves_them_frozen() -> None:
    model = network()
    Freeze(up_to="last_norm")(model)
    before = [module.training for module in model.modules()]
    with _evaluating([model]):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up_to": "last_norm", "batch_norm": True}, "freeze.batch_norm=true freezes the BatchNorm that"),
        ({"up_to": -1}, "freeze.up_to=-1 must be a number of stages, last_norm or classifier"),
        ({"up_to": 8}, "freeze.up_to=8 is more than the network's 7 stages: lower it, or give last_norm or classifier"),
    ],
)
def test_what_cannot_be_frozen_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Freeze(**options)(network())


def test_ranks_average_no_frozen_statistics() -> None:
    """The sum of three equal numbers, divided by three, may be another number."""
    model = network()
    Freeze(up_to="last_norm")(model)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    cpu = torch.device("cpu")
    state = TrainState(model, EMA(model), sgd, torch.amp.GradScaler("cpu", enabled=False), no_statistics(cpu))
    assert [id(t) for t in state.running_statistics] == [
        id(model.head.norm.running_mean),
        id(model.head.norm.running_var),
    ]
