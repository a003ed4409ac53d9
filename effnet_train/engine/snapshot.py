"""What training goes on to change, copied to host memory: all that it waits for when a checkpoint is made."""

import copy
from typing import Any

import torch
from torch import Tensor

_Place = tuple[Any, ...]


class Snapshots:
    """Copies of nested dictionaries, lists and tuples of tensors and plain values, in memory that is used again.

    Each copy overwrites the one before. A GPU's tensors go to pinned memory, in its current stream: the host does not
    wait, and what the stream is asked for next, an update of the weights say, comes after the copy.
    """

    def __init__(self) -> None:
        self._rooms: dict[_Place, Tensor] = {}
        self._on_gpu = False
        self._copied: torch.cuda.Event | None = None

    def take(self, value: Any) -> Any:
        """Return a copy, which is complete once `wait` returns."""
        copied = self._copy(value, ())
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait, in any thread, until the last copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Any, place: _Place) -> Any:
        if isinstance(value, Tensor):
            return self._room(value, place).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # with what a module's dictionary carries beside its items: their versions
            copied.update((key, self._copy(one, (*place, key))) for key, one in value.items())
            return copied
        if isinstance(value, list | tuple):
            return type(value)(self._copy(one, (*place, index)) for index, one in enumerate(value))
        return value

    def _room(self, tensor: Tensor, place: _Place) -> Tensor:
        room = self._rooms.get(place)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = self._rooms[place] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._on_gpu = self._on_gpu or tensor.is_cuda
        return room
