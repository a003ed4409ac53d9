"""Tokens to stages and back, for any sample of the spaces that there are, and the published networks among them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_train.models.mnasnet import MNASNET_A1, MnasNet
from effnet_train.models.network import SKIPS
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


@settings(deadline=None)
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


# Values that come to the same: a separable convolution and an expansion of 1, ratios of few channels, narrow networks.
AMBIGUOUS = Space(
    **{
        **TINY,
        **{
            "op": ["separable", "mbconv1", "mbconv2"],
            "se_ratio": [0, 0.125, 0.15],
            "skip": ["none", "identity", "pool"],
        },
        "blocks": [{"stride": 1, "channels": 16, "repeats": 1}, {"stride": 2, "channels": 16, "repeats": 1}],
    }
)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Space, tuple[int, ...], tuple[int, ...]]:
    """Draw two candidates that differ in three tokens at most: those that differ everywhere are never the same."""
    space = draw(st.sampled_from([AMBIGUOUS, *SPACES.values()]))
    one = [draw(st.integers(0, size - 1)) for size in space.sizes]
    other = list(one)
    for place in draw(st.lists(st.integers(0, len(one) - 1), max_size=3)):
        other[place] = draw(st.integers(0, space.sizes[place] - 1))
    return space, tuple(one), tuple(other)


@settings(deadline=None)
@given(neighbours(), st.sampled_from([0.25, 0.5, 1.0]))
def test_networks_are_the_same_exactly_where_their_blocks_are(
    pair: tuple[Space, tuple[int, ...], tuple[int, ...]], scaled: float
) -> None:
    space, *candidates = pair
    keys, built = [], []
    for tokens in candidates:
        stages = space.decode(tokens)
        keys.append(same_network(stages, space.stem_channels, width=scaled, depth=scaled))
        with torch.device("meta"):
            model = MnasNet(stages=stages, stem_channels=space.stem_channels, width=scaled, depth=scaled)
        built.append(
            [(type(b), b.skip, [(n, p.shape) for n, p in b.named_parameters()], b.shape.stride) for b in model.blocks()]
        )
    assert (keys[0] == keys[1]) == (built[0] == built[1])


@pytest.mark.parametrize(
    ("change", "other", "scaled"),
    [
        ({"op": "separable"}, {"op": "mbconv1"}, 1.0),
        ({"se_ratio": 0.125}, {"se_ratio": 0.15}, 1.0),
        ({"channels": 8}, {"channels": 16}, 0.25),
        ({"repeats": 1}, {"repeats": 2}, 0.5),
    ],
)
def test_values_that_come_to_the_same_make_no_other_network(
    change: dict[str, Any], other: dict[str, Any], scaled: float
) -> None:
    stage = {"op": "mbconv6", "kernel": 3, "stride": 2, "channels": 24, "repeats": 1, "se_ratio": 0.0, "skip": "none"}
    one, same = (same_network([{**stage, **own}], 16, width=scaled, depth=scaled) for own in (change, other))
    assert one == same
    assert same_network([{**stage, **change, "kernel": 5}], 16, width=scaled, depth=scaled) != one


def test_a_skip_that_scaled_shapes_allow_makes_another_network() -> None:
    stage = {"op": "mbconv6", "kernel": 3, "stride": 1, "channels": 24, "repeats": 1}
    keys = {skip: [same_network([{**stage, "skip": skip}], 16, width=w) for w in (1, 0.25)] for skip in SKIPS}
    assert keys["none"][0] == keys["identity"][0]
    assert keys["none"][1] != keys["identity"][1] == keys["pool"][1]


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
        ({"kernel": []}, r"space.blocks\[0\]: kernel=\[\] must be a list of whole numbers to choose from"),
        ({"kernel": [[3]]}, r"kernel=\[\[3\]\] must be a list of whole numbers"),
        ({"width": 1.0}, r"width=1.0 must be a list of numbers to choose from"),
        ({"width": ["wide"]}, r"width=\['wide'\] must be a list of numbers to choose from"),
        ({"width": [0]}, r"space.blocks\[0\]: width=0 must be a number above 0"),
        ({"layers": ["1"]}, r"layers=\['1'\] must be a list of whole numbers"),
        ({"layers": [True]}, r"layers=\[True\] must be a list of whole numbers"),
        ({"se_ratio": [None]}, r"se_ratio=\[None\] must be a list of numbers"),
        ({"skip": [None]}, r"skip=\[None\] must be a list of words"),
        ({"skip": ["residual"]}, "skip='residual': choose one of identity, pool, none"),
        ({"se_ratio": [0, 1.5]}, "se_ratio=1.5 must lie between 0"),
        ({"blocks": []}, r"space.blocks=\[\] holds none"),
        ({"blocks": {"first": {}}}, r"space.blocks={'first': {}} holds none: give a list"),
        ({"blocks": [16]}, r"space.blocks\[0\]: 16 is no stage: give stride, channels, repeats"),
        ({"blocks": [{"stride": 1, "channels": "16", "repeats": 1}]}, "channels=16 must be a whole number above 0"),
        ({"blocks": [{"stride": 1, "channels": 16, "repeats": 0}]}, "repeats=0 must be a whole number above 0"),
        ({"stem_channels": 20}, "space.stem_channels=20 must be a multiple of 8, to which scaling rounds"),
        ({"head_channels": 0}, "space.head_channels=0 must be a multiple of 8"),
        (
            {**{key: TINY[key][:1] for key in ("op", "kernel", "se_ratio", "skip")}, "width": [1], "layers": [0]},
            "space holds a single network: give lists of several values to choose from",
        ),
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
