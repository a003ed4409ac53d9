"""Other libraries' weights through the commands: their scores, training from them, and what to say where they fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.nn import functional as F

from effnet_train.cli.build import model_variants
from effnet_train.engine.checkpoint import load_checkpoint

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0")


@pytest.fixture(scope="module")
def timm_b0(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return timm's B0 with ten classes, and the file that it was saved to."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_b0", num_classes=10).eval()
    nn.init.normal_(network.classifier.weight, std=0.3)
    file = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file, network


def test_eval_scores_as_timm_itself_would(cli: Cli, few_digits: Path, timm_b0: tuple[Path, nn.Module]) -> None:
    file, network = timm_b0
    transform = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875)
    files = sorted((few_digits / "val").rglob("*.png"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([int(file.parent.name) for file in files])
    with torch.no_grad():
        logits = network(images)
    data = ("data=folder", f"data.root={few_digits}", "resolution=32")
    done = cli("eval", f"checkpoint={file}", "source=timm_tf", *data, *ONE, "output=score.json")
    assert done.status == 0, done.err
    record = json.loads(Path("score.json").read_text())
    assert record["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert record["top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert record["top1"] < 1
    assert (record["weights"], record["images"], record["resolution"]) == ("timm_tf", 40, 32)
    assert f"{file} (weights of timm_tf), val at 32 pixels" in done.out


def test_names_with_the_cache_of_torchvision(cli: Cli, few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import efficientnet_b0

    monkeypatch.setenv("TORCH_HOME", "home")
    cache = Path("home/hub/checkpoints")
    cache.mkdir(parents=True)
    torch.save(efficientnet_b0(num_classes=10).state_dict(), cache / "efficientnet_b0_rwightman-7f5810bc.pth")
    data = ("data=folder", f"data.root={few_digits}", "resolution=32")
    done = cli("eval", "checkpoint=torchvision:efficientnet_b0", *data, *ONE)
    assert done.status == 0, done.err
    record = json.loads(done.out.splitlines()[-1])
    assert record["checkpoint"] == "torchvision:efficientnet_b0"
    assert record["weights"] == "torchvision:efficientnet_b0.IMAGENET1K_V1"
    assert not list(Path().rglob("eval.json"))


def refused(done: Any, message: str) -> None:
    assert done.status == 2
    assert message in done.err, done.err
    assert "Traceback" not in done.err


def test_eval_says_what_is_missing(cli: Cli, few_digits: Path, timm_b0: tuple[Path, nn.Module]) -> None:
    file, _ = timm_b0
    weights = f"checkpoint={file}"
    refused(
        cli("eval", weights, *ONE), f"checkpoint {file}: the tensors are b0's under timm's names, which does not say"
    )
    refused(cli("eval", weights, "source=timm_tf", *ONE), "carries no data set: choose one, as data=imagenet")
    refused(
        cli("eval", weights, "source=torchvision", *ONE), "source=torchvision (torchvision's IMAGENET1K_V1) contradic"
    )
    refused(cli("eval", weights, "source=tf", *ONE), "source=tf is not known: ")
    refused(
        cli("eval", "checkpoint=timm:tf_efficientnet_b9", *ONE), "timm:tf_efficientnet_b9 is not known: did you mean"
    )


def training(tiny: list[str], file: Path, *overrides: str) -> list[str]:
    """Return the overrides of a training run that starts from published weights, at the rate 0."""
    base = [text for text in tiny if not text.startswith("model.")]
    rate = ("optim=sgd", "optim.momentum=0", "optim.nesterov=false", "schedule=constant", "schedule.lr_per_256=0")
    return [*base, "model=b0", "model.resolution=32", f"init_from={file}", *rate, *overrides]


def test_training_starts_from_published_weights(cli: Cli, tiny: list[str], timm_b0: tuple[Path, nn.Module]) -> None:
    file, network = timm_b0
    done = cli("train", *training(tiny, file, "init_source=timm_tf"))
    assert done.status == 0, done.err
    trained = load_checkpoint(Path("run/best.pt"))["model"]
    state = network.state_dict()
    assert trained["stem.conv.weight"].equal(state["conv_stem.weight"])
    assert trained["stages.6.0.project.conv.weight"].equal(state["blocks.6.0.conv_pwl.weight"])
    assert trained["classifier.weight"].equal(state["classifier.weight"])


def test_training_with_other_settings_than_the_weights_is_refused(
    cli: Cli, tiny: list[str], timm_b0: tuple[Path, nn.Module]
) -> None:
    file, _ = timm_b0
    other = training(tiny, file, "init_source=timm:efficientnet_b0.ra4_e3600_r224_in1k")
    overrides = (
        *("model.padding=symmetric", "model.bn_eps=1e-05"),
        *("data.preprocess.mean=[0.5,0.5,0.5]", "data.preprocess.std=[0.5,0.5,0.5]"),
    )
    done = cli("train", *other)
    refused(done, f"init_from={file} holds weights of other settings (model.padding is same here and symmetric there; ")
    assert "model.bn_eps is 0.001 here and 1e-05 there" in done.err
    assert f"give {' '.join(overrides)}" in done.err
    assert not Path("run").exists()
    followed = cli("train", *other, *overrides)
    assert followed.status == 0, followed.err
    refused(cli("train", *training(tiny, file, "name=more")), f"checkpoint {file}: the tensors are b0's under timm's")
    more = ("init_source=timm_tf", "name=more", "model=b1", "model.resolution=32")
    refused(cli("train", *training(tiny, file, *more)), f"{file} holds weights of another model")


def test_the_variants_are_what_hydra_composes(compose: Callable[..., dict[str, Any]]) -> None:
    variants = model_variants()
    efficientnets = {*(f"b{number}" for number in range(8)), *(f"lite{number}" for number in range(5)), "nano"}
    assert set(variants) == efficientnets | {"mnasnet", "mobilenet_v1", "mobilenet_v2", "resnet50", "resnet152"}
    for name in ("b0", "b7", "lite3", "nano", "mobilenet_v2", "resnet152"):
        assert variants[name] == compose("train", f"model={name}", "recipe=efficientnet")["model"]
