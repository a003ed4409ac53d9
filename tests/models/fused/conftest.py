"""Where the kernels run: under `-m gpu` on CUDA, else under Triton's interpreter on the CPU."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not here: pip install triton")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make the tests here tests of the GPU where they will not be interpreted."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not _interpreted():
            item.add_marker(pytest.mark.gpu)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if _interpreted() else "cuda")


@pytest.fixture(autouse=True)
def quick_interpreter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no overflow looked for in every sum of indices: that is half the interpreter's time."""
    if device.type == "cpu":
        from triton.runtime import interpreter

        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture(autouse=True)
def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have cuDNN compute float32 in float32: TF32, torch's default there, is further from it than the tolerances."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
