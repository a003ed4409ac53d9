"""Multiply-adds of every network of the paper's Tables 2, 3 and 7 that is built here, held against the paper."""

from functools import cache

import pytest
import torch
from hydra.utils import instantiate

from effnet_train.analysis.complexity import complexity
from effnet_train.cli.build import model_variants

# Model, depth, width, pixels, the paper's billions. Table 2 has B0 to B7 too: see test_configs.py.
WITHIN = [
    ("resnet50", 1, 1, 224, 4.1),  # Table 2
    ("resnet152", 1, 1, 224, 11),
    ("mobilenet_v1", 1, 1, 224, 0.6),  # Table 3
    ("mobilenet_v1", 1, 2, 224, 2.2),
    ("mobilenet_v1", 1, 1, 448, 2.2),
    ("mobilenet_v1", 1.4, 1.2, 288, 2.3),  # 1.3 x 224, to a multiple of 32
    ("mobilenet_v2", 1, 1, 224, 0.3),
    ("mobilenet_v2", 4, 1, 224, 1.2),
    ("mobilenet_v2", 1, 2, 224, 1.1),
    ("mobilenet_v2", 1, 1, 448, 1.2),
    ("resnet50", 1, 1, 448, 16.4),
    # The paper has 16.2 for depth 4 and 14.7 for width 2: each within 1 % of what the other one costs.
    ("resnet50", 4, 1, 224, 14.7),
    ("resnet50", 1, 2, 224, 16.2),
    # Of these two compound rows the paper has no coefficients: these are MobileNetV1's.
    ("mobilenet_v2", 1.4, 1.2, 288, 1.3),
    ("resnet50", 1.4, 1.2, 291, 16.7),
    ("b0", 1, 1, 224, 0.4),  # Table 7
    ("b0", 1.4, 1.2, 291, 1.8),
    # Single dimensions that cost what the compound does, where the paper has rounded ones (see MISSED).
    ("b0", 4.5, 1, 224, 1.8),
    ("b0", 1, 2.2, 224, 1.8),
    ("b0", 1, 1, 484, 1.9),
]
# The same, and what is counted here.
MISSED = [
    ("resnet50", 4, 1, 224, 16.2, 14.571),  # Table 3: see above
    ("resnet50", 1, 2, 224, 14.7, 16.117),
    # 1.3 x 224 = 291 pixels make maps of 146, 73, 37, 19 and 10, and 288 of 144, 72, 36, 18 and 9: the last two stages,
    # where MobileNets spend most, cost a tenth to a quarter more.
    ("mobilenet_v1", 1.4, 1.2, 291, 2.3, 2.470),
    ("mobilenet_v2", 1.4, 1.2, 291, 1.3, 1.442),
    ("resnet50", 1.4, 1.2, 288, 16.7, 14.611),
    ("b0", 4, 1, 224, 1.8, 1.575),  # Table 7: B0 costs 0.386, and four times that are 1.54
    ("b0", 1, 2, 224, 1.8, 1.450),
    ("b0", 1, 1, 448, 1.9, 1.538),
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
