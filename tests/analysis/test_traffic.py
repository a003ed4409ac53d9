import pytest
import torch
from torch import Tensor, nn

from effnet_train.analysis.traffic import training_traffic
from effnet_train.models.efficientnet import EfficientNet


class Toy(nn.Module):
    """Counted by hand: a convolution of 3 to 8 channels, BatchNorm and swish."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(images))).view(-1, 8 * 16)


def test_counted_by_hand() -> None:
    traffic = training_traffic(Toy(), 4)
    small, large = 3 * 16, 8 * 16  # numbers in the image, and in what follows
    forward = (small + large) + 3 * large + 2 * large + large  # BatchNorm reads twice; the sum at the end
    # Of the images no gradient is asked for; a sum's gradient is a single number, seen as many.
    backward = 3 * large + (2 * 2 * large + large) + (large + small)
    assert traffic.moved == pytest.approx(2 * (forward + backward), rel=0.02)
    assert traffic.kept == 2 * (small + 2 * large)
    assert training_traffic(Toy(), 4, dtype=torch.float32).kept == 2 * traffic.kept


def test_the_model_is_not_touched() -> None:
    model = Toy().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_traffic(model, 4)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fused_layers_move_and_keep_less() -> None:
    """Figures of docs/performance.md."""
    pytest.importorskip("triton", reason="Triton is not here: pip install triton")
    plain, fused = (training_traffic(meta(fused), 224) for fused in (False, True))
    assert fused.moved == pytest.approx(121.2e6, rel=0.01)
    assert fused.kept == pytest.approx(15.8e6, rel=0.01)
    assert fused.moved < plain.moved
    assert fused.kept < plain.kept


def meta(fused: bool) -> nn.Module:
    with torch.device("meta"):
        return EfficientNet(fused=fused)
