"""Multiply-adds of every network of the paper's Tables 2, 3 and 7 that is built here, held against the paper."""

from functools import cache

import pytest
import torch
import yaml
from hydra.utils import instantiate

from effnet_train.analysis.complexity import complexity
from effnet_train.cli.app import CONFIG_DIR
from effnet_train.cli.build import model_variants

# Model, depth, width, pixels, the paper's billions. Table 2 has B0 to B7 too: see test_configs.py.
WITHIN = [
    ("resnet50", 1, 1, 224, 4.1),  # Table 2
    ("resnet152", 1, 1, 224, 11),
    ("mobilenet_v1", 1, 1, 224, 0.6),  # Table 3
    ("mobilenet_v1", 1, 2, 224, 2.2),
    ("mobilenet_v1", 1, 1, 448, 2.2),
    ("mobilenet_v2", 1, 1, 224, 0.3),
    ("mobilenet_v2", 4, 1, 224, 1.2),
    ("mobilenet_v2", 1, 2, 224, 1.1),
    ("mobilenet_v2", 1, 1, 448, 1.2),
    ("resnet50", 1, 1, 448, 16.4),
    # Of these two compound rows the paper prints no factors: these are those of our configs/tables/table3.yaml.
    ("mobilenet_v2", 1.4, 1.2, 288, 1.3),
    ("resnet50", 1.4, 1.2, 291, 16.7),
    ("b0", 1, 1, 224, 0.4),  # Table 7
    ("b0", 1.4, 1.2, 291, 1.8),
]
# The same, and what is counted here.
MISSED = [
    # Table 3. 1.3 x 224 = 291 pixels make maps of 146, 73, 37, 19 and 10, and 288 of 144, 72, 36, 18 and 9: the last
    # two stages, where MobileNetV1 spends most, cost the more for it.
    ("mobilenet_v1", 1.4, 1.2, 291, 2.3, 2.470),
    # Each is within 1 % of what the paper prints for the other one.
    ("resnet50", 4, 1, 224, 16.2, 14.571),
    ("resnet50", 1, 2, 224, 14.7, 16.117),
    ("b0", 4, 1, 224, 1.8, 1.575),  # Table 7: B0 costs 0.386, and four times that are 1.54
    ("b0", 1, 2, 224, 1.8, 1.450),
    ("b0", 1, 1, 448, 1.9, 1.538),
]
# In no table, but in docs/deviations.md, to say why rows miss the paper: what is counted.
NAMED = [
    ("mobilenet_v1", 1.4, 1.2, 288, 2.24),
    ("mobilenet_v2", 1.4, 1.2, 291, 1.442),
    ("resnet50", 1.4, 1.2, 288, 14.611),
    ("b0", 4.5, 1, 224, 1.83),
    ("b0", 1, 2.2, 224, 1.76),
    ("b0", 1, 1, 484, 1.90),
]


@cache
def billions(name: str, depth: float, width: float, pixels: int) -> float:
    with torch.device("meta"):
        model = instantiate(model_variants()[name], depth=depth, width=width, resolution=pixels)
    return complexity(model, pixels).multiply_adds / 1e9


@pytest.mark.parametrize("row", WITHIN, ids=lambda row: "-".join(map(str, row[:4])))
def test_multiply_adds_are_the_papers(row: tuple[str, float, float, int, float]) -> None:
    *network, paper = row
    assert billions(*network) == pytest.approx(paper, rel=0.07)


@pytest.mark.parametrize("row", MISSED, ids=lambda row: "-".join(map(str, row[:4])))
def test_rows_that_miss_the_paper_are_known(row: tuple[str, float, float, int, float, float]) -> None:
    *network, paper, here = row
    assert billions(*network) == pytest.approx(here, abs=0.001)
    assert abs(here / paper - 1) > 0.07


@pytest.mark.parametrize("row", NAMED, ids=lambda row: "-".join(map(str, row[:4])))
def test_networks_that_the_documentation_names(row: tuple[str, float, float, int, float]) -> None:
    *network, here = row
    assert billions(*network) == pytest.approx(here, abs=0.005)


def test_all_rows_of_the_tables_are_here_and_none_else() -> None:
    """As factors of the base's, by Tables 3 and 7."""
    tables = [yaml.safe_load((CONFIG_DIR / f"tables/{name}.yaml").read_text())["rows"] for name in ("table3", "table7")]
    printed = {
        (row["model"], row["depth"], row["width"], round(224 * row["resolution"]), row["multiply_adds_b"])
        for rows in tables
        for row in rows
    }
    table2 = {("resnet50", 1, 1, 224, 4.1), ("resnet152", 1, 1, 224, 11)}
    assert {*WITHIN, *(row[:5] for row in MISSED)} == printed | table2
