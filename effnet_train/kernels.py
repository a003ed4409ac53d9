"""Whether Triton's kernels can be started here at all."""

import os
import shutil
from functools import cache
from importlib.util import find_spec


@cache
def usable() -> bool:
    """Say whether Triton is there, and the C compiler that it needs for what starts its kernels."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return find_spec("triton") is not None and compiler is not None
