"""MobileNets and ResNets: the same function of the same weights as timm's and torchvision's, scaled as the paper's."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from effnet_train.models.layers import MaxPool2d, frozen_statistics
from effnet_train.models.mobilenet import MobileNetV1, MobileNetV2
from effnet_train.models.network import Network
from effnet_train.models.resnet import Bottleneck, ResNet

Randomise = Callable[..., nn.Module]
TORCH = {"padding": "symmetric", "bn_eps": 1e-5, "bn_momentum": 0.1}
PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Network]]] = {
    "timm-mobilenetv1_100": (
        lambda: timm.create_model("mobilenetv1_100"),
        lambda: MobileNetV1(dropout=0.0, **TORCH),
    ),
    "torchvision-mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(dropout=0.0),
        lambda: MobileNetV2(dropout=0.0, **TORCH),
    ),
    "timm-mobilenetv2_140": (
        lambda: timm.create_model("mobilenetv2_140"),
        lambda: MobileNetV2(dropout=0.0, width=1.4, **TORCH),
    ),
    "torchvision-resnet50": (torchvision.models.resnet50, ResNet),
    "torchvision-resnet152": (torchvision.models.resnet152, lambda: ResNet(layers=152)),
    "timm-resnet50": (lambda: timm.create_model("resnet50"), ResNet),
}

REPEATED = ("timm-mobilenetv2_140", "timm-resnet50")  # of what another library's network shows


def copied(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy a state whose tensors come in the same order under other names."""
    pairs = list(zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True))
    for (name, mine), (other, value) in pairs:
        assert mine.shape == value.shape, (name, other)
    ours.load_state_dict({name: value for (name, _), (_, value) in pairs})


def images(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in REPEATED else []) for name in PAIRS]
)
def test_logits_gradients_and_parameters_are_theirs(randomise: Randomise, name: str) -> None:
    build, make = PAIRS[name]
    theirs, ours = build().double(), make().double()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    randomise(theirs)
    copied(theirs, ours)
    with torch.no_grad():
        for x in (images(1, 3, 64, 64), images(1, 3, 65, 47)):
            expected = theirs.eval()(x)
            assert expected.std() > 0.05  # logits that differ
            torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-9, atol=1e-9)
    x, labels = images(3, 3, 64, 64), torch.arange(3)
    logits = [model.train()(x) for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)
    for each in logits:
        nn.functional.cross_entropy(each, labels).backward()
    for (own, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9, msg=lambda text, own=own: own + text)


def test_the_first_version_of_resnet_has_its_strides_before(randomise: Randomise) -> None:
    theirs, ours = torchvision.models.resnet50().double(), ResNet(stride_at="1x1").double()
    for block in theirs.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    randomise(theirs)
    copied(theirs, ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images(1, 3, 65, 64)), theirs(images(1, 3, 65, 64)))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 2)])
def test_maxima_are_padded_as_convolutions_are(size: tuple[int, int]) -> None:
    x = -1 - torch.rand(1, 2, *size)  # below 0, so that zeros in the padding would win
    for padding, before in (("same", [(s + 1) % 2 == 0 and s > 1 for s in size]), ("symmetric", [True, True])):
        y = MaxPool2d(kernel=3, stride=2, padding=padding)(x)
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                starts = [2 * place - int(one) for place, one in zip((i, j), before, strict=True)]
                rows, columns = (slice(max(start, 0), start + 3) for start in starts)
                assert torch.equal(y[0, :, i, j], x[0, :, rows, columns].amax((1, 2)))
        assert y.shape[2:] == tuple(-(-s // 2) for s in size)


SMALL: dict[str, Callable[..., Network]] = {
    "v1": lambda **given: MobileNetV1(width=0.25, **{"num_classes": 5, **given}),
    "v2": lambda **given: MobileNetV2(width=0.25, **{"num_classes": 5, **given}),
    "resnet": lambda **given: ResNet(width=0.125, **{"last_gamma": 1.0, "num_classes": 5, **given}),
    "resnet-same": lambda **given: ResNet(
        width=0.125, depth=0.5, padding="same", stride_at="1x1", **{"num_classes": 5, **given}
    ),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [1, 31, 64])
def test_features_have_the_tables_last_size(name: str, size: int) -> None:
    model = SMALL[name](resolution=size).eval()
    features = model.features(torch.randn(1, 3, size, size))
    assert features.shape == (1, model.classifier.in_features, -(-size // 32), -(-size // 32))
    assert model.table()[-1].resolution == features.shape[2]


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_bit(name: str) -> None:
    left = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SMALL[name](checkpointing=checkpointing, dropout=0.3, drop_connect=0.3).train()
        logits = model(torch.ones(4, 3, 33, 33).cumsum(0).cumsum(3).sin(), torch.arange(4) + 7)
        logits.square().sum().backward()
        left.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    for plain, recomputed in zip(*left, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_block_begins_as_its_shortcut(gamma: float) -> None:
    block = list(SMALL["resnet"](last_gamma=gamma).eval().blocks())[-1]
    x = torch.randn(2, block.shape.in_channels, 5, 5)
    assert torch.equal(block(x), x.relu()) == (gamma == 0)


def test_a_dropped_sample_takes_the_shortcut() -> None:
    model = SMALL["resnet"](drop_connect=0.5).train()
    block = list(model.blocks())[-1]
    assert isinstance(block, Bottleneck)
    assert block.rate == pytest.approx(0.5 * 15 / 16)
    x = torch.randn(4, block.shape.in_channels, 5, 5)
    with frozen_statistics(block):
        y = block(x, torch.tensor([0.0, 0.99, 0.0, 0.99]))
    assert torch.equal(y[::2], x[::2].relu())
    assert not torch.allclose(y[1::2], x[1::2].relu())


@pytest.mark.parametrize(
    ("make", "repeats"),
    [
        (lambda: ResNet(depth=4), [12, 16, 24, 12]),
        (lambda: ResNet(layers=152), [3, 8, 36, 3]),
        (MobileNetV1, [1, 2, 2, 6, 2]),
        (lambda: MobileNetV1(depth=1.4), [2, 3, 3, 9, 3]),
        (lambda: MobileNetV2(depth=4), [4, 8, 12, 16, 12, 12, 4]),
    ],
)
def test_every_stage_deepens(make: Callable[[], Network], repeats: list[int]) -> None:
    with torch.device("meta"):
        model = make()
    rows = [row for row in model.table() if not row.operator.startswith(("Conv", "MaxPool", "Pooling"))]
    assert [row.layers for row in rows] == repeats
    assert [len(stage) for stage in model.stages.children()] == repeats


def test_resnets_table() -> None:
    with torch.device("meta"):
        rows = [tuple(row) for row in ResNet().table()]
    assert rows == [  # Source: Table 1 of its paper, with sizes of the input as in EfficientNet's.
        ("Conv7x7", 7, 224, 64, 1),
        ("MaxPool", 3, 112, 64, 1),
        ("Bottleneck", 3, 56, 256, 3),
        ("Bottleneck", 3, 56, 512, 4),
        ("Bottleneck", 3, 28, 1024, 6),
        ("Bottleneck", 3, 14, 2048, 3),
        ("Pooling & FC", 1, 7, 2048, 1),
    ]


def test_everything_widens_but_a_narrow_mobilenet_v2s_head() -> None:
    with torch.device("meta"):
        wide, narrow = MobileNetV2(width=2.0), MobileNetV2(width=0.5)
        resnet = ResNet(width=1.2)
    assert (wide.stem.conv.out_channels, wide.classifier.in_features) == (64, 2560)
    assert (narrow.stem.conv.out_channels, narrow.classifier.in_features) == (16, 1280)
    channels = {conv.out_channels for conv in resnet.modules() if isinstance(conv, nn.Conv2d)}
    assert all(count % 8 == 0 for count in channels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(layers=34), "layers=34: choose one of 50, 101, 152"),
        (lambda: ResNet(stride_at="5x5"), "stride_at='5x5': choose one of 1x1, 3x3"),
        (lambda: MobileNetV1(dropout=1.0), r"dropout=1.0 must be a rate from 0 \(off\) to below 1"),
        (lambda: MobileNetV2(width=0), "width=0 must be a number above 0"),
        (lambda: ResNet(padding="valid"), "padding='valid': choose one of same, symmetric"),
        (lambda: MobileNetV2(activation="gelu"), "activation='gelu': choose one of swish, relu6, relu"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
