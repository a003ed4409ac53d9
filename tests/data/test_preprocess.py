"""The evaluation crop against the authors' arithmetic, timm and torchvision, normalisation against torchvision."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.models import get_model_weights
from torchvision.transforms import FiveCrop, InterpolationMode, Resize
from torchvision.transforms import functional as tv

from effnet_train.data.decode import DecodeError, decode
from effnet_train.data.preprocess import (
    Preprocess,
    central_box,
    crop_and_resize,
    eval_image,
    five_crops,
    normalize,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "crops.npz"


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_central_crop_has_the_side_that_tensorflow_computes() -> None:
    golden = np.load(GOLDEN)
    for resolution, sides in zip(golden["resolutions"].tolist(), golden["sides"], strict=True):
        preprocess = Preprocess(resolution)
        found = [central_box(s, s + 10, preprocess)[2:] for s in golden["shorter"].tolist()]
        assert found == [(side, side) for side in np.maximum(sides, 1).tolist()]


@pytest.mark.parametrize(
    ("size", "padding", "box"),
    [
        ((500, 375), 32, (86, 24, 328, 328)),  # 375 * 224 / 256 = 328.1; (500 - 328 + 1) // 2, (375 - 328 + 1) // 2
        ((375, 500), 32, (24, 86, 328, 328)),
        ((256, 256), 32, (16, 16, 224, 224)),
        ((257, 256), 32, (17, 16, 224, 224)),
        ((500, 375), 0, (63, 0, 375, 375)),
        ((1, 40), 32, (0, 20, 1, 1)),
    ],
)
def test_central_crop_lies_where_the_authors_put_it(
    size: tuple[int, int], padding: int, box: tuple[int, int, int, int]
) -> None:
    assert central_box(*size, Preprocess(224, crop_padding=padding)) == box


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_eval_image_equals_torchvision_on_the_same_crop(interpolation: str) -> None:
    image = noise(150, 100)
    preprocess = Preprocess(64, crop_padding=32, interpolation=interpolation)
    left, top, side, _ = central_box(150, 100, preprocess)
    mode = InterpolationMode(interpolation)
    expected = tv.resized_crop(image, top, left, side, side, [64, 64], interpolation=mode)
    found = eval_image(image, preprocess)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    assert (found == np.asarray(expected)).all()


SIZES = [(500, 375), (375, 500), (333, 217), (217, 334), (64, 64), (31, 40), (97, 500), (1, 9)]


def pixels_of(transformed: torch.Tensor) -> np.ndarray:
    """Return the pixels under a transform's normalisation, which takes mean 0 and deviation 1."""
    return (transformed * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize(("resolution", "crop_pct"), [(64, 0.875), (61, 0.9), (48, 1.0), (63, 0.904)])
def test_resizing_first_gives_timms_pixels(resolution: int, crop_pct: float, interpolation: str) -> None:
    preprocess = Preprocess(resolution, resize=int(resolution / crop_pct), interpolation=interpolation)
    transform = create_transform(
        (3, resolution, resolution),
        **{"interpolation": interpolation, "crop_pct": crop_pct, "mean": (0, 0, 0), "std": (1, 1, 1)},
    )
    for size in SIZES:
        image = noise(*size)
        assert (eval_image(image, preprocess) == pixels_of(transform(image))).all(), size


@pytest.mark.parametrize(
    ("name", "resolution", "resize"),
    [("b0", 224, 256), ("b1", 240, 255), ("b2", 288, 288), ("b3", 300, 320), ("b4", 380, 384)],
)
def test_resizing_first_gives_torchvisions_pixels(name: str, resolution: int, resize: int) -> None:
    entry = get_model_weights(f"efficientnet_{name}").DEFAULT
    transform = entry.transforms(mean=(0, 0, 0), std=(1, 1, 1))
    preprocess = Preprocess(resolution, resize=resize, interpolation=transform.interpolation.value)
    for size in SIZES:
        image = noise(*size)
        assert (eval_image(image, preprocess) == pixels_of(transform(image))).all(), size


def test_inputs_from_real_jpegs_equal_timm_and_torchvision(imagenet_jpegs: dict[str, bytes]) -> None:
    entry = get_model_weights("efficientnet_b1").DEFAULT
    transforms = (
        (create_transform((3, 260, 260), interpolation="bicubic", crop_pct=0.89), Preprocess(260, resize=292)),
        (entry.transforms(), Preprocess(240, resize=255, interpolation="bilinear")),
    )
    for data in list(imagenet_jpegs.values())[:8]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for transform, preprocess in transforms:
            pixels = torch.from_numpy(eval_image(decode(data), preprocess))
            found = normalize(pixels[None], preprocess.mean, preprocess.std)
            torch.testing.assert_close(found, transform(image)[None], rtol=0, atol=1e-6)


def test_the_rule_is_the_same_at_another_resolution() -> None:
    assert Preprocess(224).at(320) == Preprocess(320)
    assert Preprocess(224, crop_padding=0, mean=(0, 0, 0)).at(64) == Preprocess(64, crop_padding=0, mean=(0, 0, 0))
    for resolution in (224, 240, 380):
        there = Preprocess(224, resize=256).at(resolution)
        assert (there.resolution, there.resize) == (resolution, int(resolution / 0.875))  # as timm would
    assert Preprocess(288, resize=288).at(320).resize == 320
    assert Preprocess(224, resize=256).at(224) == Preprocess(224, resize=256)


def test_pixels_outside_the_crop_do_not_bleed_in() -> None:
    pixels = np.full((60, 60, 3), 255, dtype=np.uint8)
    pixels[20:40, 20:40] = 0
    found = crop_and_resize(Image.fromarray(pixels), (20, 20, 20, 20), Preprocess(50))
    assert not np.asarray(found).any()


@pytest.mark.parametrize("size", [(150, 100), (100, 150), (87, 203), (96, 96), (97, 96), (40, 61), (33, 32)])
@pytest.mark.parametrize(("resolution", "padding"), [(64, 32), (65, 32), (48, 0), (61, 7)])
def test_five_crops_are_torchvisions(size: tuple[int, int], resolution: int, padding: int) -> None:
    image = noise(*size)
    scaled = Resize(resolution + padding, InterpolationMode.BICUBIC)(image)
    expected = np.stack([np.asarray(crop) for crop in FiveCrop(resolution)(scaled)])
    found = five_crops(image, Preprocess(resolution, crop_padding=padding))
    assert found.shape == (5, resolution, resolution, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    # With the rule of timm and torchvision, their size counts, and the central crop is the evaluation crop.
    other = Preprocess(resolution, crop_padding=3, resize=resolution + padding)
    np.testing.assert_array_equal(five_crops(image, other), expected)
    np.testing.assert_array_equal(expected[4], eval_image(image, other))


def test_the_five_crops_centre_is_the_evaluation_crop_but_for_rounding() -> None:
    gradient = np.linspace(0, 255, 300)[None, :, None] + np.linspace(0, -60, 200)[:, None, None] + np.zeros(3)
    image = Image.fromarray(gradient.clip(0, 255).astype(np.uint8))
    preprocess = Preprocess(64)
    *corners, centre = five_crops(image, preprocess).astype(int)
    expected = eval_image(image, preprocess).astype(int)
    assert abs(centre - expected).max() <= 2
    assert min(abs(corner - expected).max() for corner in corners) > 10


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 64, 64, 3)])
def test_the_kernel_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton", reason="Triton is not here: pip install triton")
    from effnet_train.data.pixels_kernel import normalised

    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels.view(-1)[: 256 // 3 * 3] = torch.arange(256 // 3 * 3, dtype=torch.uint8)[: pixels.numel()]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = normalised(pixels, mean, std)
    assert torch.equal(found, normalize(pixels, mean, std))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 3).view(1, 48, 16, 3)
    found = normalize(pixels.cuda(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.equal(found.cpu(), normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def test_normalize_equals_torchvision_and_stays_channels_last() -> None:
    preprocess = Preprocess(24)
    images = torch.randint(0, 256, (2, 24, 20, 3), dtype=torch.uint8)
    found = normalize(images, preprocess.mean, preprocess.std)
    expected = tv.normalize(images.permute(0, 3, 1, 2) / 255, list(preprocess.mean), list(preprocess.std))
    assert found.shape == (2, 3, 24, 20)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    again = normalize(images, torch.tensor(preprocess.mean), torch.tensor(preprocess.std))
    assert torch.equal(found, again)


def test_lite_normalisation_is_within_reach() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    found = normalize(images, [127 / 255] * 3, [128 / 255] * 3)
    expected = (images.permute(0, 3, 1, 2).float() - 127) / 128
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_survives_json_and_pickle_and_hashes() -> None:
    preprocess = Preprocess(300, mean=[0.5, 0.5, 0.5], std=[1, 1, 1], interpolation="bilinear")  # type: ignore[arg-type]
    assert Preprocess(**json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
    assert hash(preprocess) == hash(Preprocess(300, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), interpolation="bilinear"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resolution": 0}, "preprocess.resolution=0 must be a whole number of at least 1"),
        ({"resolution": 22.5}, "preprocess.resolution=22.5 must be a whole number"),
        ({"crop_padding": -1}, "preprocess.crop_padding=-1 must be a whole number of at least 0"),
        ({"resize": 223}, "preprocess.resize=223 must be a whole number of at least 224"),
        ({"resize": 256.5}, "preprocess.resize=256.5 must be a whole number of at least 224"),
        ({"mean": [0.5]}, r"preprocess.mean=\[0.5\] must have three values"),
        ({"std": [1, 0, 1]}, r"preprocess.std=\[1.0, 0.0, 1.0\] must be positive"),
        ({"interpolation": "area"}, "preprocess.interpolation='area' is none of bicubic, bilinear, nearest, lanczos"),
    ],
)
def test_wrong_values_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"resolution": 224, **wrong})


def test_an_image_too_thin_to_be_scaled_is_a_corrupt_one():
    """A few hundred bytes must not ask for gigabytes."""
    thin = Image.new("RGB", (60_000, 1))
    assert eval_image(thin, Preprocess(8)).shape == (8, 8, 3)  # what cuts first has no such trouble
    with pytest.raises(DecodeError, match="60000 x 1 pixels are too thin to be scaled by their shorter side"):
        eval_image(thin, Preprocess(8, resize=9))
