import csv
from itertools import pairwise
from pathlib import Path

import pytest

from effnet_train.models.scaling import EFFICIENTNET_B0, Stage, compound, round_channels, round_repeats, scale

GOLDEN = Path(__file__).parents[1] / "golden"


def variants(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open() as file:
        return list(csv.DictReader(file))


def as_text(stages: tuple[Stage, ...]) -> str:
    return "-".join(str(stage.repeats) for stage in stages)


@pytest.mark.parametrize("row", variants("efficientnet_variants.csv"), ids=lambda row: row["variant"])
def test_scale_gives_every_variant_from_b0(row: dict[str, str]) -> None:
    stages = scale(EFFICIENTNET_B0, float(row["width"]), float(row["depth"]))
    assert as_text(stages) == row["repeats"]
    assert sum(stage.repeats for stage in stages) == int(row["blocks"])
    assert stages[0].in_channels == int(row["stem_channels"])
    assert round_channels(1280, float(row["width"])) == int(row["head_channels"])


@pytest.mark.parametrize("row", variants("lite_variants.csv"), ids=lambda row: row["variant"])
def test_fixed_ends_give_every_lite_variant(row: dict[str, str]) -> None:
    stages = scale(EFFICIENTNET_B0, float(row["width"]), float(row["depth"]), fixed_ends=True)
    assert as_text(stages) == row["repeats"]
    assert stages[0].in_channels == 32


def test_published_channels_of_b7() -> None:
    # Source: the authors' efficientnet-b7 checkpoint.
    stages = scale(EFFICIENTNET_B0, 2.0, 3.1)
    assert [stage.out_channels for stage in stages] == [32, 48, 80, 160, 224, 384, 640]


def test_stages_join() -> None:
    stages = scale(EFFICIENTNET_B0, 1.37, 1.7)
    assert all(a.out_channels == b.in_channels for a, b in pairwise(stages))


def test_scaling_by_one_changes_nothing() -> None:
    assert scale(EFFICIENTNET_B0, 1, 1) == EFFICIENTNET_B0


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.1, 32), (32, 1.2, 40), (24, 1.1, 24), (24, 1.4, 32), (16, 0.1, 8), (20, 0.5, 16), (40, 0.3, 16)],
)
def test_round_channels(channels: int, width: float, expected: int) -> None:
    # 20 * 0.5 = 10 would round to 8, a loss of a fifth: 16. 40 * 0.3 = 12 lies between 8 and 16.
    assert round_channels(channels, width) == expected


def test_round_channels_takes_another_divisor() -> None:
    assert round_channels(30, 1.0, divisor=4) == 32


def test_round_repeats_rounds_up() -> None:
    assert [round_repeats(3, depth) for depth in (0.1, 1.0, 1.1, 2.0)] == [1, 3, 4, 6]


def test_only_the_first_block_of_a_stage_has_stride_and_new_channels() -> None:
    blocks = Stage(kernel=5, stride=2, expand_ratio=6, in_channels=24, out_channels=40, repeats=3).blocks
    assert [(b.stride, b.in_channels, b.out_channels, b.repeats) for b in blocks] == [
        (2, 24, 40, 1),
        (1, 40, 40, 1),
        (1, 40, 40, 1),
    ]


def test_compound_follows_equation_3() -> None:
    assert compound(0) == (1, 1, 1)
    assert compound(2) == pytest.approx((1.44, 1.21, 1.3225))
    depth, width, resolution = compound(1)
    assert depth * width**2 * resolution**2 == pytest.approx(2, rel=0.05)  # the paper's budget


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale(EFFICIENTNET_B0, 0, 1), "width=0 must be a number above 0"),
        (lambda: scale(EFFICIENTNET_B0, 1, -1), "depth=-1 must be a number above 0"),
        (lambda: scale(EFFICIENTNET_B0, float("nan"), 1), "width=nan must be a number above 0"),
        (lambda: scale(EFFICIENTNET_B0, 1, float("inf")), "depth=inf must be a number above 0"),
        (lambda: round_channels(8, 1, divisor=0), "divisor=0 must be a number above 0"),
        (lambda: compound(1, beta=0.9), "beta=0.9: a scaling coefficient is at least 1"),
    ],
)
def test_bad_scale_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
