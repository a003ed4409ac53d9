"""The random crop against TensorFlow's, draw for draw; the rest of the training transform by its properties."""

import functools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from effnet_train.data import augment
from effnet_train.data.augment import Augment, inception_crop
from effnet_train.data.autoaugment import AutoAugment
from effnet_train.data.keys import rng
from effnet_train.data.preprocess import Preprocess, eval_image

GOLDEN = Path(__file__).parents[1] / "golden" / "crops.npz"
NONE = functools.partial(Augment, area=None, flip=0.0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Replay(random.Random):
    """Draws as TensorFlow's SimplePhilox does, from a recorded stream of 32-bit numbers."""

    def __new__(cls, stream: np.ndarray) -> "Replay":
        return super().__new__(cls)

    def __init__(self, stream: np.ndarray) -> None:
        self.stream: Iterator[int] = iter(stream.tolist())

    def random(self) -> float:
        return (next(self.stream) & 0x7FFFFF) / 2**23

    def integer(self, n: int) -> int:
        if n & (n - 1) == 0:
            return next(self.stream) & (n - 1)
        limit = 0xFFFFFFFF - (0xFFFFFFFF % n + 1)
        return next(value for value in self.stream if value <= limit) % n


def test_crops_are_tensorflows_given_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "integer", lambda generator, n: generator.integer(n))
    golden = np.load(GOLDEN)
    whole = 0
    for (width, height), boxes in zip(golden["sizes"].tolist(), golden["boxes"].tolist(), strict=True):
        for stream, box in zip(golden["streams"], boxes, strict=True):
            found = inception_crop(width, height, generator=Replay(stream))
            whole += found is None
            assert (found or (0, 0, width, height)) == tuple(box), (width, height)
    assert 0 < whole < golden["boxes"].size / 8


def crops(width: int, height: int, count: int) -> np.ndarray:
    boxes = [inception_crop(width, height, generator=rng(key)) for key in range(count)]
    return np.array([box for box in boxes if box])


def worst_quantile(boxes: np.ndarray, size: tuple[int, int]) -> float:
    """Return how far the quantiles of area or aspect are from TensorFlow's, at most."""
    golden = np.load(GOLDEN)
    expected = golden[f"quantiles/{size[0]}x{size[1]}"]
    measures = boxes[:, 2] * boxes[:, 3] / math.prod(size), boxes[:, 2] / boxes[:, 3]
    return max(np.abs(np.quantile(m, golden["levels"]) - e).max() for m, e in zip(measures, expected, strict=True))


@pytest.mark.parametrize("size", [(500, 375), (64, 64)])
def test_crops_are_distributed_as_tensorflows_and_not_as_torchvisions(size: tuple[int, int]) -> None:
    assert worst_quantile(crops(*size, 10_000), size) < 0.025
    image = np.empty((3, size[1], size[0]), dtype=np.uint8)
    tensor = torch.from_numpy(image)
    drawn = [RandomResizedCrop.get_params(tensor, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    torchvisions = np.array([(left, top, width, height) for top, left, height, width in drawn])
    assert worst_quantile(torchvisions, size) > 0.05


def test_crops_of_less_than_a_tenth_are_drawn_again() -> None:
    boxes = crops(500, 375, 5000)
    area = boxes[:, 2] * boxes[:, 3] / (500 * 375)
    assert 0.1 <= area.min() < 0.103


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_crop_is_always_inside_the_image(width: int, height: int, key: int) -> None:
    box = inception_crop(width, height, generator=rng(key))
    if box is not None:
        left, top, w, h = box
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert min(w, h) >= 1
        assert (w, h) != (width, height)
        # Rounding moves the width by half a pixel, the fix-ups the height by one.
        assert (w + 0.6) / h >= 3 / 4
        assert (w - 0.6) / h <= 4 / 3


def test_where_no_crop_fits_the_central_one_is_taken() -> None:
    image = noise(300, 10)  # the largest crop of aspect 4/3 is 4 % of it
    assert inception_crop(300, 10, generator=rng(0)) is None
    preprocess = Preprocess(16)
    assert (Augment(flip=0.0)(image, preprocess, 0) == eval_image(image, preprocess)).all()


def test_the_same_key_gives_the_same_pixels_and_another_key_others() -> None:
    image, preprocess = noise(90, 70), Preprocess(48)
    transform = Augment(policy=AutoAugment(), erase=0.5)
    first = transform(image, preprocess, 5)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    assert (first == transform(image, preprocess, 5)).all()
    assert len({transform(image, preprocess, key).tobytes() for key in range(20)}) > 18


def test_the_image_itself_is_left_alone() -> None:
    image = noise(32, 32)
    before = image.tobytes()
    for key in range(60):
        Augment(area=None, policy=AutoAugment(), erase=1.0)(image, Preprocess(32, crop_padding=0), key)
    assert image.tobytes() == before


def test_flips_the_share_asked_for() -> None:
    image, preprocess = noise(32, 32), Preprocess(32, crop_padding=0)
    straight = eval_image(image, preprocess)
    found = [NONE(flip=0.25)(image, preprocess, key) for key in range(2000)]
    flipped = sum((pixels == straight[:, ::-1]).all() for pixels in found)
    assert flipped + sum((pixels == straight).all() for pixels in found) == 2000
    assert abs(flipped - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)
    assert (NONE()(image, preprocess, 1) == straight).all()


def test_padding_shifts_evenly_and_brings_in_black() -> None:
    image, preprocess = noise(16, 16), Preprocess(16, crop_padding=0)
    padded = np.pad(eval_image(image, preprocess), ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 16, x : x + 16].tobytes(): (x, y) for x in range(5) for y in range(5)}
    counts = dict.fromkeys(windows.values(), 0)
    for key in range(2500):
        counts[windows[NONE(pad=2)(image, preprocess, key).tobytes()]] += 1
    assert len(counts) == 25
    assert all(abs(count - 100) < 50 for count in counts.values())


def test_policy_follows_the_flip_and_precedes_erasing() -> None:
    seen = []

    def policy(pixels: np.ndarray, generator: random.Random) -> np.ndarray:
        seen.append(pixels.copy())
        return np.broadcast_to(np.array([1, 2, 3], dtype=np.uint8), pixels.shape)  # read-only

    image, preprocess = noise(32, 32), Preprocess(32, crop_padding=0)
    found = NONE(flip=1.0, policy=policy, erase=1.0)(image, preprocess, 0)
    assert (seen[0] == eval_image(image, preprocess)[:, ::-1]).all()
    values = {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()}
    assert values == {(1, 2, 3), (124, 116, 104)}


def test_erases_the_share_and_the_area_asked_for() -> None:
    image, preprocess = Image.new("RGB", (64, 64)), Preprocess(64, crop_padding=0, mean=(1, 1, 1))
    erased = np.array([(NONE(erase=0.4)(image, preprocess, key)[..., 0] == 255).mean() for key in range(2000)])
    share = (erased > 0).mean()
    assert abs(share - 0.4) < 5 * math.sqrt(0.4 * 0.6 / 2000)
    areas = erased[erased > 0]
    assert 0.015 < areas.min() < 0.03
    assert 0.35 < areas.max() < 0.42
    # Zhong et al. draw the area evenly from 0.02 to 0.4; the few that do not fit are large.
    assert 0.17 < areas.mean() < 0.215


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"area": [0.5, 0.1]}, r"augment.area=\[0.5, 0.1\] must be two positive numbers, the smaller first"),
        ({"area": [0.5, 2]}, r"augment.area=\[0.5, 2.0\] must be shares of the image"),
        ({"aspect": [1]}, r"augment.aspect=\[1.0\] must be two positive numbers"),
        ({"flip": 1.5}, "augment.flip=1.5 must be a probability"),
        ({"erase": -0.1}, "augment.erase=-0.1 must be a probability"),
        ({"pad": 4}, "augment.pad=4 must be 0, or positive with augment.area=null"),
    ],
)
def test_wrong_values_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**wrong)
