"""A copy in host memory of what a checkpoint holds, taken while training waits."""

from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies nested dictionaries, lists and tuples of tensors and plain values, into the same memory every time.

    What a GPU holds goes to pinned memory. The next copy overwrites the one before.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._used = 0

    def __call__(self, value: Any) -> Any:
        """Return the copy, complete."""
        self._used = 0
        copied = self._copy(value)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._room(value).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._copy, value))
        return value

    def _room(self, tensor: Tensor) -> Tensor:
        place, self._used = self._used, self._used + 1
        if place == len(self._tensors):
            self._tensors.append(torch.empty(0))
        room = self._tensors[place]
        if room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._tensors[place] = room
        return room
