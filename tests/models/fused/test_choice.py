"""When the kernels run, and what is said where they cannot."""

import pytest
import torch

from effnet_train.models import fused
from effnet_train.models.efficientnet import EfficientNet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "capability", lambda device: (9, 0))


def test_auto_is_for_training_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.resolve("auto", CUDA)
    assert not fused.resolve("auto", CUDA, compiled=True)
    assert not fused.resolve("auto", CPU)
    assert fused.resolve(True, CPU)
    assert not fused.resolve(False, CUDA)
    monkeypatch.setattr(fused, "capability", lambda device: (8, 9))  # where nobody has measured
    assert not fused.resolve("auto", CUDA)
    assert fused.resolve(True, CUDA)


def test_another_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="fused='yes': choose one of auto, true, false"):
        EfficientNet(fused="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fused=1: choose one of auto, true, false"):
        EfficientNet(fused=1)  # type: ignore[arg-type]


def test_insisting_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = EfficientNet(width=0.1, depth=0.1, num_classes=2, fused=True)
    with pytest.raises(ValueError, match=r"model\.fused=true needs a CUDA device, and this is cpu: use device=cuda"):
        model.train()(torch.zeros(2, 3, 32, 32))
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)  # evaluation does not need it


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda: False)
    assert not fused.resolve("auto", CUDA)
    with pytest.raises(
        ValueError, match=r"model\.fused=true needs Triton and a C compiler, which are not both here: pip"
    ):
        fused.check_possible(True, CUDA)
    fused.check_possible("auto", CUDA)
    fused.check_possible(False, CUDA)


def test_a_compiled_network_is_left_to_its_compiler() -> None:
    message = "model.fused=true does not go with compile=true"
    with pytest.raises(ValueError, match=message):
        fused.check_possible(True, CUDA, compiled=True)


def test_the_same_state_dict() -> None:
    with torch.device("meta"):
        plain, kernels = (EfficientNet(fused=choice).state_dict() for choice in (False, True))
    assert {name: tensor.shape for name, tensor in plain.items()} == {
        name: tensor.shape for name, tensor in kernels.items()
    }
