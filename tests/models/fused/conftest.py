"""Where the kernels run: under `-m gpu` on CUDA, else under Triton's interpreter on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

tl = pytest.importorskip("triton", reason="Triton is not here: pip install triton").language


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
def bfloat16_as_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round to bfloat16, which it cuts off, and multiply its matrices, not their bits."""
    if device.type != "cpu":
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(source, kind)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, kind.scalar)

    def dot_of_numbers(a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(operand, tl.float32) for operand in (a, b))
        return dot(a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", rounding_cast)
    monkeypatch.setattr(builder, "create_dot", dot_of_numbers)


@pytest.fixture(autouse=True)
def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have cuDNN compute float32 in float32: TF32, torch's default there, is further from it than the tolerances."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
