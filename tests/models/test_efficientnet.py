import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_train.models.efficientnet import EfficientNet, MBConv
from effnet_train.models.layers import BatchNorm2d, Conv2d, Style, uniform
from effnet_train.models.scaling import Stage


def small(**arguments: Any) -> EfficientNet:
    """Return a network with a skip in every stage that can have one, in no time."""
    torch.manual_seed(0)
    return EfficientNet(**{"width": 0.25, "depth": 0.6, "num_classes": 5, **arguments})


def batch(count: int = 4, size: int = 33) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(count) + 7


def trained(model: EfficientNet, **changes: Any) -> dict[str, Tensor]:
    """Return everything that a step leaves behind."""
    images, keys = batch(**changes)
    logits = model.train()(images, keys)
    logits.square().sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"logits": logits, **gradients, **dict(model.named_buffers())}


def test_module_tree_reads_like_table_1() -> None:
    model = EfficientNet()
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "head", "classifier"]
    rows = [tuple(row) for row in model.table()]
    assert rows == [  # Source: Table 1 of the paper.
        ("Conv3x3", 3, 224, 32, 1),
        ("MBConv1", 3, 112, 16, 1),
        ("MBConv6", 3, 112, 24, 2),
        ("MBConv6", 5, 56, 40, 2),
        ("MBConv6", 3, 28, 80, 3),
        ("MBConv6", 5, 14, 112, 3),
        ("MBConv6", 5, 14, 192, 4),
        ("MBConv6", 3, 7, 320, 1),
        ("Conv1x1 & Pooling & FC", 1, 7, 1280, 1),
    ]


@pytest.mark.parametrize("size", [1, 8, 31, 32, 45])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_features_halve_five_times_at_any_size(size: int, padding: str) -> None:
    model = small(padding=padding, resolution=size).eval()
    features = model.features(torch.randn(1, 3, size, size + 3))
    assert features.shape[2:] == (math.ceil(size / 32), math.ceil((size + 3) / 32))
    assert model.table()[-1].resolution == features.shape[2]


def test_squeeze_excite_is_as_narrow_as_the_block_s_input() -> None:
    model = EfficientNet()
    widths = [block.squeeze_excite.reduce.out_channels for block in model.blocks()]
    inputs = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192]
    assert widths == [channels // 4 for channels in inputs]
    assert not any(isinstance(m, nn.Sigmoid) for m in EfficientNet(se_ratio=0.0).modules())
    block = MBConv(Stage(3, 1, 1, 8, 8, 1), se_ratio=0.01, rate=0, style=Style())
    assert block.squeeze_excite.reduce.out_channels == 1


# --- initialisation


def test_weights_are_drawn_as_the_authors_do() -> None:
    torch.manual_seed(0)
    model = EfficientNet(num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):
            kernel = module.kernel_size[0]
            outputs = 1 if module.groups > 1 else module.out_channels
            expected = math.sqrt(2 / (kernel * kernel * outputs))
            n = module.weight.numel()
            assert module.weight.mean().abs() < 5 * expected / math.sqrt(n), name
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n)), name
            assert module.bias is None or module.bias.count_nonzero() == 0
        elif isinstance(module, BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    head = model.head.conv
    assert head.weight.abs().max() > 4 * math.sqrt(2 / head.out_channels)  # not truncated
    weight = model.classifier.weight
    assert weight.abs().max() <= 0.1
    assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.01)
    assert model.classifier.bias.count_nonzero() == 0
    assert isinstance(model.stem.norm, BatchNorm2d)
    assert (model.stem.norm.eps, model.stem.norm.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize(("kernel", "expected"), [(3, 0.471), (5, 0.283)])
def test_depthwise_fan_out_is_one_kernel(kernel: int, expected: float) -> None:
    convs = [m for m in EfficientNet().modules() if isinstance(m, Conv2d) and m.groups > 1]
    weights = torch.cat([m.weight.flatten() for m in convs if m.kernel_size[0] == kernel])
    assert weights.std().item() == pytest.approx(expected, rel=0.02)


# --- dropping


def test_drop_connect_is_linear_in_depth() -> None:
    blocks = list(EfficientNet(drop_connect=0.2).blocks())
    for i, block in enumerate(blocks):
        assert block.rate == (pytest.approx(0.2 * i / 16) if block.skip else 0)
    assert [i for i, block in enumerate(blocks) if block.skip] == [2, 4, 6, 7, 9, 10, 12, 13, 14]


def test_dropped_sample_only_skips() -> None:
    block = MBConv(Stage(3, 1, 6, 8, 8, 1), se_ratio=0.25, rate=0.5, style=Style()).train()
    x = torch.randn(4, 8, 5, 5)
    kept = block(x, torch.tensor([0.9] * 4)) - x
    y = block(x, torch.tensor([0.1, 0.9, 0.1, 0.9]))
    assert torch.equal(y[::2], x[::2])
    torch.testing.assert_close(y[1::2], (x + kept)[1::2])
    torch.testing.assert_close(kept, (block(x) - x) / 0.5)  # without numbers nothing is dropped


def test_block_without_a_skip_never_drops() -> None:
    block = MBConv(Stage(3, 2, 6, 8, 8, 1), se_ratio=0.25, rate=0.5, style=Style()).train()
    assert block.rate == 0
    assert block(torch.randn(2, 8, 6, 6), torch.zeros(2)).count_nonzero() > 0


def test_a_key_drops_the_same_in_any_batch() -> None:
    model = small(drop_connect=0.5, dropout=0.5).train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):  # which would couple the samples
            module.eval()
    images, keys = batch(16)
    logits = model(images, keys)
    order = torch.tensor([9, 3, 12])
    torch.testing.assert_close(model(images[order], keys[order]), logits[order])
    assert not torch.allclose(model(images, keys + 1), logits)


def test_every_block_and_the_classifier_drop_by_themselves() -> None:
    for arguments in ({"drop_connect": 0.9, "dropout": 0.0}, {"drop_connect": 0.0, "dropout": 0.9}):
        model = small(**arguments).train()
        images, keys = batch()
        assert not torch.allclose(model(images, keys), model(images, keys + 1000))
    model = small(drop_connect=0.0, dropout=0.0).train()
    assert torch.equal(model(images, keys), model(images, keys + 1000))


def test_every_block_has_numbers_of_its_own() -> None:
    model = small().train()
    rows = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda _block, inputs: rows.append(inputs[1]))
    images, keys = batch()
    model(images, keys)
    assert torch.equal(torch.stack(rows), uniform(keys, len(rows)))


def test_without_keys_torch_s_generator_settles_what_drops() -> None:
    model = small(drop_connect=0.8, dropout=0.5).train()
    images, _ = batch()
    torch.manual_seed(3)
    first, other = model(images), model(images)
    torch.manual_seed(3)
    assert torch.equal(model(images), first)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    model.eval()(images)
    model.train()(images, torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_drops_nothing() -> None:
    model = small(drop_connect=0.9, dropout=0.9).eval()
    images, keys = batch()
    assert torch.equal(model(images, keys), model(images))


# --- memory, precision, compilation, copies


def test_checkpointing_changes_no_bit() -> None:
    plain, recomputed = small(), small(checkpointing=True)
    for _ in range(2):
        expected, result = trained(plain), trained(recomputed)
        assert expected.keys() == result.keys()
        for name in expected:
            assert torch.equal(expected[name], result[name]), name
    assert all(m.momentum == 0.01 for m in recomputed.modules() if isinstance(m, BatchNorm2d))


def test_checkpointing_saves_less() -> None:
    saved = {}
    for checkpointing in (False, True):
        storages = {}

        def pack(tensor: Tensor, storages: dict = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            images, keys = batch(size=64)
            logits = small(checkpointing=checkpointing)(images, keys)
        saved[checkpointing] = sum(storages.values())
        del logits
    assert saved[True] < saved[False] / 3


def test_bfloat16_autocast_trains() -> None:
    exact, model = trained(small()), small()
    with torch.autocast("cpu", torch.bfloat16):
        rough = trained(model)
    assert rough["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(rough["stem.norm.running_var"], exact["stem.norm.running_var"], rtol=1e-3, atol=1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in rough.values())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_channels_last_stays_so_and_changes_nothing_else() -> None:
    model = small(dropout=0.0).train()
    images, keys = batch()
    expected = model(images, keys)
    last = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    assert last.features(images, keys).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images, keys), expected, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_are_equal() -> None:
    model = small().eval()
    images, _ = batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = small(depth=0.3)
    images, keys = batch()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled.train()(images, keys), model.train()(images, keys))
    assert torch.equal(compiled.eval()(images), model.eval()(images))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_leaves_the_same_behind(checkpointing: bool) -> None:
    plain = small(depth=0.3, drop_connect=0.8)
    model = small(depth=0.3, drop_connect=0.8, checkpointing=checkpointing)
    expected = trained(plain)
    images, keys = batch()
    logits = torch.compile(model, fullgraph=True).train()(images, keys)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"{name}.grad"], rtol=1e-2, atol=1e-2)


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution=0 must be a whole number above 0"),
        ({"resolution": 64.5}, "resolution=64.5 must be a whole number above 0"),
        ({"num_classes": 0}, "num_classes=0 must be a whole number above 0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be a rate from 0 \(off\) to below 1"),
        ({"drop_connect": -0.1}, r"drop_connect=-0.1 must be a rate from 0 \(off\) to below 1"),
        ({"se_ratio": 2}, r"se_ratio=2 must lie between 0 \(no squeeze-excite\) and 1"),
        ({"activation": "gelu"}, "activation='gelu': choose one of swish, relu6, relu"),
        ({"padding": "valid"}, "padding='valid': choose one of same, symmetric"),
        ({"width": 0}, "width=0 must be a number above 0"),
        ({"depth": -1}, "depth=-1 must be a number above 0"),
        ({"bn_momentum": 2}, "bn_momentum=2 must lie between 0 and 1"),
    ],
)
def test_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNet(**arguments)
