"""The training transform: random crop, flip, policy and erasing, all drawn from the sample's key."""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from effnet_train.data.autoaugment import Operation
from effnet_train.data.backends import Box, Picture
from effnet_train.data.keys import integer, rng, uniform
from effnet_train.data.preprocess import Preprocess, View, crop_view, eval_view, look

Policy = Callable[[np.ndarray, random.Random], np.ndarray]

_ATTEMPTS = 10
_MIN_OBJECT_COVERED = np.float32(0.1)
# Random erasing. Source: Zhong et al., "Random Erasing Data Augmentation", 2020, section 5.
_ERASE_AREA = (0.02, 0.4)
_ERASE_ASPECT = (0.3, 1 / 0.3)
_ERASE_ATTEMPTS = 100


def _attempt(width: int, height: int, area: Sequence[float], ratio: np.float32, generator: random.Random) -> Box | None:
    """Draw one crop of aspect `ratio`; None where none fits.

    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc, GenerateRandomCrop, in float32 as there.
    """
    min_area, max_area = (np.float32(share) * width * height for share in area)
    crop_height = int(np.rint(np.sqrt(min_area / ratio)))
    max_height = int(np.rint(np.sqrt(max_area / ratio)))
    if np.rint(max_height * ratio) > width:
        # The largest height whose width still fits.
        max_height = int((width + 0.5 - float(np.float32(1e-7))) / float(ratio))
        if np.rint(max_height * ratio) > width:
            max_height -= 1
    max_height = min(max_height, height)
    crop_height = min(crop_height, max_height)
    if crop_height < max_height:
        crop_height += integer(generator, max_height - crop_height + 1)
    crop_width = int(np.rint(crop_height * ratio))
    # Rounding may have put the area just outside its bounds.
    if crop_width * crop_height < min_area:
        crop_height += 1
        crop_width = int(np.rint(crop_height * ratio))
    if crop_width * crop_height > max_area:
        crop_height -= 1
        crop_width = int(np.rint(crop_height * ratio))
    if not min_area <= crop_width * crop_height <= max_area:
        return None
    if not (0 < crop_width <= width and 0 < crop_height <= height):
        return None
    # Not + 1: as in the source, a crop never touches the far edge unless it spans the image.
    top = integer(generator, height - crop_height) if crop_height < height else 0
    left = integer(generator, width - crop_width) if crop_width < width else 0
    return left, top, crop_width, crop_height


def inception_crop(
    width: int,
    height: int,
    *,
    generator: random.Random,
    area: Sequence[float] = (0.08, 1.0),
    aspect: Sequence[float] = (3 / 4, 4 / 3),
) -> Box | None:
    """Draw the crop (left, top, width, height) of an image; None where the central crop is to be used instead.

    TensorFlow's sample_distorted_bounding_box with the whole image as its box, 10 attempts: the aspect is uniform, and
    so is the *height*, between those of the least and the most area. PyTorch's RandomResizedCrop draws a uniform area
    and a uniform logarithm of the aspect: on average 0.43 of a 500 x 375 image, where this is 0.38.
    """
    low, high = np.float32(aspect[0]), np.float32(aspect[1])
    for _ in range(_ATTEMPTS):
        ratio = np.float32(generator.random()) * (high - low) + low
        box = _attempt(width, height, area, ratio, generator)
        # The authors' min_object_covered, on a box that is the whole image, rejects a crop of under a tenth of it:
        # areas from 0.08 to 0.1 are drawn, and drawn again.
        if box is not None and np.float32(box[2] * box[3]) / np.float32(width * height) >= _MIN_OBJECT_COVERED:
            # The authors take the central crop where the attempts fail, which they tell by the crop's being the
            # whole image (`bad` in their _decode_and_random_crop): so also where one succeeds with all of it.
            return None if box[2:] == (width, height) else box
    return None


def _erase_box(size: int, generator: random.Random) -> Box | None:
    for _ in range(_ERASE_ATTEMPTS):
        area = uniform(generator, *_ERASE_AREA) * size * size
        ratio = uniform(generator, *_ERASE_ASPECT)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            return integer(generator, size - width + 1), integer(generator, size - height + 1), width, height
    return None


def erase_value(preprocess: Preprocess) -> list[int]:
    """Return the colour of what is erased: the mean, which normalising makes (nearly) zero."""
    return [round(255 * value) for value in preprocess.mean]


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    pair = tuple(float(value) for value in values)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"augment.{name}={list(pair)} must be two positive numbers, the smaller first")
    return pair[0], pair[1]


class Draws(NamedTuple):
    """All that is random of an image: what is seen of it, the flip, the policy's operations, and the box erased."""

    view: View
    flip: bool = False
    operations: Sequence[Operation] = ()
    erase: Box | None = None


class Augment:
    """Turn an image into training pixels, in this order: crop, resize, flip, policy, erase.

    `area` and `aspect` bound the Inception crop; `area` None takes the evaluation crop instead, and `pad` > 0 moves
    that one by up to `pad` pixels each way, black coming in, as is usual for CIFAR. `flip` and `erase` are
    probabilities, `policy` is a function of pixels and a generator. Raises ValueError.
    """

    def __init__(
        self,
        *,
        area: Sequence[float] | None = (0.08, 1.0),
        aspect: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        pad: int = 0,
        policy: Policy | None = None,
        erase: float = 0.0,
    ) -> None:
        self.area = None if area is None else _pair("area", area)
        self.aspect = _pair("aspect", aspect)
        if self.area is not None and self.area[1] > 1:
            raise ValueError(f"augment.area={list(self.area)} must be shares of the image: at most 1")
        if pad < 0 or (pad and area is not None):
            raise ValueError(
                f"augment.pad={pad} must be 0, or positive with augment.area=null: padding takes the place of the crop"
            )
        for name, value in (("flip", flip), ("erase", erase)):
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name}={value} must be a probability: from 0 to 1")
        self.flip, self.pad, self.policy, self.erase = flip, pad, policy, erase

    def __call__(self, image: Picture | Image.Image, preprocess: Preprocess, key: int) -> np.ndarray:
        """Return the pixels (R, R, 3) uint8 of an RGB image, to be read only: a pure function of the arguments."""
        generator = rng(key)
        pixels = look(image, self._view(image.size, preprocess, generator), preprocess)[0]
        if generator.random() < self.flip:
            # Ten times as fast as numpy's copy of a reversed view.
            pixels = torch.from_numpy(pixels).flip(1).numpy()
        if self.policy is not None:
            pixels = self.policy(pixels, generator)
        box = self._erased(preprocess, generator)
        if box is not None:
            left, top, width, height = box
            pixels = pixels.copy()  # a policy's may be read-only
            pixels[top : top + height, left : left + width] = erase_value(preprocess)
        return pixels

    def draw(self, size: tuple[int, int], preprocess: Preprocess, key: int) -> Draws:
        """Return what calling this draws for an image of `size` (width, height), without the image.

        Raises ValueError for a policy that has no method `draw`.
        """
        self.check_drawable()
        generator = rng(key)
        view, flip = self._view(size, preprocess, generator), generator.random() < self.flip
        square = (preprocess.resolution, preprocess.resolution)
        operations = () if self.policy is None else self.policy.draw(square, generator)  # type: ignore[attr-defined]
        return Draws(view, flip, operations, self._erased(preprocess, generator))

    def check_drawable(self) -> None:
        """Raise ValueError where the policy can only be applied, and not drawn beforehand."""
        if self.policy is not None and not hasattr(self.policy, "draw"):
            raise ValueError(
                f"augment.policy={type(self.policy).__name__} has no method draw(size, generator), which says what it "
                "does without doing it: use AutoAugment or RandAugment, or a data.backend that augments on the CPU"
            )

    def _view(self, size: tuple[int, int], preprocess: Preprocess, generator: random.Random) -> View:
        box = None
        if self.area is not None:
            box = inception_crop(*size, generator=generator, area=self.area, aspect=self.aspect)
        if box is not None:
            return crop_view(box, preprocess)
        view = eval_view(size, preprocess)
        if not self.pad:
            return view
        right, down = (integer(generator, 2 * self.pad + 1) - self.pad for _ in range(2))
        return view._replace(shift=(right, down))

    def _erased(self, preprocess: Preprocess, generator: random.Random) -> Box | None:
        return _erase_box(preprocess.resolution, generator) if generator.random() < self.erase else None
