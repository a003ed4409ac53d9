"""MnasNet: timm's MnasNet-A1 and our EfficientNet-B0 from their stages; what else a search may put there."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.mnasnet import MNASNET_A1, MnasNet
from effnet_train.models.scaling import EFFICIENTNET_B0

B0 = tuple(
    {
        "op": "separable" if stage.expand_ratio == 1 else f"mbconv{stage.expand_ratio}",
        **{"kernel": stage.kernel, "stride": stage.stride, "channels": stage.out_channels, "repeats": stage.repeats},
        "se_ratio": 0.25,
    }
    for stage in EFFICIENTNET_B0
)
STAGE: dict[str, Any] = {"op": "mbconv3", "kernel": 3, "stride": 2, "channels": 24, "repeats": 2}


def images(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a1_is_timms(randomise: Callable[..., nn.Module]) -> None:
    theirs = timm.create_model("semnasnet_100").double()
    ours = MnasNet(padding="symmetric", bn_eps=1e-5, dropout=0.0).double()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 3_887_038
    randomise(theirs)
    pairs = list(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(dict(pairs))
    with torch.no_grad():
        for x in (images(1, 3, 64, 64), images(1, 3, 65, 47)):
            expected = theirs.eval()(x)
            assert expected.std() > 0.05
            torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_b0_from_its_stages_is_b0(randomise: Callable[..., nn.Module]) -> None:
    b0 = randomise(EfficientNet().double()).eval()
    same = MnasNet(stages=B0, activation="swish", dropout=0.2, drop_connect=0.2).double().eval()
    assert sum(p.numel() for p in same.parameters()) == 5_288_548
    same.load_state_dict(b0.state_dict())
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(same(x), b0(x))
    assert [block.rate for block in same.blocks()] == [block.rate for block in b0.blocks()]
    assert same.table() == b0.table()


def test_b0_from_its_stages_scales_as_b0_does() -> None:
    with torch.device("meta"):
        one, other = EfficientNet(width=1.4, depth=1.8), MnasNet(stages=B0, width=1.4, depth=1.8)
    assert [(name, value.shape) for name, value in one.state_dict().items()] == [
        (name, value.shape) for name, value in other.state_dict().items()
    ]


@pytest.mark.parametrize("op", ["conv", "separable", "mbconv6"])
@pytest.mark.parametrize("skip", ["none", "identity", "pool"])
def test_a_stages_blocks_have_the_skips_asked_for(op: str, skip: str) -> None:
    """With the transformation made 0, what comes out is the shortcut."""
    stages = [{**STAGE, "op": op, "skip": skip, "channels": 48, "repeats": 2}]
    model = MnasNet(stages=stages, stem_channels=32).eval()
    first, second = model.blocks()
    for block in (first, second):
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        nn.init.zeros_(norms[-1].weight)
    x, y = torch.randn(2, 32, 7, 10), torch.randn(2, 48, 4, 5)
    with torch.no_grad():
        pooled = F.pad(F.avg_pool2d(F.pad(x, (0, 0, 0, 1), mode="replicate"), 2), (0, 0, 0, 0, 0, 16))
        torch.testing.assert_close(first(x), pooled if skip == "pool" else torch.zeros(2, 48, 4, 5))
        torch.testing.assert_close(second(y), y if skip != "none" else torch.zeros_like(y))
    assert (first.skip, second.skip) == (skip == "pool", skip != "none")


def test_a_pooled_skip_leaves_channels_out_where_there_are_fewer() -> None:
    block = next(MnasNet(stages=[{**STAGE, "channels": 16, "stride": 1, "skip": "pool"}]).eval().blocks())
    nn.init.zeros_(block.project.norm.weight)
    x = torch.randn(1, 32, 5, 5)
    torch.testing.assert_close(block(x), x[:, :16])


def test_regular_convolutions_and_gates_have_the_parameters_they_should() -> None:
    with torch.device("meta"):
        one = MnasNet(stages=[{**STAGE, "op": "conv", "kernel": 5, "se_ratio": 0.25}], num_classes=10)
    own = sum(p.numel() for p in one.stages.parameters())
    gates = sum(2 * 24 * width + width + 24 for width in (8, 6))  # a quarter of the block's input
    assert own == 25 * 32 * 24 + 2 * 24 + 25 * 24 * 24 + 2 * 24 + gates


@pytest.mark.parametrize("change", [{}, {"skip": "pool"}, {"op": "conv", "se_ratio": 0.25}])
def test_checkpointing_changes_no_bit(change: dict[str, Any]) -> None:
    left = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        stages = [{**STAGE, **change}, {**STAGE, "channels": 40, **change}]
        model = MnasNet(stages=stages, checkpointing=checkpointing, dropout=0.3, drop_connect=0.3, num_classes=5)
        logits = model.train()(torch.ones(4, 3, 33, 33).cumsum(0).cumsum(3).sin(), torch.arange(4) + 7)
        logits.square().sum().backward()
        left.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    for plain, recomputed in zip(*left, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"op": "mbconv"},
            r"stages\[1\]: op='mbconv': choose conv, separable, or mbconv and its expansion, as mbconv6",
        ),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"kernel": 0}, r"stages\[1\]: kernel=0 must be a whole number above 0"),
        ({"repeats": True}, "repeats=True must be a whole number above 0"),
        ({"channels": 20}, "channels=20 must be a multiple of 8, to which scaling rounds"),
        ({"se_ratio": 2}, r"se_ratio=2 must lie between 0 \(no squeeze-excite\) and 1"),
        ({"skip": "residual"}, "skip='residual': choose one of identity, pool, none"),
        ({"kernal": 3}, r"stages\[1\]: holds kernal, which is not known: its keys are op, kernel, stride"),
    ],
)
def test_stages_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MnasNet(stages=[*MNASNET_A1[:1], {**STAGE, **change}])


def test_a_stage_that_lacks_something_and_no_stage_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stages\[0\]: lacks stride, channels: its keys are"):
        MnasNet(stages=[{"op": "conv", "kernel": 3, "repeats": 1}])
    with pytest.raises(ValueError, match=r"stages=\[\] holds none"):
        MnasNet(stages=[])
