"""The evaluation crop, and from pixels to the model's input: what a checkpoint must carry to be used."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effnet_train.data.backends import FILTERS, Box, Picture, as_picture
from effnet_train.data.decode import DecodeError
from effnet_train.kernels import usable

_LONGEST = 100  # times the shorter side: what is scaled as a whole must not be made to fill the memory
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How images become inputs: `resolution` pixels square, mean and std of pixels in [0, 1].

    The evaluation crop is the central square of `resolution / (resolution + crop_padding)` of the shorter side;
    with crop_padding 0, all of it. With `resize`, timm's and torchvision's rule is used instead: scale the shorter side
    to so many pixels, then cut out the central square of `resolution`. Raises ValueError.
    """

    resolution: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_padding: int = 32
    interpolation: str = "bicubic"
    resize: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("crop_padding", 0), ("resize", self.resolution)):
            value = getattr(self, name)
            if name == "resize" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"preprocess.{name}={value!r} must be a whole number of at least {least}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"preprocess.{name}={list(values)} must have three values: red, green, blue")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"preprocess.{name}={list(values)} must be finite numbers")
            # Lists, as they come out of JSON and YAML, would be unequal to the same preprocessing made in Python.
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"preprocess.std={list(self.std)} must be positive; for no scaling give [1, 1, 1]")
        if self.interpolation not in FILTERS:
            raise ValueError(f"preprocess.interpolation={self.interpolation!r} is none of {', '.join(FILTERS)}")

    def at(self, resolution: int) -> "Preprocess":
        """Return the same rule at another resolution: `resize` keeps its proportion to it, rounded down as in timm."""
        resize = None if self.resize is None else self.resize * resolution // self.resolution
        return replace(self, resolution=resolution, resize=resize)

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class View(NamedTuple):
    """What is seen of an image: its `box` (left, top, width, height), scaled to `size` (width, height).

    Of that, squares of the model's resolution R are cut out at `corners` (left, top), and their windows moved by
    `shift` pixels to the right and down: what comes in is black.
    """

    box: Box
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...] = ((0, 0),)
    shift: tuple[int, int] = (0, 0)

    def cut(self, scaled: np.ndarray, resolution: int) -> np.ndarray:
        """Return the squares of the scaled box (height, width, 3): (corners, R, R, 3)."""
        squares = [scaled[top : top + resolution, left : left + resolution] for left, top in self.corners]
        pixels = squares[0][None] if len(squares) == 1 else np.stack(squares)
        if self.shift == (0, 0):
            return pixels
        right, down = self.shift
        left, top = max(0, -right), max(0, -down)
        padded = np.pad(pixels, ((0, 0), (top, max(0, down)), (left, max(0, right)), (0, 0)))
        return padded[:, top + down :, left + right :][:, :resolution, :resolution]


def crop_view(box: Box, preprocess: Preprocess) -> View:
    """Return the view of a box scaled to the square of `preprocess.resolution`."""
    return View(box, (preprocess.resolution, preprocess.resolution))


def look(image: Picture | Image.Image, view: View, preprocess: Preprocess) -> np.ndarray:
    """Return the pixels (corners, R, R, 3) uint8 of a view of an RGB image."""
    # Paper's code: TensorFlow's bicubic, which does not low-pass when it shrinks. PIL's does, and it is the one that
    # every published PyTorch score of these weights was measured with.
    scaled = as_picture(image).resized(view.box, view.size, preprocess.interpolation)
    return view.cut(scaled, preprocess.resolution)


def crop_and_resize(image: Picture | Image.Image, box: Box, preprocess: Preprocess) -> np.ndarray:
    """Cut out the box (left, top, width, height) and scale it to the square of `preprocess.resolution`: (R, R, 3)."""
    return look(image, crop_view(box, preprocess), preprocess)[0]


def central_box(width: int, height: int, preprocess: Preprocess) -> tuple[int, int, int, int]:
    """Return the evaluation crop (left, top, width, height) of an image.

    Source: tensorflow/tpu, models/official/efficientnet/preprocessing.py, _decode_and_center_crop, with the crop
    padding of 32 pixels of its first versions, which the paper's numbers come from.
    """
    resolution = preprocess.resolution
    # A strip one pixel wide would have a crop of none.
    side = max(1, min(width, height) * resolution // (resolution + preprocess.crop_padding))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def eval_view(size: tuple[int, int], preprocess: Preprocess) -> View:
    """Return the evaluation crop of an image of `size` (width, height). Raises DecodeError for a thin one."""
    if preprocess.resize is None:
        return crop_view(central_box(*size, preprocess), preprocess)
    # To the pixel as torchvision's transforms do: scale, then cut out the centre.
    scaled = _scaled(size, preprocess.resize)
    # Rounded half to even: of a margin of 1 or 5 pixels the smaller half lies on the left, of one of 3 the larger.
    left, top = (round((side - preprocess.resolution) / 2) for side in scaled)
    return View((0, 0, *size), scaled, ((left, top),))


def five_views(size: tuple[int, int], preprocess: Preprocess) -> View:
    """Return the five crops of an image of `size` (width, height), see `five_crops`."""
    shorter = preprocess.resolution + preprocess.crop_padding if preprocess.resize is None else preprocess.resize
    scaled = _scaled(size, shorter)
    right, bottom = (side - preprocess.resolution for side in scaled)
    corners = ((0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2)))
    return View((0, 0, *size), scaled, corners)


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    if max(size) > _LONGEST * min(size):
        raise DecodeError(f"{size[0]} x {size[1]} pixels are too thin to be scaled by their shorter side")
    width, height = (shorter * side // min(size) for side in size)
    return width, height


def eval_image(image: Picture | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Return the evaluation crop of an RGB image at the model's resolution: (R, R, 3) uint8."""
    return look(image, eval_view(image.size, preprocess), preprocess)[0]


def five_crops(image: Picture | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Return the crops at the corners (top left, top right, bottom left, bottom right) and the centre of an RGB image.

    (5, R, R, 3) uint8. The shorter side is scaled to `resize` pixels, or without it to `resolution + crop_padding`, the
    longer one in proportion, rounded down; the crops are cut out of that at the model's resolution R. So where nothing
    is cut off a square image, all five are the same. The central one has the pixels of `eval_image`, without `resize`
    but for rounding and for its border, as the paper's rule cuts first.
    Source: torchvision.transforms.FiveCrop after Resize.
    """
    return look(image, five_views(image.size, preprocess), preprocess)


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Turn pixels (N, H, W, 3) uint8 into inputs (N, 3, H, W) float32, on their device: (x / 255 - mean) / std.

    The result is channels-last in memory, as the pixels were.
    """
    mean, std = (_constants(values, images.device) for values in (mean, std))
    if images.is_cuda and usable():
        from effnet_train.data.pixels_kernel import normalised

        return normalised(images, mean, std)
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


def _constants(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    constants = torch.as_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
    if device.type == "cuda" and constants.device.type == "cpu":
        # From pinned memory the copy does not make the host wait for the device.
        constants = constants.pin_memory()
    return constants.to(device, non_blocking=True)
