"""Networks beside EfficientNet go through the commands as it does, and are refused, clearly, where they cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.engine.checkpoint import load_checkpoint

Cli = Callable[..., Any]
CASES = {
    "mobilenet_v1": ("recipe=mobilenet", "MobileNetV1", "onnx"),
    "mobilenet_v2": ("recipe=mobilenet", "MobileNetV2", "torch_export"),
    "resnet50": ("recipe=resnet", "ResNet", "onnx"),
    "resnet152": ("model.padding=same model.depth=0.1", "ResNet", "torch_export"),
}


@pytest.mark.parametrize("name", CASES)
def test_trains_and_goes_on_to_every_command(cli: Cli, tiny: list[str], few_digits: Path, name: str) -> None:
    overrides, kind, graph = CASES[name]
    done = cli("train", *tiny, f"model={name}", *overrides.split(), "model.resolution=64", "batch_size=8")
    assert done.status == 0, done.err
    assert "done: 2 steps" in done.out
    state = load_checkpoint(Path("run/step_000000002.pt"))
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    first = next((few_digits / "val").glob("*/*.png"))
    done = cli("predict", str(first), "checkpoint=run", "device=cpu", "workers=0", "format=jsonl", "cam=maps")
    assert done.status == 0, done.err
    assert len(list(Path("maps").glob("*.png"))) == 1
    done = cli("export", "checkpoint=run", f"format={graph}", "fold=true")
    assert done.status == 0, done.err
    done = cli("export", "checkpoint=run", "format=timm")
    assert done.status == 2
    assert f"format=timm is for EfficientNets, and this is a {kind}: choose onnx" in done.err
    done = cli("eval", "checkpoint=run/best.pt", "device=cpu", "workers=0")
    assert done.status == 0, done.err


def test_dry_run_counts_a_wide_mobilenet(cli: Cli, tiny: list[str]) -> None:
    given = ("model=mobilenet_v1", "model.width=2", "model.resolution=64", "dry_run=true", "batch_size=2")
    done = cli("train", *(text for text in tiny if not text.startswith("model.width")), *given)
    assert done.status == 0, done.err
    assert "MobileNetV1 at 64 pixels, 10 classes" in done.out


def test_another_networks_weights_are_refused(cli: Cli, tiny: list[str]) -> None:
    small = ("model.resolution=32", "batch_size=8", "max_steps=1")
    assert cli("train", *tiny, "model=mobilenet_v1", *small).status == 0
    base = [text for text in tiny if text != "name=run"]
    done = cli("train", *base, "model=mobilenet_v2", *small, "name=other", "init_from=run/best.pt")
    assert done.status == 2
    assert "init_from=run/best.pt holds weights of another model" in done.err
