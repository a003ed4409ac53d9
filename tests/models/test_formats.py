"""Weights in other libraries' names: the same logits as the libraries themselves, both ways, or a refusal."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.formats import (
    FORMATS,
    from_ours,
    is_gated,
    nearest,
    num_classes,
    recognise,
    skeleton,
    state_dict_of,
    to_ours,
)

Randomise = Callable[..., nn.Module]
Variants = dict[str, dict[str, Any]]

TOLERANCE = 1e-4  # of the largest logit
FEW = [
    *[(library, variant) for library in ("timm_tf", "timm", "torchvision", "lukemelas") for variant in ("b0", "b2")],
    *[(library, "lite0") for library in ("timm_tf", "timm", "lite")],
    *[("geffnet_tf", "b0"), ("geffnet", "b0"), ("geffnet_tf", "lite0")],
]
B, LITE = [f"b{number}" for number in range(8)], [f"lite{number}" for number in range(5)]
ALL = [
    *[(library, variant) for library in ("timm_tf", "timm", "geffnet_tf") for variant in (*B, *LITE)],
    *[("torchvision" if variant < "b5" else "torchvision_large", variant) for variant in B],
    *[("lukemelas", variant) for variant in B],
    *[("lite", variant) for variant in LITE],
]


def ours(config: dict[str, Any], **arguments: Any) -> EfficientNet:
    return EfficientNet(**{key: value for key, value in {**config, **arguments}.items() if key != "_target_"}).eval()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two networks' logits, relative to the largest logit; even and odd sizes."""
    worst = 0.0
    with torch.no_grad():
        for x in (images(64, 80), images(65, 47)):
            found, expected = (network(x.to(next(network.parameters()).dtype)).double() for network in (one, other))
            assert expected.std(0).mean() > 0.05 * expected.std()  # the logits depend on the image
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def assert_alike(mine: nn.Module, theirs: nn.Module) -> None:
    """Assert that logits agree within TOLERANCE in float32, and to a billionth in float64.

    A deep network of random weights may multiply rounding errors beyond that: then by no more than the other library's
    own logits in float32 are away from its own in float64.
    """
    exact_mine, exact_theirs = copy.deepcopy(mine).double(), copy.deepcopy(theirs).double()
    assert difference(exact_mine, exact_theirs) < 1e-9
    assert difference(mine, theirs) < max(TOLERANCE, 2 * difference(theirs, exact_theirs))


def assert_parity(library: Any, variant: str, variants: Variants, randomise: Randomise) -> None:
    theirs = randomise(library.build(variant))
    state = theirs.state_dict()
    assert recognise(state) == library.fmt
    assert num_classes(state, library.fmt) == 1000
    assert nearest(state, library.fmt, variants) == variant
    assert is_gated(state, library.fmt) == variant.startswith("b")
    converted = to_ours(state, library.fmt, skeleton(variants[variant], 1000))
    mine = ours(variants[variant], **library.settings)
    mine.load_state_dict(converted)
    assert_alike(mine, theirs)

    # And out of our names again, into a network that held something else.
    randomise(mine, seed=1)
    assert difference(mine, theirs) > 100 * TOLERANCE
    theirs.load_state_dict(from_ours(mine.state_dict(), library.fmt), strict=True)
    assert_alike(mine, theirs)


@pytest.mark.parametrize(("library", "variant"), FEW)
def test_the_logits_are_the_librarys(
    libraries: dict[str, Any], variants: Variants, randomise: Randomise, library: str, variant: str
) -> None:
    assert_parity(libraries[library], variant, variants, randomise)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "variant"), ALL)
def test_the_logits_are_the_librarys_for_every_variant(
    libraries: dict[str, Any], variants: Variants, randomise: Randomise, library: str, variant: str
) -> None:
    assert_parity(libraries[library], variant, variants, randomise)


@pytest.fixture(scope="module")
def timm_b0(libraries: dict[str, Any], randomise: Randomise) -> nn.Module:
    return randomise(libraries["timm_tf"].build("b0"))


@pytest.mark.parametrize(
    "slip",
    [
        {"padding": "symmetric"},
        {"bn_eps": 1e-5},
        {"activation": "relu6"},
        {"order of the classes": True},
        {"order of SE's biases": True},
    ],
    ids=lambda slip: next(iter(slip)),
)
def test_a_slip_is_not_within_the_tolerance(timm_b0: nn.Module, variants: Variants, slip: dict[str, Any]) -> None:
    state = to_ours(timm_b0.state_dict(), "timm", skeleton(variants["b0"], 1000))
    arguments = {key: value for key, value in slip.items() if " " not in key}
    if "order of the classes" in slip:
        state |= {name: state[name].roll(1, 0) for name in ("classifier.weight", "classifier.bias")}
    if "order of SE's biases" in slip:
        name = "stages.3.1.squeeze_excite.expand.bias"
        state[name] = state[name].flip(0)
    mine = ours(variants["b0"], **arguments)
    mine.load_state_dict(state)
    assert difference(mine, timm_b0) > 2 * TOLERANCE


def test_another_width_of_squeeze_excite_is_refused(timm_b0: nn.Module, variants: Variants) -> None:
    like = skeleton({**variants["b0"], "se_ratio": 0.5}, 1000)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.0\.se\.conv_reduce\.weight is \(8, 32, 1, 1\), not \(16, 32, 1, 1\)"
    ):
        to_ours(timm_b0.state_dict(), "timm", like)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("variant", ["b1", "lite1"])
def test_there_and_back_is_the_same_to_the_bit(
    variants: Variants, randomise: Randomise, fmt: str, variant: str
) -> None:
    state = randomise(ours(variants[variant], num_classes=7)).state_dict()
    if fmt == "torchvision" and variant == "lite1":
        with pytest.raises(ValueError, match=r"torchvision has no EfficientNet without squeeze-excite \(Lite\)"):
            from_ours(state, fmt)
        return
    theirs = from_ours(state, fmt)
    assert (set(theirs) == set(state)) == (fmt == "effnet_train")
    again = to_ours(theirs, fmt, skeleton(variants[variant], 7))
    assert list(again) == list(state)
    assert all(again[name].dtype == tensor.dtype and again[name].equal(tensor) for name, tensor in state.items())


def test_counters_of_batches_may_be_absent_and_become_0(timm_b0: nn.Module, variants: Variants) -> None:
    like = skeleton(variants["b0"], 1000)
    counted = {name: t + 7 if name.endswith("tracked") else t for name, t in timm_b0.state_dict().items()}
    without = {name: t for name, t in counted.items() if not name.endswith("tracked")}
    assert len(without) < len(counted)
    for state in (counted, without):
        found = to_ours(state, "timm", like)
        assert found.keys() == like.keys()
        counters = [t for name, t in found.items() if name.endswith("num_batches_tracked")]
        assert counters
        assert all(counter.item() == 0 and counter.dtype == torch.int64 for counter in counters)


def test_half_precision_becomes_ours(timm_b0: nn.Module, variants: Variants) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in timm_b0.state_dict().items()}
    found = to_ours(halves, "timm", skeleton(variants["b0"], 1000))
    assert found["stem.conv.weight"].dtype == torch.float32
    assert found["stem.conv.weight"].equal(halves["conv_stem.weight"].float())


def test_what_differs_is_listed_by_its_own_names(libraries: dict[str, Any], variants: Variants) -> None:
    like = skeleton(variants["b0"], 1000)
    state = libraries["torchvision"].build("b0").state_dict()
    del state["features.2.0.block.1.1.running_var"]
    state["features.3.0.block.2.fc1.bias"] = torch.zeros(9)
    state["features.8.1.weight"] = state["features.8.1.weight"].to(torch.int8)
    state["features.9.0.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="4 tensors differ") as refused:
        to_ours(state, "torchvision", like)
    for text in (
        "features.2.0.block.1.1.running_var is missing",
        "features.3.0.block.2.fc1.bias is (9,), not (6,)",
        "features.8.1.weight is int8, not a floating-point number",
        "features.9.0.weight is not part of it",
    ):
        assert text in str(refused.value)
    with pytest.raises(ValueError, match=r"^311 tensors differ: .*; and 291 more$") as refused:
        to_ours({}, "torchvision", like)
    assert str(refused.value).count(" is missing") == 20


def test_other_networks_are_not_recognised() -> None:
    with pytest.raises(ValueError, match=r"names \(conv1\.weight, bn1\.weight, .*not those of an EfficientNet of"):
        recognise(dict.fromkeys(("conv1.weight", "bn1.weight", "fc.weight"), torch.zeros(1)))
    with pytest.raises(ValueError, match="none at all"):
        recognise({})


STATE = {"conv_stem.weight": torch.zeros(2), "bn1.bias": torch.ones(3)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("payload", "which", "expected"),
    [
        (STATE, "ema", STATE),
        ({f"module.{name}": tensor for name, tensor in STATE.items()}, "ema", STATE),
        ({f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}, "raw", STATE),
        ({"state_dict": STATE, "epoch": 3}, "ema", STATE),
        ({"state_dict": STATE, "state_dict_ema": OTHER}, "ema", OTHER),
        ({"state_dict": STATE, "state_dict_ema": OTHER}, "raw", STATE),
        ({"model": STATE, "model_ema": {"n_averaged": torch.tensor(4), **OTHER}, "args": None}, "ema", OTHER),
        ({"model": STATE, "model_ema": OTHER}, "raw", STATE),
        ({"model": {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}}}, "ema", STATE),
    ],
)
def test_what_scripts_put_around_a_state_dict_is_taken_off(payload: Any, which: str, expected: dict) -> None:
    found = state_dict_of(payload, which)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_averages_are_not_the_raw_weights() -> None:
    with pytest.raises(ValueError, match=r"weights=raw: it holds averages only \(state_dict_ema\): use weights=ema"):
        state_dict_of({"state_dict_ema": OTHER}, "raw")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1, 2], "it holds a list, not a state dict"),
        ({}, "it holds no state dict: nothing where tensors should be"),
        ({"epoch": 3, "conv_stem.weight": torch.zeros(1)}, "it holds no state dict: epoch where tensors should be"),
        ({**STATE, "module.bn1.bias": torch.zeros(3)}, "the same tensors twice"),
    ],
)
def test_what_is_no_state_dict_is_refused(payload: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_dict_of(payload, "ema")
