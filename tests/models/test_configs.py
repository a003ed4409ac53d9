import csv
import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from effnet_train.analysis.complexity import complexity
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.mnasnet import MNASNET_A1, MnasNet
from effnet_train.models.mobilenet import MobileNetV1, MobileNetV2
from effnet_train.models.resnet import ResNet
from effnet_train.models.scaling import compound

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parents[1] / "golden"
# Table 2 of the paper, in billions.
MULTIPLY_ADDS = {"b0": 0.39, "b1": 0.70, "b2": 1.0, "b3": 1.8, "b4": 4.2, "b5": 9.9, "b6": 19, "b7": 37}


def variants() -> list[dict[str, str]]:
    rows = []
    for name in ("efficientnet_variants.csv", "lite_variants.csv"):
        with (GOLDEN / name).open() as file:
            rows += list(csv.DictReader(file))
    return rows


def load(name: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[f"+model={name}"]).model


@pytest.mark.parametrize("row", variants(), ids=lambda row: row["variant"])
def test_variant_is_the_published_one(row: dict[str, str]) -> None:
    cfg = load(row["variant"])
    with torch.device("meta"):
        model = instantiate(cfg, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
    assert (model.resolution, model.dropout) == (int(row["resolution"]), float(row["dropout"]))
    assert "-".join(str(stage.layers) for stage in model.table()[1:-1]) == row["repeats"]
    if row["variant"] in MULTIPLY_ADDS:
        billions = complexity(model, cfg.resolution).multiply_adds / 1e9
        assert billions == pytest.approx(MULTIPLY_ADDS[row["variant"]], rel=0.07)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("efficientnet", EfficientNet),
        ("mnasnet", MnasNet),
        ("mobilenet_v1", MobileNetV1),
        ("mobilenet_v2", MobileNetV2),
        ("resnet", ResNet),
    ],
)
def test_baseline_holds_every_default_of_the_constructor(name: str, kind: type) -> None:
    cfg = dict(load(name))
    assert cfg.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
    parameters = inspect.signature(kind).parameters
    assert tuple(cfg.get("stages", MNASNET_A1)) == MNASNET_A1
    if "stages" in cfg:
        cfg["stages"] = MNASNET_A1
    assert cfg == {name: p.default for name, p in parameters.items() if name != "num_classes"}


def test_nano_follows_the_compound_law_backwards() -> None:
    cfg = load("nano")
    depth, width, _ = compound(-7)
    assert (cfg.depth, cfg.width) == (round(depth, 3), round(width, 3))
    model = instantiate(cfg, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) < 0.8e6
    assert any(block.rate > 0 for block in model.blocks())  # drop connect has something to drop


def test_unknown_key_is_refused() -> None:
    cfg = load("b0")
    with pytest.raises(Exception, match="unexpected keyword argument 'widht'"):
        instantiate(cfg, widht=2.0)
