import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from effnet_train.analysis.complexity import Cost, complexity, training_memory
from effnet_train.models.efficientnet import EfficientNet


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


def test_memory_is_what_a_real_step_keeps_and_little_more() -> None:
    model = small().train()
    saved = saved_bytes(model, torch.randn(8, 3, 64, 64))
    weights = sum(p.nbytes for p in model.parameters()) * 5
    estimate = training_memory(model, 64, 8) - weights
    assert saved < estimate < 1.25 * saved


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
