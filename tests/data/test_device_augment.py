"""Every operation on a batch against the same on each image, which is held against TensorFlow's elsewhere."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_train.data import autoaugment
from effnet_train.data.autoaugment import AutoAugment, Operation, RandAugment
from effnet_train.data.decode import decode
from effnet_train.data.device_augment import _color, apply, fill, flip, plan
from effnet_train.data.keys import rng
from effnet_train.data.operations import color

NAMES = tuple(autoaugment._OPERATIONS)
# RandAugment's magnitudes may be more than 10, where operations come round again.
LEVELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 5.5, 14, 15, 17, 23, 28)
SIZES = ((1, 1), (2, 3), (3, 3), (40, 1), (17, 33), (64, 64))


def image(kind: int, width: int, height: int, generator: np.random.Generator) -> np.ndarray:
    """Return noise, a constant, grey, dull, ramps or two values only."""
    y, x = np.mgrid[0:height, 0:width]
    shape = (height, width, 3)
    pixels = (
        lambda: generator.integers(0, 256, shape),
        lambda: np.full(shape, generator.integers(0, 256)),
        lambda: np.repeat(generator.integers(0, 256, (height, width, 1)), 3, 2),
        lambda: np.clip(generator.normal(120, 15, shape), 0, 255),
        lambda: np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], 2),
        lambda: generator.choice([3, 250], shape, p=[0.99, 0.01]),
    )[kind % 6]()
    return pixels.astype(np.uint8)


def one_by_one(pixels: np.ndarray, operations: list[list[Operation]]) -> np.ndarray:
    done = []
    for one, drawn in zip(pixels, operations, strict=True):
        for operation in drawn:
            one = operation(one)
        done.append(one)
    return np.stack(done)


def on_device(pixels: np.ndarray, operations: list[list[Operation]], device: str = "cpu") -> np.ndarray:
    height, width = pixels.shape[1:3]
    images = torch.from_numpy(pixels.copy()).to(device)
    return apply(images, plan(operations, (width, height))).cpu().numpy()


def drawn(name: str, level: float, size: tuple[int, int], key: int) -> Operation:
    (operation,) = AutoAugment([[[name, 1.0, level]]]).draw(size, rng(key))
    return operation


def check_operation(name: str, sizes: tuple[tuple[int, int], ...], device: str) -> None:
    generator = np.random.default_rng(NAMES.index(name))
    for width, height in sizes:
        # Several keys: signs and places are drawn.
        operations = [[drawn(name, level, (width, height), key)] for level in LEVELS for key in range(6)]
        pixels = np.stack([image(number, width, height, generator) for number in range(len(operations))])
        found, expected = on_device(pixels, operations, device), one_by_one(pixels, operations)
        np.testing.assert_array_equal(found, expected, err_msg=f"{width} x {height}")


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_the_cpus_at_all_levels_and_sizes(name: str) -> None:
    check_operation(name, SIZES, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_the_cpus_at_a_networks_size(name: str) -> None:
    # Contrast depends on the number of pixels, and a rotation's rounding on how far they are from the middle.
    generator, size = np.random.default_rng(1), (257, 240)
    operations = [[drawn(name, level, size, key)] for key, level in enumerate((0.5, 4, 9, 15))]
    pixels = np.stack([image(number, *size, generator) for number in (0, 2, 3, 4)])
    np.testing.assert_array_equal(on_device(pixels, operations), one_by_one(pixels, operations))


def test_grey_is_pillows_for_all_colours() -> None:
    # A third of the blues: all of them take seconds, and were tried.
    red, green, blue = np.mgrid[0:256, 0:256, 0:256:3]
    pixels = np.stack([red, green, blue], -1).astype(np.uint8).reshape(1, 256 * 86, 256, 3)
    found = _color(torch.from_numpy(pixels), torch.zeros(1))[0].numpy()
    np.testing.assert_array_equal(found, color(pixels[0], 0.0))


@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment(3, 10), RandAugment(2, 28), AutoAugment(fill=7)])
def test_policies_on_a_batch_are_those_on_each_image(policy: AutoAugment | RandAugment) -> None:
    generator = np.random.default_rng(0)
    for width, height in ((1, 1), (31, 45)):
        operations = [list(policy.draw((width, height), rng(key))) for key in range(150)]
        pixels = np.stack([image(number, width, height, generator) for number in range(150)])
        np.testing.assert_array_equal(on_device(pixels, operations), one_by_one(pixels, operations))


def test_photographs(imagenet_jpegs: dict[str, bytes]) -> None:
    photographs = [decode(data).resize((120, 120)) for data in list(imagenet_jpegs.values())[:32]]
    pixels = np.stack([np.asarray(photograph) for photograph in photographs])
    for policy in (AutoAugment(), RandAugment(4, 9)):
        operations = [list(policy.draw((120, 120), rng(key))) for key in range(32)]
        np.testing.assert_array_equal(on_device(pixels, operations), one_by_one(pixels, operations))


def test_images_without_operations_are_left_alone() -> None:
    pixels = np.stack([image(0, 9, 8, np.random.default_rng(key)) for key in range(4)])
    np.testing.assert_array_equal(on_device(pixels, [[], [], [], []]), pixels)
    one = on_device(pixels, [[], [Operation("Invert", ())], [], []])
    np.testing.assert_array_equal(one[[0, 2, 3]], pixels[[0, 2, 3]])
    np.testing.assert_array_equal(one[1], 255 - pixels[1])
    assert on_device(np.empty((0, 8, 8, 3), dtype=np.uint8), []).shape == (0, 8, 8, 3)


def test_the_order_of_an_images_operations_is_kept() -> None:
    # One kind each, and none commutes with the next.
    names = ("Equalize", "Color", "Posterize", "Rotate", "Sharpness", "AutoContrast", "Cutout", "Solarize")
    chain = [drawn(name, 7, (20, 20), key) for key, name in enumerate(names)]
    generator = random.Random(0)
    operations = [generator.sample(chain, generator.randrange(len(chain) + 1)) for _ in range(60)]
    pixels = np.stack([image(number, 20, 20, np.random.default_rng(number)) for number in range(60)])
    np.testing.assert_array_equal(on_device(pixels, operations), one_by_one(pixels, operations))


def test_one_launch_serves_all_images_of_a_kind() -> None:
    # Seven kinds for sixteen operations: what a batch costs does not grow with its images.
    operations = [[drawn(name, 5, (16, 16), key)] for key, name in enumerate(NAMES * 10)]
    groups = plan(operations, (16, 16)).groups
    assert len(groups) == 7
    assert sum(group.stop - group.start for group in groups) == 160


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 40), st.integers(1, 40), st.floats(0, 30))
def test_any_magnitude(key: int, width: int, height: int, magnitude: float) -> None:
    operations = [list(RandAugment(2, magnitude).draw((width, height), rng(key + number))) for number in range(6)]
    pixels = np.stack([image(number, width, height, np.random.default_rng(key + number)) for number in range(6)])
    np.testing.assert_array_equal(on_device(pixels, operations), one_by_one(pixels, operations))


def test_flips_and_boxes() -> None:
    pixels = torch.from_numpy(np.stack([image(0, 8, 6, np.random.default_rng(key)) for key in range(3)]))
    mirrored = flip(pixels, torch.tensor([True, False, True]))
    assert torch.equal(mirrored[1], pixels[1])
    assert torch.equal(mirrored[[0, 2]], torch.from_numpy(pixels[[0, 2]].numpy()[:, :, ::-1].copy()))
    boxes = torch.tensor([[2, 1, 5, 6], [0, 0, 0, 0], [0, 0, 8, 6]])
    filled = fill(pixels, boxes, torch.tensor([[1, 2, 3]]))
    expected = pixels.clone()
    expected[0, 1:6, 2:5] = expected[2] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert torch.equal(filled, expected)


# --- on a GPU ---


@pytest.fixture
def gpu() -> str:
    """Return the GPU's name."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_pixels_on_a_gpu_are_the_cpus(gpu: str, name: str) -> None:
    check_operation(name, (*SIZES, (257, 240)), gpu)


@pytest.mark.gpu
def test_grey_on_a_gpu_is_pillows_for_all_colours(gpu: str) -> None:
    colours = np.arange(2**24, dtype=np.uint32)
    pixels = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8).reshape(1, 4096, 4096, 3)
    found = _color(torch.from_numpy(pixels).cuda(), torch.zeros(1, device="cuda"))[0].cpu().numpy()
    np.testing.assert_array_equal(found, color(pixels[0], 0.0))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu(gpu: str) -> None:
    operations = [[drawn(name, 5, (32, 32), key)] for key, name in enumerate(NAMES * 2)]
    pixels = np.stack([image(number, 32, 32, np.random.default_rng(number)) for number in range(32)])
    images = torch.from_numpy(pixels).to(gpu)
    flips = torch.arange(32) % 2 == 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = apply(flip(images, flips), plan(operations, (32, 32)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = one_by_one(np.where(flips.numpy()[:, None, None, None], pixels[:, :, ::-1], pixels), operations)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.gpu
def test_deterministic_algorithms_change_nothing_and_warn_of_nothing(gpu: str) -> None:
    operations = [[drawn(name, 5, (64, 64), key)] for key, name in enumerate(NAMES * 2)]
    pixels = np.stack([image(number, 64, 64, np.random.default_rng(number)) for number in range(32)])
    torch.use_deterministic_algorithms(True)  # an error where there is no deterministic one
    try:
        found = on_device(pixels, operations, gpu)
    finally:
        torch.use_deterministic_algorithms(False)
    np.testing.assert_array_equal(found, one_by_one(pixels, operations))
