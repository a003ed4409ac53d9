"""The evaluation crop, and from pixels to the model's input: what a checkpoint must carry to be used."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effnet_train.data.backends import FILTERS, Box, Picture, as_picture
from effnet_train.data.decode import DecodeError

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


def crop_and_resize(image: Picture | Image.Image, box: Box, preprocess: Preprocess) -> np.ndarray:
    """Cut out the box (left, top, width, height) and scale it to the square of `preprocess.resolution`: (R, R, 3)."""
    # Paper's code: TensorFlow's bicubic, which does not low-pass when it shrinks. PIL's does, and it is the one that
    # every published PyTorch score of these weights was measured with.
    return as_picture(image).resized(box, (preprocess.resolution, preprocess.resolution), preprocess.interpolation)


def central_box(width: int, height: int, preprocess: Preprocess) -> tuple[int, int, int, int]:
    """Return the evaluation crop (left, top, width, height) of an image.

    Source: tensorflow/tpu, models/official/efficientnet/preprocessing.py, _decode_and_center_crop, with the crop
    padding of 32 pixels of its first versions, which the paper's numbers come from.
    """
    resolution = preprocess.resolution
    # A strip one pixel wide would have a crop of none.
    side = max(1, min(width, height) * resolution // (resolution + preprocess.crop_padding))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def eval_image(image: Picture | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Return the evaluation crop of an RGB image at the model's resolution: (R, R, 3) uint8."""
    if preprocess.resize is None:
        return crop_and_resize(image, central_box(*image.size, preprocess), preprocess)
    # To the pixel as torchvision's transforms do: scale, then cut out the centre.
    size, scaled = preprocess.resolution, _scaled(image, preprocess.resize, preprocess)
    # Rounded half to even: of a margin of 1 or 5 pixels the smaller half lies on the left, of one of 3 the larger.
    top, left = (round((side - size) / 2) for side in scaled.shape[:2])
    return scaled[top : top + size, left : left + size]


def _scaled(image: Picture | Image.Image, shorter: int, preprocess: Preprocess) -> np.ndarray:
    if max(image.size) > _LONGEST * min(image.size):
        raise DecodeError(f"{image.size[0]} x {image.size[1]} pixels are too thin to be scaled by their shorter side")
    width, height = (shorter * side // min(image.size) for side in image.size)
    return as_picture(image).resized((0, 0, *image.size), (width, height), preprocess.interpolation)


def five_crops(image: Picture | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Return the crops at the corners (top left, top right, bottom left, bottom right) and the centre of an RGB image.

    (5, R, R, 3) uint8. The shorter side is scaled to `resize` pixels, or without it to `resolution + crop_padding`, the
    longer one in proportion, rounded down; the crops are cut out of that at the model's resolution R. So where nothing
    is cut off a square image, all five are the same. The central one has the pixels of `eval_image`, without `resize`
    but for rounding and for its border, as the paper's rule cuts first.
    Source: torchvision.transforms.FiveCrop after Resize.
    """
    size = preprocess.resolution
    shorter = size + preprocess.crop_padding if preprocess.resize is None else preprocess.resize
    scaled = _scaled(image, shorter, preprocess)
    bottom, right = scaled.shape[0] - size, scaled.shape[1] - size
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2))]
    return np.stack([scaled[top : top + size, left : left + size] for left, top in corners])


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Turn pixels (N, H, W, 3) uint8 into inputs (N, 3, H, W) float32, on their device: (x / 255 - mean) / std.

    The result is channels-last in memory, as the pixels were.
    """
    mean, std = (_constants(values, images.device) for values in (mean, std))
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


def _constants(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    constants = torch.as_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
    if device.type == "cuda" and constants.device.type == "cpu":
        # From pinned memory the copy does not make the host wait for the device.
        constants = constants.pin_memory()
    return constants.to(device, non_blocking=True)
