"""What a run was made with: code, packages, machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("effnet-train", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "hydra-core")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the code's commit, the packages' versions, the command and the machine, as plain values."""
    return {
        "commit": _commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} ({os.cpu_count()})",
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package is run from, with + where files differ; None elsewhere."""
    package = Path(__file__).parents[1]
    git = ("git", "-C", str(package), "-c", "safe.directory=*")
    try:
        # An installed package may lie in somebody else's checkout, which does not track it.
        known = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if known.returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", str(package)], timeout=10).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit + "+" * bool(changed)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
