"""GPU kernels behind the same layers, in Triton, which is imported only where they run.

`fused` is a network's argument: `auto` uses the kernels where it trains on a GPU of the kind that they were measured
on and Triton can be used, `True` insists on it, `False` never does. On a CPU they run under Triton's interpreter alone,
which is for tests.
"""

import os
from functools import cache

import torch
from torch import Tensor

from effnet_train.kernels import usable

Fused = bool | str
_MEASURED = (9, 0)  # the least compute capability: an H100's
CHOICES: tuple[Fused, ...] = ("auto", True, False)


def check_choice(fused: Fused) -> None:
    """Raise ValueError where `fused` is none of the choices."""
    if not any(fused is choice or (isinstance(fused, str) and fused == choice) for choice in CHOICES):
        raise ValueError(f"fused={fused!r}: choose one of auto, true, false")


def check_possible(fused: Fused, device: torch.device, *, compiled: bool = False) -> None:
    """Raise ValueError where the kernels are insisted on and cannot run on the device, or not in a compiled network."""
    if fused is not True or device.type == "meta":
        return
    if compiled:
        raise ValueError("model.fused=true does not go with compile=true, which fuses by itself: set one to false")
    if not usable():
        raise ValueError(
            "model.fused=true needs Triton and a C compiler, which are not both here: pip install triton, install gcc "
            "(or name it by CC=), or use model.fused=auto or false"
        )
    if device.type != "cuda" and not _interpreted():
        raise ValueError(
            f"model.fused=true needs a CUDA device, and this is {device.type}: use device=cuda, "
            "or model.fused=auto or false"
        )


def runs(fused: Fused, x: Tensor) -> bool:
    """Say whether a training step on `x` goes through the kernels. Raises ValueError where it must and cannot."""
    compiled = torch.compiler.is_compiling()
    check_possible(fused, x.device, compiled=compiled)
    return resolve(fused, x.device, compiled=compiled)


def resolve(fused: Fused, device: torch.device, *, compiled: bool = False) -> bool:
    """Return what `fused` comes to on a device: `auto` leaves a compiled network to its compiler."""
    if fused == "auto":
        return device.type == "cuda" and not compiled and usable() and capability(device) >= _MEASURED
    return bool(fused)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
