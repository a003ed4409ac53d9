import pytest
import torch

from effnet_train.models import folding
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.folding import FOLDED, FUSED, PLAIN, folded
from effnet_train.models.mobilenet import MobileNetV1
from effnet_train.models.resnet import ResNet
from effnet_train.models.turning import turn

SMALL = {"width": 0.5, "depth": 0.5, "num_classes": 7}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def of(randomised):
    """Return a function that makes a network ready to be folded."""
    return lambda model: randomised(model).float().eval()


NETWORKS = {
    "efficientnet": lambda: EfficientNet(**SMALL),
    "lite": lambda: EfficientNet(**SMALL, se_ratio=0.0, activation="relu6", fixed_ends=True),
    "symmetric": lambda: EfficientNet(**SMALL, padding="symmetric"),
    "mobilenet": lambda: MobileNetV1(width=0.25, num_classes=7),
    "resnet": lambda: ResNet(num_classes=7),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_fused_copy_computes_what_the_network_does(name, turned, of):
    torch.manual_seed(0)
    model = turn(of(NETWORKS[name]()), turned)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    copy, path = folded(model, "auto", device=CPU, precision="fp32")
    assert path == FUSED
    assert copy is not model
    with torch.inference_mode():
        for shape in ((3, 3, 64, 64), (1, 3, 45, 70)):
            images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            expected = model.double()(images.double()).float()
            scale = expected.abs().max().item()
            torch.testing.assert_close(copy(images), expected, rtol=0, atol=1e-5 * scale)
            features = model.features(images.double()).float()
            atol = 1e-5 * features.abs().max().item()
            torch.testing.assert_close(copy.features(images), features, rtol=0, atol=atol)
            model.float()
            once = images.clone()
            copy(images)
            assert torch.equal(images, once), "the images themselves were changed"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fold", "precision", "expected"),
    [
        ("auto", "fp32", FUSED),
        (True, "fp32", FUSED),
        (False, "fp32", PLAIN),
        ("auto", "bf16", PLAIN),
        (True, "bf16", FOLDED),
    ],
)
def test_what_is_chosen(fold, precision, expected, of):
    model = of(EfficientNet(**SMALL))
    copy, path = folded(model, fold, device=CPU, precision=precision)
    assert path == expected
    assert (copy is model) == (expected == PLAIN)


def test_on_a_gpu_nothing_is_folded_unasked(of):
    model = of(EfficientNet(**SMALL))
    assert folded(model, "auto", device=GPU, precision="fp32") == (model, PLAIN)
    assert folded(model, True, device=GPU, precision="fp32")[1] == FOLDED


def test_without_onednns_operators_batch_norm_alone_is_folded(monkeypatch, of):
    monkeypatch.setattr(folding, "_fuses", lambda: False)
    model = of(EfficientNet(**SMALL))
    copy, path = folded(model, "auto", device=CPU, precision="fp32")
    assert path == FOLDED
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(copy(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_copy_that_computes_something_else_is_not_taken_unasked(monkeypatch, value, of):
    forward = folding.FusedConv.forward
    monkeypatch.setattr(folding.FusedConv, "forward", lambda self, x: value * forward(self, x))
    model = of(EfficientNet(**SMALL))
    assert folded(model, "auto", device=CPU, precision="fp32") == (model, PLAIN)
    assert folded(model, True, device=CPU, precision="fp32")[1] == FUSED
