"""Tokens to stages and back, for any sample of the spaces that there are, and the published networks among them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from effnet_train.models.mnasnet import MNASNET_A1, MnasNet
from effnet_train.models.scaling import EFFICIENTNET_B0
from effnet_train.search.space import Space, same_network

CONFIGS = Path(__file__).parents[2] / "configs" / "space"
B0 = tuple(
    {
        "op": "separable" if stage.expand_ratio == 1 else f"mbconv{stage.expand_ratio}",
        **{"kernel": stage.kernel, "stride": stage.stride, "channels": stage.out_channels, "repeats": stage.repeats},
        "se_ratio": 0.25,
    }
    for stage in EFFICIENTNET_B0
)


def arguments(name: str) -> dict[str, Any]:
    own = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    merged = {key: value for base in own.pop("defaults", []) for key, value in arguments(base).items()}
    merged.update({key: value for key, value in own.items() if key != "_target_"})
    return merged


SPACES = {path.stem: Space(**arguments(path.stem)) for path in sorted(CONFIGS.glob("*.yaml"))}
TINY: dict[str, Any] = {
    **{"op": ["separable", "mbconv3"], "kernel": [3, 5], "se_ratio": [0, 0.25], "skip": ["none", "identity"]},
    **{"width": [0.75, 1.0, 1.25], "layers": [-1, 0, 1]},
    "blocks": [{"stride": 1, "channels": 16, "repeats": 1}, {"stride": 2, "channels": 32, "repeats": 3}],
}


@st.composite
def samples(draw: st.DrawFn) -> tuple[Space, tuple[int, ...]]:
    space = SPACES[draw(st.sampled_from(sorted(SPACES)))]
    return space, tuple(draw(st.integers(0, size - 1)) for size in space.sizes)


@given(samples())
def test_tokens_come_back_from_their_stages_and_make_a_network(sample: tuple[Space, tuple[int, ...]]) -> None:
    space, tokens = sample
    stages = space.decode(tokens)
    assert space.encode(stages) == tokens
    with torch.device("meta"):
        model = MnasNet(
            stages=stages, stem_channels=space.stem_channels, head_channels=space.head_channels, num_classes=7
        )
    rows = model.table()[1:-1]
    assert [(row.kernel, row.channels, row.layers) for row in rows] == [
        (stage["kernel"], stage["channels"], stage["repeats"]) for stage in stages
    ]
    assert model.head.conv.out_channels == space.head_channels


@given(samples(), samples())
def test_networks_are_the_same_exactly_where_their_blocks_are(
    one: tuple[Space, tuple[int, ...]], other: tuple[Space, tuple[int, ...]]
) -> None:
    keys, built = [], []
    for space, tokens in (one, other):
        stages = space.decode(tokens)
        keys.append(same_network(stages, space.stem_channels))
        with torch.device("meta"):
            blocks = list(MnasNet(stages=stages, stem_channels=space.stem_channels).blocks())
        built.append(
            [(type(b), b.skip, [(n, p.shape) for n, p in b.named_parameters()], b.shape.stride) for b in blocks]
        )
    assert (keys[0] == keys[1]) == (built[0] == built[1])


def test_skips_that_shapes_do_not_allow_make_no_other_network() -> None:
    stage = {"op": "mbconv6", "kernel": 3, "stride": 2, "channels": 24, "repeats": 1, "se_ratio": 0.0}
    keys = {skip: same_network([{**stage, "skip": skip}], 16) for skip in ("none", "identity", "pool")}
    assert keys["none"] == keys["identity"] != keys["pool"]
    deeper = {skip: same_network([{**stage, "skip": skip, "repeats": 2}], 16) for skip in ("none", "identity", "pool")}
    assert len(set(deeper.values())) == 3
    flat = {skip: same_network([{**stage, "skip": skip, "stride": 1, "channels": 16}], 16) for skip in keys}
    assert flat["identity"] == flat["pool"] != flat["none"]


@pytest.mark.parametrize(("stages", "parameters"), [(MNASNET_A1, 3_887_038), (B0, 5_288_548)], ids=["a1", "b0"])
def test_published_networks_are_points_that_come_back_exactly(stages: Any, parameters: int) -> None:
    space = SPACES["efficientnet"]
    tokens = space.encode(stages)
    found = space.decode(tokens)
    assert found == tuple({"se_ratio": 0.0, "skip": "identity", **stage} for stage in stages)
    with torch.device("meta"):
        model = MnasNet(stages=found, stem_channels=space.stem_channels, head_channels=space.head_channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("stages", [MNASNET_A1, B0], ids=["a1", "b0"])
def test_mnasnets_own_space_says_why_they_are_none_of_its_points(stages: Any) -> None:
    with pytest.raises(ValueError, match="block 5 of the space has no channels=112, only 72/96/120"):
        SPACES["mnasnet"].encode(stages)


def test_its_size_is_the_papers() -> None:
    """Per block 4 operations, 2 kernels, 2 ratios, 3 skips, 3 widths, 3 depths; fewer where rounding makes two one."""
    space = SPACES["mnasnet"]
    equal = {
        0: (2, 2),
        1: (2, 3),
        6: (3, 2),
    }  # of 16 channels and a single layer; of 24, where 0.75 is 1; of a single one
    expected = 1
    for block in range(7):
        widths, depths = equal.get(block, (3, 3))
        expected *= 4 * 2 * 2 * 3 * widths * depths
    assert space.count == expected
    assert len(space.sizes) == 7 * 6


def test_a_block_may_choose_from_lists_of_its_own_and_what_is_no_choice_takes_no_token() -> None:
    blocks = [{"stride": 1, "channels": 16, "repeats": 1, "op": ["mbconv2"], "skip": ["none"]}, *TINY["blocks"][1:]]
    space = Space(**{**TINY, "blocks": blocks})
    assert [(d.block, d.key) for d in space.decisions][:4] == [
        (0, key) for key in ("kernel", "se_ratio", "channels", "repeats")
    ]
    stages = space.decode([0] * len(space.sizes))
    assert (stages[0]["op"], stages[0]["skip"]) == ("mbconv2", "none")
    assert (stages[0]["channels"], stages[0]["repeats"]) == (16, 1)
    assert next(space.describe()) == (
        "block 1: stride 1; op mbconv2; kernel 3/5; se_ratio 0/0.25; skip none; channels 16/24; repeats 1/2"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": ["mbconv3", "mbconv"]}, "op='mbconv': choose conv, separable"),
        ({"kernel": []}, r"space.blocks\[0\]: kernel=\[\] must be a list of the values to choose from"),
        ({"width": 1.0}, r"width=1.0 must be a list of the values to choose from"),
        ({"skip": ["residual"]}, "skip='residual': choose one of identity, pool, none"),
        ({"se_ratio": [0, 1.5]}, "se_ratio=1.5 must lie between 0"),
        ({"blocks": []}, r"space.blocks=\[\] holds none"),
        ({"blocks": [{"stride": 1, "channels": 16}]}, r"space.blocks\[0\]: it lacks repeats"),
        ({"blocks": [{"stride": 1, "channels": 16, "repeats": 1, "kernels": [3]}]}, "kernels is not a key of it"),
        ({"blocks": [{"stride": 0, "channels": 16, "repeats": 1}]}, "stride=0 must be a whole number above 0"),
    ],
)
def test_a_space_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(**{**TINY, **change})


def test_a_network_of_other_stages_is_no_point() -> None:
    space = Space(**TINY)
    stages = [dict(stage) for stage in space.decode([0] * len(space.sizes))]
    with pytest.raises(ValueError, match="the space has 2 blocks, and the network 1 stages"):
        space.encode(stages[:1])
    stages[1]["stride"] = 1
    with pytest.raises(ValueError, match="block 2 of the space has no stride=1, only 2"):
        space.encode(stages)
