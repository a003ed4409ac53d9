"""Other libraries' weights from files, as they come: bare, wrapped, prefixed, beside a config, or hostile."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effnet_train.cli.build import model_variants
from effnet_train.engine.checkpoint import CheckpointError, Weights, find_checkpoint, load_weights
from effnet_train.models.formats import skeleton

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = model_variants()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_b0", num_classes=10).eval()


def load(path: Path | str, which: str = "ema", source: str | None = "timm_tf") -> Weights:
    return load_weights(path, which, source=source, variants=VARIANTS)


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def bias(weights: Weights) -> Tensor:
    return weights.tensors["classifier.bias"]


def test_every_kind_of_file_and_wrapper(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    other = moved(state)
    arguments = argparse.Namespace(model="tf_efficientnet_b0", lr=0.1)  # which timm and torchvision save along
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": prefixed, "arch": "x", "epoch": 3, "args": arguments}, tmp_path / "timm.pth")
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "both.pth.tar")
    torch.save(
        {"model": other, "model_ema": {"n_averaged": torch.tensor(2), **prefixed}, "args": arguments},
        tmp_path / "vision.pt",
    )
    save_file(state, tmp_path / "x.safetensors")
    for file in tmp_path.iterdir():
        weights = load(file)
        assert bias(weights).equal(state["classifier.bias"]), file
        assert weights.meta["source"] == "timm_tf"
        assert weights.tensors.keys() == skeleton(VARIANTS["b0"], 10).keys()
    for name in ("both.pth.tar", "vision.pt"):
        assert bias(load(tmp_path / name, "raw")).equal(other["classifier.bias"])


def test_the_metadata_are_those_of_our_own_checkpoints(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "x.pth")
    meta = load(tmp_path / "x.pth").meta
    assert json.loads(json.dumps(meta)) == meta
    assert meta["model"] == {**VARIANTS["b0"], "num_classes": 10}
    assert meta["preprocess"] == {
        **{"resolution": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        **{"crop_padding": 0, "interpolation": "bicubic", "resize": 256},
    }
    assert (meta["classes"], meta["images"], meta["data"]) == ([str(digit) for digit in range(10)], 0, {})


def test_a_folder_of_the_hubs_and_an_export_without_header(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    described = {
        "architecture": "tf_efficientnet_b0",
        "pretrained_cfg": timm.get_pretrained_cfg("efficientnet_b0").to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        weights = load(path, source=None)
        assert weights.meta["source"] == "timm_tf"
        assert weights.meta["preprocess"]["resize"] == int(224 / timm.get_pretrained_cfg("efficientnet_b0").crop_pct)
    with pytest.raises(CheckpointError, match=r"source=timm contradicts .*config\.json"):
        load(tmp_path, source="timm")

    # Ours, saved again by another tool, which leaves the header out; the JSON beside it says the same.
    own = load(tmp_path, source=None)
    save_file(dict(own.tensors), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match=r"under effnet_train's names.*no published weights have this form"):
        load(tmp_path / "ours.safetensors", source=None)
    (tmp_path / "ours.json").write_text(json.dumps(own.meta))
    again = load(tmp_path / "ours.safetensors", source=None)
    assert again.meta == own.meta
    with pytest.raises(CheckpointError, match="source=timm: it says itself what it holds; leave source= away"):
        load(tmp_path / "ours.safetensors", source="timm")


def test_what_does_not_fit_is_listed_by_its_own_names(network: nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    del state["blocks.0.0.bn1.running_mean"]
    state["conv_head.weight"] = torch.zeros(1280, 321, 1, 1)
    state["aux.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "x.pth")
    for text in (
        f"checkpoint {tmp_path / 'x.pth'}: its tensors have timm's names, but even from b0, the closest, 3 tensors ",
        "blocks.0.0.bn1.running_mean is missing",
        "conv_head.weight is (1280, 321, 1, 1), not (1280, 320, 1, 1)",
        "aux.weight is not part of it",
    ):
        assert text in str(refused.value)


def test_what_is_unknown_is_never_guessed(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"x\.pth: the tensors are b0's under timm's names.*source=timm_tf_advprop,"
    ):
        load(tmp_path / "x.pth", source=None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"y\.pth: its tensors' names \(a, \.\.\.\) are not those of"):
        load(tmp_path / "y.pth")
    torch.save([torch.zeros(1)], tmp_path / "z.pth")
    with pytest.raises(CheckpointError, match=r"z\.pth: it holds a list, not a state dict"):
        load(tmp_path / "z.pth")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_published_weights_is_not_run(network: nn.Module, tmp_path: Path) -> None:
    target = tmp_path / "created"
    hostile: dict[str, Any] = {"state_dict": network.state_dict(), "args": Hostile(target)}
    torch.save(hostile, tmp_path / "zip.pth")
    torch.save(hostile, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"args": argparse.Namespace(x=Hostile(target)), **hostile}, tmp_path / "within.pth")
    torch.save(network, tmp_path / "module.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(hostile, protocol=2))
    for file in tmp_path.glob("*.pth"):
        with pytest.raises(CheckpointError, match="damaged, or holds code, which is never run"):
            load(file)
    assert not target.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert target.exists()  # it would have worked


def test_the_authors_checkpoints(tmp_path: Path) -> None:
    """The tiny one that TensorFlow wrote, with the logits that TensorFlow computed."""
    golden = np.load(GOLDEN / "tf_checkpoint.npz")
    tiny = json.loads(str(golden["meta"]))["tiny"]
    names = sorted({name.removeprefix("files/") for name in golden.files if name.startswith("files/efficientnet")})
    for name in names:
        (tmp_path / name).write_bytes(golden[f"files/{name}"].tobytes())
    (tmp_path / "checkpoint").write_text("")
    indices = [name for name in names if name.endswith(".index")]
    prefix = tmp_path / indices[0].removesuffix(".index")
    config = {**VARIANTS["b0"], "width": tiny["width_coefficient"], "depth": tiny["depth_coefficient"]}
    gated = {**VARIANTS, "tiny": config}
    weights = load_weights(prefix, source="tensorflow", variants=gated)
    assert find_checkpoint(prefix) == prefix.with_name(f"{prefix.name}.index")
    assert (weights.meta["source"], weights.meta["model"]["width"]) == ("tensorflow", config["width"])
    assert weights.meta["model"]["num_classes"] == 7
    assert weights.meta["preprocess"]["crop_padding"] == 32
    raw = load_weights(prefix, "raw", source="tensorflow", variants=gated)
    assert not bias(raw).equal(bias(weights))
    with pytest.raises(CheckpointError, match="source=tensorflow_advprop, the authors' checkpoints of AdvProp"):
        load_weights(prefix, variants=gated)
    if len(indices) > 1:
        with pytest.raises(CheckpointError, match=f"holds {len(indices)} TensorFlow checkpoints: give one of"):
            load_weights(tmp_path, source="tensorflow", variants=gated)
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in tmp_path.glob(f"{prefix.name}.*"):
        file.rename(alone / file.name)
    assert bias(load_weights(alone, source="tensorflow", variants=gated)).equal(bias(weights))
