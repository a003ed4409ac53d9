from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from effnet_train.analysis.complexity import (
    Cost,
    _QuickNorms,
    complexity,
    evaluation_memory,
    kept_numbers,
    training_memory,
)
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.layers import ConvNorm
from effnet_train.models.resnet import ResNet


def small(**arguments: bool) -> EfficientNet:
    return EfficientNet(width=0.25, depth=0.6, num_classes=5, **arguments)


def test_counts_of_a_network_small_enough_for_paper() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 4 * 4, 10))
    cost = complexity(model, 8)
    assert cost.parameters == (3 * 9 * 4 + 4) + (64 * 10 + 10)
    assert cost.multiply_adds == 16 * 4 * 3 * 9 + 64 * 10
    assert cost.activations == 4 * 16
    assert cost.parts[0] == Cost("0", 112, 16 * 4 * 3 * 9, 64)
    assert cost.parts[2] == Cost("2", 650, 640, 0)


def test_parts_add_up_and_follow_table_1() -> None:
    model = EfficientNet()
    cost = complexity(model, 224)
    assert [part.name for part in cost.parts] == ["stem", *(f"stages.{i}" for i in range(7)), "head", "classifier"]
    for field in ("parameters", "multiply_adds", "activations"):
        assert sum(getattr(part, field) for part in cost.parts) == getattr(cost, field)
    assert cost.parts[0].multiply_adds == 112 * 112 * 32 * 27
    # MBConv1: depthwise, squeeze-excite 32-8-32, projection to 16.
    assert cost.parts[1].multiply_adds == 112 * 112 * (32 * 9 + 32 * 16) + 2 * 32 * 8


def test_a_model_is_left_as_it_was() -> None:
    model = small().train()
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    complexity(model, 32)
    training_memory(model, 32, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.training, model.stem.norm.training, model.head.norm.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Measure what a real forward pass keeps for the backward pass, weights excepted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    del logits
    return sum(storage.nbytes() for storage in kept.values())


@pytest.fixture
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU keep what all devices do: what is counted are plain layers, the most that a step may keep."""
    monkeypatch.setattr(ConvNorm, "_recomputes", lambda *_: False)


@pytest.mark.usefixtures("plain_layers")
def test_memory_is_what_a_real_step_keeps_and_little_more() -> None:
    model = small().train()
    saved = saved_bytes(model, torch.randn(8, 3, 64, 64))
    weights = sum(p.nbytes for p in model.parameters()) * 5
    estimate = training_memory(model, 64, 8) - weights
    assert saved < estimate < 1.25 * saved


def test_on_a_cpu_a_quarter_less_is_kept() -> None:
    model = small().train()
    images = torch.randn(8, 3, 64, 64)
    saved = saved_bytes(model, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvNorm, "_recomputes", lambda *_: False)
        assert 0.65 < saved / saved_bytes(model, images) < 0.8


def test_memory_grows_with_the_batch_and_shrinks_with_precision_and_checkpointing() -> None:
    def memory(batch_size: int, activation_bytes: int = 4, checkpointing: bool = False) -> int:
        return training_memory(small(checkpointing=checkpointing), 64, batch_size, activation_bytes=activation_bytes)

    one, two, nine = memory(1), memory(2), memory(9)
    assert nine - one == pytest.approx(8 * (two - one), rel=0.01)
    # What no batch changes: weights, gradients, two slots, average; running statistics and their average.
    model = small()
    statistics = sum(buffer.nbytes for buffer in model.buffers() if buffer.is_floating_point())
    fixed = 5 * sum(p.nbytes for p in model.parameters()) + 2 * statistics
    assert memory(9, activation_bytes=2) - fixed == (nine - fixed) / 2
    assert memory(9, checkpointing=True) < nine * 2 / 3


@pytest.mark.usefixtures("plain_layers")
@pytest.mark.parametrize("make", [small, lambda: ResNet(width=0.125, num_classes=5), lambda: small(checkpointing=True)])
def test_parts_keep_what_a_real_step_keeps(make: Callable[[], nn.Module]) -> None:
    model, plain = make().train(), make().train()
    plain.checkpointing = False
    saved = saved_bytes(plain, torch.randn(8, 3, 64, 64)) / 8 / 4
    if isinstance(model, ResNet):
        saved -= 2 * 8 * 16 * 16  # where the maxima were: whole numbers of 8 bytes
    stages, layers = kept_numbers(model, 64), kept_numbers(model, 64, by_layer=True)
    assert sum(stages.values()) == sum(layers.values()) == pytest.approx(saved, rel=0.01)
    assert stages.keys() == {part.name for part in complexity(model, 64).parts}
    # The stem's convolution keeps the image, its BatchNorm what the convolution put out.
    channels = model.stem.conv.out_channels
    assert layers["stem.conv"] == pytest.approx(3 * 64 * 64, rel=0.04)  # padded, where that is SAME
    assert channels * 32 * 32 <= layers["stem.norm"] <= 2 * channels * 32 * 32


@pytest.mark.parametrize("make", [EfficientNet, ResNet])
def test_layers_add_up_to_the_parts(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = make()
    layers, stages = complexity(model, 64, by_layer=True), complexity(model, 64)
    for part in stages.parts:
        own = [layer for layer in layers.parts if layer.name == part.name or layer.name.startswith(f"{part.name}.")]
        for field in ("parameters", "multiply_adds", "activations"):
            assert sum(getattr(layer, field) for layer in own) == getattr(part, field), (part.name, field)
    assert layers.parts[0].name == "stem.conv"
    assert layers.parts[0].multiply_adds == stages.parts[0].multiply_adds


def test_evaluation_takes_its_weights_and_the_widest_moment() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 2))
    weights = 4 * (8 * 27 + 4 * 8 + 512 * 2 + 2)
    # The image's batch stays, as the caller holds it; BatchNorm's input and output are alive at once.
    assert evaluation_memory(model, 8, 5) == weights + 4 * 5 * (3 * 64 + 2 * 8 * 64)
    assert evaluation_memory(model, 8, 5, activation_bytes=2) == weights + 2 * 5 * (3 * 64 + 2 * 8 * 64)


def test_quick_norms_change_no_count() -> None:
    model, images = small().train(), torch.empty(4, 3, 33, 33, device="meta")
    shapes = []
    for mode in (nullcontext(), _QuickNorms()):
        parameters = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
        for name, _ in model.named_parameters():
            parameters[name].requires_grad_()
        with mode:
            torch.func.functional_call(model, parameters, images).sum().backward()
        shapes.append([parameters[name].grad.shape for name, _ in model.named_parameters()])
    assert shapes[0] == shapes[1] == [p.shape for p in model.parameters()]
