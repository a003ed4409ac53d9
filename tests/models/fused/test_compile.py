"""Every kernel compiles for GPUs that are not here, with the arguments that blocks of all kinds give it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize(
    ("capability", "kinds"),
    [
        (90, "few"),
        pytest.param(80, "all", marks=pytest.mark.slow),
        pytest.param(90, "all", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile(capability: int, kinds: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), str(capability), kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout)
    names = {name.partition(" ")[0] for name in sizes}
    depthwise = {"forward", "gradients"}
    norms = {"moments", "input_gradient", "finish_moments", "normalise", "pool", "add_rows", "gated_sums", "norm_sums"}
    gates = {"squeeze", "excite", "excite_gradient", "squeeze_gradient", "parameter_gradients"}
    expansion = {"expand", "expand_gradients", "expand_weight_gradient"}
    projections = {"project", "project_sums", "project_input_gradient"}
    stem = {"forward", "weight_gradient"}
    assert names == {*depthwise, *norms, *gates, *expansion, *projections, *stem, "update"}
    assert all(size > 0 for size in sizes.values())
