"""Flip, AutoAugment, RandAugment and erasing of a whole batch on its device, with the pixels of the CPU's.

What is drawn is drawn by `augment.Augment.draw`, from each sample's key; here it is done, images of one kind of
operation together. Nothing waits for the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from effnet_train.data.autoaugment import Operation
from effnet_train.data.operations import GREY, MATRICES, blend_constant, contrast_constant

# What an operation needs at most: a matrix and the value of pixels from outside.
_NUMBERS = 7
# Every value of a channel once.
_RAMP = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)


def pinned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in memory from which a device copies by itself."""
    return tensor.pin_memory() if tensor.numel() and not tensor.is_pinned() else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it."""
    if device.type == "cuda":
        tensor = pinned(tensor)
    return tensor.to(device, non_blocking=True)


class Group(NamedTuple):
    """Images to which one kind of operation is applied at once: places `start` to before `stop` of the arrays."""

    kind: str
    start: int
    stop: int


class Steps(NamedTuple):
    """The operations of a batch in groups, to be applied one group after another.

    Of each operation: its image in `rows` (S,) int64, `numbers` (S, 7) float32, `tables` (S, 1, 256) uint8.
    """

    groups: tuple[Group, ...]
    rows: Tensor
    numbers: Tensor
    tables: Tensor


def plan(operations: Sequence[Sequence[Operation]], size: tuple[int, int]) -> Steps:
    """Return the steps for each image's operations, in their order; all images are of `size` (width, height)."""
    groups: list[Group] = []
    rows: list[int] = []
    numbers: list[tuple[float, ...]] = []
    tables: list[np.ndarray] = []
    for layer in range(max(map(len, operations), default=0)):
        here = [(_kind(drawn[layer]), row) for row, drawn in enumerate(operations) if len(drawn) > layer]
        for kind in dict.fromkeys(kind for kind, _ in sorted(here)):
            chosen = [row for found, row in here if found == kind]
            groups.append(Group(kind, len(rows), len(rows) + len(chosen)))
            rows += chosen
            for row in chosen:
                operation = operations[row][layer]
                values = _values(kind, operation, size)
                numbers.append((*values, *[0.0] * (_NUMBERS - len(values))))
                tables.append(_table(operation, size) if kind == "table" else _NO_TABLE)
    return Steps(
        tuple(groups),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(numbers, dtype=torch.float32).reshape(-1, _NUMBERS),
        torch.from_numpy(np.array(tables, dtype=np.uint8).reshape(-1, 1, 256)),
    )


def apply(images: Tensor, steps: Steps) -> Tensor:
    """Apply the steps to images (N, H, W, 3) uint8, in place, and return them."""
    device = images.device
    rows, numbers, tables = (send(tensor, device) for tensor in (steps.rows, steps.numbers, steps.tables))
    for kind, start, stop in steps.groups:
        chosen = rows[start:stop]
        changed = _KINDS[kind](images[chosen], numbers[start:stop], tables[start:stop])
        images.index_copy_(0, chosen, changed)
    return images


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Return images (N, H, W, 3), mirrored where `flips` (N,) says so."""
    return torch.where(send(flips, images.device)[:, None, None, None], images.flip(2), images)


def fill(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    """Return images (N, H, W, 3) uint8 with the boxes (N, 4: left, top, right, bottom) of a colour each (N, 1 or 3)."""
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    y = torch.arange(images.shape[1], device=images.device)[:, None]
    x = torch.arange(images.shape[2], device=images.device)
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return torch.where(inside[..., None], values[:, None, None].to(torch.uint8), images)


# --- what is worked out on the CPU ---


def _kind(operation: Operation) -> str:
    if operation.name in MATRICES:
        return "project"
    return _NAMES.get(operation.name, "table")


def _values(kind: str, operation: Operation, size: tuple[int, int]) -> tuple[float, ...]:
    """Return the numbers that an operation takes."""
    if kind == "project":
        amount, outside = operation.arguments
        return (*MATRICES[operation.name](size, amount), outside)
    if kind == "fill":
        pad, (x, y), value = operation.arguments
        # As `operations.cutout`, whose box of no pixels pastes none either.
        return max(0, x - pad), max(0, y - pad), x + pad, y + pad, value
    return operation.arguments if kind in ("color", "sharpness") else ()


@functools.lru_cache(maxsize=256)
def _table(operation: Operation, size: tuple[int, int]) -> np.ndarray:
    """Return the value (256,) of each value, for an operation to which each pixel is alone."""
    if operation.name == "Contrast":
        done = blend_constant(_RAMP, contrast_constant(size), *operation.arguments)
    else:
        done = operation(_RAMP)
    return done[0, :, 0]


# --- what is done on the device: images (n, H, W, 3) uint8, numbers (n, 7), tables (n, 1, 256) to images ---


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return the values in tables (n, 1 or 3, 256) uint8, of all channels or one each."""
    channels = torch.arange(tables.shape[1], device=images.device) * 256
    places = images.to(torch.int64) + channels
    return tables.flatten(1).gather(1, places.flatten(1)).view(images.shape)


def _equalize(images: Tensor) -> Tensor:
    count, height, width, _ = images.shape
    bins = torch.arange(count * 3, device=images.device).view(count, 1, 1, 3) * 256 + images
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand(bins.numel())
    # Counting in whole numbers is the same in any order, and so the same every time.
    found = torch.zeros(count * 3 * 256, dtype=torch.int32, device=images.device)
    counts = found.scatter_add_(0, bins.flatten(), ones).view(count, 3, 256).to(torch.int64)
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    steps = (height * width - counts.gather(-1, last)) // 255
    tables = (steps // 2 + counts.cumsum(-1) - counts) // steps.clamp(min=1)
    return _look_up(images, torch.where(steps > 0, tables, levels).clamp(0, 255).to(torch.uint8))


def _autocontrast(images: Tensor) -> Tensor:
    low, high = (bound[..., None].to(torch.float32) for bound in (images.amin((1, 2)), images.amax((1, 2))))
    values = torch.arange(256, dtype=torch.float32, device=images.device)
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    tables = torch.where(high > low, values * scale - low * scale, values)
    return _look_up(images, tables.clamp(0, 255).to(torch.uint8))


def _blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """Return first + factor * (second - first), cut to [0, 255] and towards zero, as Pillow blends."""
    first, second = first.to(torch.float32), second.to(torch.float32)
    return (first + factor[:, None, None, None] * (second - first)).clamp(0, 255).to(torch.uint8)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = images.to(torch.float32).unbind(-1)
    # In Pillow's order, which rounds after each addition.
    grey = red * GREY[0] + green * GREY[1] + blue * GREY[2] + GREY[3] + 0.5
    return _blend(grey.clamp(0, 255).to(torch.uint8)[..., None], images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    smooth = images.clone()
    height, width = (side - 2 for side in images.shape[1:3])
    if height > 0 and width > 0:
        values = images.to(torch.float32)
        thin, thick = values * (1 / 13), values * (5 / 13)
        total = torch.zeros_like(values[:, 1:-1, 1:-1])
        # In TensorFlow's order: where the sum is a whole number, its rounding decides which one it is cut to.
        for y in range(3):
            for x in range(3):
                total += (thick if y == x == 1 else thin)[:, y : y + height, x : x + width]
        smooth[:, 1:-1, 1:-1] = total.to(torch.uint8)
    return _blend(smooth, images, factor)


def _project(images: Tensor, numbers: Tensor) -> Tensor:
    """Do as `operations._project`; the numbers are the matrix and the value of pixels from outside."""
    count, height, width, _ = images.shape
    a, b, c, d, e, f, outside = numbers[:, :, None, None].unbind(1)
    x = torch.arange(width, dtype=torch.float32, device=images.device)
    y = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    # Products and sums one by one: a multiply-add that rounds once would find another neighbour now and then.
    column, row = (_rounded(across * x + down * y + by) for across, down, by in ((a, b, c), (d, e, f)))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    places = torch.arange(count, device=images.device)[:, None, None]
    found = images[places, row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return torch.where(inside[..., None], found, outside[..., None].to(torch.uint8))


def _rounded(values: Tensor) -> Tensor:
    """Return whole numbers int64, halves away from zero."""
    # Far outside is outside too, and fits an integer.
    return (values + torch.full_like(values, 0.5).copysign(values)).clamp(-1e6, 1e6).to(torch.int64)


_NO_TABLE = np.zeros(256, dtype=np.uint8)
_NAMES = {
    "Equalize": "equalize",
    "AutoContrast": "autocontrast",
    "Color": "color",
    "Sharpness": "sharpness",
    "Cutout": "fill",
}
_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "table": lambda images, numbers, tables: _look_up(images, tables),
    "equalize": lambda images, numbers, tables: _equalize(images),
    "autocontrast": lambda images, numbers, tables: _autocontrast(images),
    "color": lambda images, numbers, tables: _color(images, numbers[:, 0]),
    "sharpness": lambda images, numbers, tables: _sharpness(images, numbers[:, 0]),
    "project": lambda images, numbers, tables: _project(images, numbers),
    "fill": lambda images, numbers, tables: fill(images, numbers[:, :4], numbers[:, 4:5]),
}
