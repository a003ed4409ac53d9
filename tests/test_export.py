"""Weights handed on give the same logits in the libraries that read them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import efficientnet_b0

from effnet_train import export as exporter
from effnet_train.cli.build import build_model
from effnet_train.cli.build import model_variants as variants
from effnet_train.data.preprocess import Preprocess, eval_image
from effnet_train.engine.checkpoint import load_weights
from effnet_train.export import export, timm_config
from effnet_train.models.surgery import fold_batch_norm

PREPROCESS = {
    "resolution": 64,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_padding": 32,
    "resize": None,
    "interpolation": "bicubic",
}


def network(name: str = "b0", classes: int = 7, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network whose every tensor, BatchNorm's statistics too, is random, and what travels with it."""
    config = {**variants()[name], **changes}
    torch.manual_seed(0)
    model = build_model(config, classes).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.rand(tensor.shape, generator=generator)
            if key.endswith("running_var") or ".norm.weight" in key:
                tensor.copy_(0.5 + noise)
            elif key.endswith(("bias", "running_mean")):
                tensor.copy_(noise - 0.5)
    meta = {
        "model": {**config, "num_classes": classes},
        "preprocess": PREPROCESS,
        "classes": [f"class {i}" for i in range(classes)],
        "images": 0,
        "data": {},
    }
    return model, meta


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def assert_same(found: Any, expected: Tensor) -> None:
    found = torch.as_tensor(found)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", ["b0", "lite1"])
@torch.no_grad()
def test_timm_loads_it_strictly_and_agrees(tmp_path: Path, name: str, padding: str) -> None:
    model, meta = network(name, padding=padding)
    path = tmp_path / "weights.safetensors"
    assert export(model, meta, "timm", path, variants=variants()) < 1e-4
    prefix = "tf_" if padding == "same" else ""
    theirs = timm.create_model(f"{prefix}efficientnet_{name}", num_classes=7)
    theirs.load_state_dict(load_file(path), strict=True)
    for height, width in ((64, 96), (75, 53), (66, 31)):
        assert_same(theirs.eval()(images(2, height, width)), model(images(2, height, width)))


@torch.no_grad()
def test_torchvision_loads_it_strictly_and_agrees(tmp_path: Path) -> None:
    model, meta = network(padding="symmetric")  # with our eps, which is not torchvision's
    path = tmp_path / "weights.pth"
    export(model, meta, "torchvision", path, variants=variants())
    again = load_weights(path)  # which says what eps it is for
    assert (again.meta["model"]["bn_eps"], again.meta["preprocess"]) == (1e-5, PREPROCESS)
    network_again = build_model(again.meta["model"], 7).eval()
    network_again.load_state_dict(again.tensors)
    assert_same(network_again(images()), model(images()))
    theirs = efficientnet_b0(num_classes=7)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_same(theirs.eval()(images()), model(images()))
    assert_same(theirs(images(1, 75, 53)), model(images(1, 75, 53)))


@pytest.mark.parametrize(
    ("name", "changes", "fmt", "message"),
    [
        ("b0", {}, "torchvision", "torchvision pads symmetrically, these weights were trained with padding=same"),
        ("lite0", {"padding": "symmetric"}, "torchvision", "torchvision has no EfficientNet of width=1.0, depth=1.0"),
        ("b0", {"width": 0.3}, "timm", "timm has no EfficientNet of width=0.3"),
        ("b0", {}, "onyx", "format=onyx is not known: use one of effnet_train, timm"),
        ("b0", {"bn_eps": 1e-5}, "timm", "bn_eps=1e-05 cannot become theirs, 0.001"),
    ],
)
def test_what_cannot_be_said_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], fmt: str, message: str
) -> None:
    model, meta = network(name, **changes)
    model.state_dict()["stem.norm.running_var"][0] = 1e-6
    with pytest.raises(ValueError, match=message):
        export(model, meta, fmt, tmp_path / "weights.pth", variants=variants())
    assert not list(tmp_path.iterdir())


def test_a_network_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, meta = network()
    filled = exporter._filled

    def spoilt(theirs: Any, ours: nn.Module, fmt: str) -> nn.Module:
        filled(theirs, ours, fmt)
        with torch.no_grad():
            theirs.blocks[3][1].se.conv_expand.bias += 0.05
        return theirs

    monkeypatch.setattr(exporter, "_filled", spoilt)
    with pytest.raises(ValueError, match=r"timm network's logits differ by .* of the largest, more than 0.0001"):
        export(model, meta, "timm", tmp_path / "weights.safetensors", variants=variants())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_the_hubs_folder(tmp_path: Path) -> None:
    """As timm reads it from a folder, in a process that knows nothing of us; and its words for our preprocessing."""
    model, meta = network()
    folder = tmp_path / "hub"
    export(model, meta, "hub", folder, variants=variants())
    names = {"model.safetensors", "model.json", "config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_b0"
    assert config["label_names"] == meta["classes"]
    assert not {"tag", "hf_hub_id", "url", "license"} & config["pretrained_cfg"].keys()  # those of timm's own weights
    assert "library_name: timm" in (folder / "README.md").read_text()
    torch.save(images(2, 64, 64), tmp_path / "images.pt")
    program = (
        "import sys, timm, torch\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "images = torch.load(sys.argv[2])\n"
        "torch.save(model(images).detach(), sys.argv[3])\n"
    )
    arguments = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert_same(torch.load(tmp_path / "logits.pt"), model(images(2, 64, 64)))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    assert transform.transforms[0].size == 96  # 64 + 32, as the crop padding has it
    export(model, meta, "hub", folder, variants=variants())  # once more, over itself
    (folder / "config.json").unlink()
    with pytest.raises(FileExistsError, match="is no folder of the hub's"):
        export(model, meta, "hub", folder, variants=variants())


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (240, 255), (260, 292), (300, 332), (527, 559), (600, 632)])
def test_timms_share_gives_back_the_whole_size(size: int, resized: int) -> None:
    preprocess = {**PREPROCESS, "resolution": size, "resize": resized}
    assert int(size / timm_config(preprocess)["crop_pct"]) == resized


@torch.no_grad()
def test_folding_keeps_the_function_and_leaves_no_batch_norm() -> None:
    model, _ = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_same(folded(images(2, 75, 53)), model(images(2, 75, 53)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fold", [False, True])
@torch.no_grad()
def test_onnx_for_any_number_of_images(tmp_path: Path, fold: bool) -> None:
    model, meta = network()
    path = tmp_path / "model.onnx"
    assert export(model, meta, "onnx", path, variants=variants(), fold=fold) < 1e-4
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    for count in (1, 2, 5):
        batch = images(count, 64, 64)
        assert_same(session.run(["logits"], {"images": batch.numpy()})[0], model(batch))
    assert json.loads(session.get_modelmeta().custom_metadata_map["effnet_train"]) == meta
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in operators
    if fold:
        assert "BatchNormalization" not in operators


@torch.no_grad()
def test_torch_export_needs_no_effnet_train(tmp_path: Path) -> None:
    model, meta = network()
    path = tmp_path / "model.pt2"
    export(model, meta, "torch_export", path, variants=variants(), fold=True)
    torch.save(images(3, 64, 64), tmp_path / "images.pt")
    program = (
        "import sys, torch\n"
        "extra = {'effnet_train.json': ''}\n"
        "model = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "assert 'crop_padding' in extra['effnet_train.json']\n"
        "images = torch.load(sys.argv[2])\n"
        "torch.save(torch.cat([model(images[:1]), model(images[1:])]).detach(), sys.argv[3])\n"
        "assert not any(name.startswith('effnet_train') for name in sys.modules)\n"
    )
    arguments = [str(path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert_same(torch.load(tmp_path / "logits.pt"), model(images(3, 64, 64)))


def test_what_timm_cuts_is_what_we_cut() -> None:
    """But for the order of cutting and resizing: the same square of the image, to a pixel's rounding."""
    rng = np.random.default_rng(0)
    from PIL import Image
    from timm.data import create_transform

    small = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
    image = small.resize((640, 480), Image.Resampling.BICUBIC)
    config = timm_config({**PREPROCESS, "resolution": 224})
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    theirs = create_transform(**{key: config[key] for key in keys})(image)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    ours = torch.from_numpy(eval_image(image, Preprocess(224))).permute(2, 0, 1) / 255
    assert (theirs * std + mean - ours).abs().mean() < 0.01
