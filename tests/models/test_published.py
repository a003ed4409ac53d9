"""Weights by name: over a real connection to a local server, from a cache, and what is said where there is neither."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from effnet_train.data.preprocess import Preprocess
from effnet_train.engine.checkpoint import Weights, export_safetensors
from effnet_train.models.published import fetch, is_name

# In a process of its own, as the hub's address and cache are read where huggingface_hub is imported.
PROGRAM = """
import json, sys
from effnet_train.cli.build import model_variants
from effnet_train.engine.checkpoint import load_weights
for name in sys.argv[1:]:
    try:
        weights = load_weights(name, variants=model_variants())
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    else:
        print(json.dumps({"sum": float(weights.tensors["classifier.bias"].double().sum()), **weights.meta}))
"""


def load(*names: str, home: Path, **environment: str) -> list[dict[str, Any]]:
    """Return what became of each name, in a process with an empty cache in `home` at first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment = {**kept, "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch"), **environment}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def publish(folder: Path, architecture: str, **config: Any) -> float:
    """Write a model as timm publishes it; return the sum of its classifier's bias."""
    network = timm.create_model(architecture, num_classes=10)
    torch.nn.init.uniform_(network.classifier.bias)
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {key: value for key, value in network.pretrained_cfg.items() if value is not None}
    described = {"architecture": cfg.pop("architecture"), "num_classes": 10, "pretrained_cfg": cfg, **config}
    (folder / "config.json").write_text(json.dumps(described))
    return float(network.classifier.bias.detach().double().sum())


def test_the_hub_is_asked_once_and_the_cache_then(hub: Any, tmp_path: Path) -> None:
    address, root, requests = hub
    total = publish(root / "someone" / "b0", "tf_efficientnet_b0.ap_in1k", label_names=list("abcdefghij"))
    timms = publish(root / "timm" / "efficientnet_b0.ra_in1k", "efficientnet_b0.ra_in1k")
    preprocess = Preprocess(resolution=32).to_dict()
    described = {"model": {"width": 1.0}, "preprocess": preprocess, "classes": ["a", "b", "c"], "data": {}}
    own = Weights({"classifier.bias": torch.ones(3)}, {"source": "our own export", **described})
    (root / "someone" / "ours").mkdir()
    export_safetensors(root / "someone" / "ours" / "model.safetensors", own)
    names = (
        "hub:someone/b0",
        "hub:someone/b0@v1",
        "timm:efficientnet_b0.ra_in1k",
        "hub:someone/ours",
        "hub:someone/b1",
    )
    *found, absent = load(*names, home=tmp_path, HF_ENDPOINT=address)
    assert found[3] == {"sum": 3.0, **own.meta}
    for loaded in found[:2]:
        assert loaded["sum"] == pytest.approx(total)
        assert (loaded["model"]["padding"], loaded["model"]["num_classes"]) == ("same", 10)
        assert loaded["preprocess"]["mean"] == [0.5, 0.5, 0.5]
        assert loaded["classes"] == list("abcdefghij")
        assert loaded["source"] == "timm_tf_advprop"
    assert found[2]["sum"] == pytest.approx(timms)
    assert (found[2]["model"]["padding"], found[2]["model"]["bn_eps"]) == ("symmetric", 1e-5)
    assert (found[2]["preprocess"]["resize"], found[2]["source"]) == (256, "timm:efficientnet_b0.ra_in1k")
    assert absent["error"].startswith(
        f"FileNotFoundError: hub:someone/b1: cannot fetch model.safetensors of {address}/someone/b1 ("
    )
    for path in ("someone/b0", "timm/efficientnet_b0.ra_in1k"):
        assert f"GET /{path}/resolve/main/model.safetensors" in requests

    requests.clear()
    offline = load(*names[:4], home=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline == found
    assert not requests


def test_without_a_network_it_says_what_to_give_instead(tmp_path: Path) -> None:
    # A proxy at a port where nobody answers is what torch would go through.
    environment = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9"}
    names = ("timm:tf_efficientnet_b4.aa_in1k", "torchvision:efficientnet_b0")
    hubs, torchvisions = (found["error"] for found in load(*names, home=tmp_path, **environment))
    asked = "model.safetensors of https://huggingface.co/timm/tf_efficientnet_b4.aa_in1k"
    assert f"FileNotFoundError: {names[0]}: cannot fetch {asked} (" in hubs
    assert f"it is not in {tmp_path / 'hf'}" in hubs
    url = "https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth"
    assert f"FileNotFoundError: {names[1]}: cannot fetch {url} (URLError: " in torchvisions
    assert f"it is not in {tmp_path / 'torch' / 'hub' / 'checkpoints'} (TORCH_HOME)" in torchvisions
    for error in (hubs, torchvisions):
        assert "run once where there is a network and take that folder along, or give the file itself" in error
    assert not list((tmp_path / "torch" / "hub" / "checkpoints").iterdir())  # nothing half-loaded


def test_torchvisions_names_lead_to_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, file in (
        ("torchvision:efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth"),
        ("torchvision:efficientnet_b1.IMAGENET1K_V1", "efficientnet_b1_rwightman-bac287d4.pth"),
        ("torchvision:efficientnet_b1.IMAGENET1K_V2", "efficientnet_b1-c27df63c.pth"),
    ):
        (folder / file).touch()
        assert fetch(name) == folder / file


def test_names_are_told_from_paths() -> None:
    assert all(is_name(text) for text in ("timm:x", "torchvision:x", "hub:a/b"))
    assert not any(is_name(text) for text in ("timm", "runs/timm:x", "x.pt", "hub/a"))
