"""Every operation, level and policy against the authors' code run by TensorFlow."""

import json
import math
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from effnet_train.data import autoaugment, operations
from effnet_train.data.autoaugment import AutoAugment, RandAugment
from effnet_train.data.keys import rng

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "autoaugment.npz")
META = json.loads(str(GOLDEN["meta"]))
FUNCTIONS = {
    "AutoContrast": operations.autocontrast,
    "Equalize": operations.equalize,
    "Invert": operations.invert,
    "Rotate": operations.rotate,
    "Posterize": operations.posterize,
    "Solarize": operations.solarize,
    "SolarizeAdd": operations.solarize_add,
    "Color": operations.color,
    "Contrast": operations.contrast,
    "Brightness": operations.brightness,
    "Sharpness": operations.sharpness,
    "ShearX": operations.shear_x,
    "ShearY": operations.shear_y,
    "TranslateX": operations.translate_x,
    "TranslateY": operations.translate_y,
    "Cutout": operations.cutout,
}


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def results(case: list) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (image, ours, TensorFlow's) for each golden image."""
    place = META["cases"].index(case)
    images = [(GOLDEN[name], GOLDEN[f"{name}/results"][place]) for name in ("noise", "waves", "dull")]
    return [(i, FUNCTIONS[case[0]](i, *case[1:]), expected) for i, expected in images]


@pytest.mark.parametrize("case", META["cases"], ids=str)
def test_pixels_equal_tensorflows(case: list) -> None:
    for _, found, expected in results(case):
        assert (found == expected).all()


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_geometry_equals_tensorflows_to_the_pixel(name: str) -> None:
    checks = {key: value for key, value in META["checksums"].items() if key.startswith(f"{name}/")}
    assert len(checks) >= 33
    for key, checksum in checks.items():
        value, height, width = key.split("/")[1:]
        # Every pixel tells where it came from.
        y, x = np.mgrid[0 : int(height), 0 : int(width)]
        image = np.stack([x, y, np.full_like(x, 255)], 2).astype(np.uint8)
        found = FUNCTIONS[name](image, float(value), 128)
        assert zlib.crc32(found.tobytes()) == checksum, key


@pytest.mark.parametrize("scale", ["250/100", "100/40"])
def test_levels_give_the_authors_magnitudes(scale: str) -> None:
    translate, cutout = map(int, scale.split("/"))
    generator = random.Random(0)
    for key, expected in META["magnitudes"].items():
        if key.startswith(scale):
            name, level = key.split("/")[2:]
            policy = AutoAugment([[[name, 1.0, float(level)]]], translate=translate, cutout=cutout)
            ((drawn, arguments),) = policy.draw((8, 8), generator)
            assert drawn == name
            assert [abs(value) for value in arguments[: len(expected)]] == expected, key


def test_an_operation_calls_the_function_of_its_name() -> None:
    assert {name: function for name, (function, _) in autoaugment._OPERATIONS.items()} == FUNCTIONS


def test_policy_v0_and_the_operations_are_the_authors() -> None:
    assert AutoAugment().policy == tuple(tuple(tuple(op) for op in pair) for pair in META["policy_v0"])
    assert set(autoaugment._OPERATIONS) == {key.split("/")[2] for key in META["magnitudes"]}
    assert len(autoaugment._OPERATIONS) == 16


def test_colour_has_tensorflows_weights_at_every_grey() -> None:
    # trunc(0.2989 r + 0.587 g + 0.114 b) / 255 * 255.5, exactly, in whole numbers.
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3))
    grey = pixels @ np.array([2989, 5870, 1140]) * 511 // 5_100_000
    found = operations.color(pixels.astype(np.uint8), 0.0)
    assert np.abs(found[..., 0] - grey).max() <= 1
    assert (found[..., 0] != grey).mean() < 1e-4


def test_no_bits_are_one_and_a_threshold_of_256_inverts() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert set(np.unique(operations.posterize(ramp, 0))) == {0, 128}
    assert (operations.solarize(ramp, 256) == 255 - ramp).all()


def test_cutout_fills_the_square_and_is_cut_at_the_border() -> None:
    image = np.zeros((10, 20, 3), dtype=np.uint8)
    found = operations.cutout(image, 3, (1, 5), 128)[..., 0]
    expected = np.zeros((10, 20))
    expected[2:8, 0:4] = 128
    assert (found == expected).all()
    assert not image.any()
    assert not operations.cutout(image, 0, (1, 5), 128).any()


def test_pairs_are_equally_likely_and_probabilities_and_signs_are_kept() -> None:
    counts: Counter = Counter()
    signs: Counter = Counter()
    # Levels tell the pairs apart.
    transform, draws = (
        AutoAugment([[["Rotate", 0.8, 1 + pair], ["Solarize", 0.25, 1 + pair]] for pair in range(5)]),
        20_000,
    )
    for key in range(draws):
        for name, arguments in transform.draw((4, 4), rng(key)):
            if name == "Rotate":
                counts[round(abs(arguments[0]) / 3)] += 1
                signs[arguments[0] > 0] += 1
            else:
                counts["s", arguments[0]] += 1

    def expected(count: int, probability: float) -> bool:
        return abs(count - draws * probability) < 5 * math.sqrt(draws * probability * (1 - probability))

    for pair in range(5):
        assert expected(counts[1 + pair], 0.2 * 0.8)
        assert expected(counts["s", int((1 + pair) / 10 * 256)], 0.2 * 0.25)
    assert expected(signs[True], 0.4)
    assert expected(signs[False], 0.4)


def test_probability_0_is_never_and_1_always() -> None:
    image = noise(8, 8)
    never, always = AutoAugment([[["Invert", 0.0, 0]]]), AutoAugment([[["Invert", 1.0, 0]]])
    assert all(never(image, rng(key)).tobytes() == image.tobytes() for key in range(200))
    assert all(always(image, rng(key)).tobytes() != image.tobytes() for key in range(200))


def test_randaugment_draws_every_operation_evenly_at_its_magnitude() -> None:
    counts: Counter = Counter()
    transform = RandAugment(layers=3, magnitude=17)
    for key in range(4000):
        counts.update(transform.draw((4, 4), rng(key)))
    names: Counter = Counter()
    for operation, count in counts.items():
        names[operation.name] += count
        assert operation.name != "Rotate" or abs(operation.arguments[0]) == 17 / 10 * 30
    assert len(names) == 16
    assert all(abs(n - 750) < 5 * math.sqrt(750) for n in names.values())


def test_what_is_drawn_is_what_is_done() -> None:
    image = noise(40, 30)
    for transform in (AutoAugment(), RandAugment(3, 14)):
        for key in range(60):
            expected = image
            for name, arguments in transform.draw((40, 30), rng(key)):
                expected = FUNCTIONS[name](expected, *arguments)
            assert transform(image, rng(key)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("transform", [AutoAugment(), RandAugment(3, 10), RandAugment(2, 28)])
def test_any_image_goes_through(transform: AutoAugment | RandAugment) -> None:
    for size in ((1, 1), (2, 3), (33, 17)):
        for key in range(150):
            found = transform(noise(*size), rng(key))
            assert found.shape == (*size[::-1], 3)
            assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("v1", "augment.policy='v1': give v0, or a list"),
        ([], "augment.policy is an empty list"),
        ([[["Rotat", 0.5, 3]]], "augment.policy: there is no operation 'Rotat', only AutoContrast, Equalize"),
        ([[["Rotate", 1.5, 3]]], "Rotate with probability 1.5 and level 3.0; the probability must be in"),
        ([[["Rotate", 0.5, -3]]], "Rotate with probability 0.5 and level -3.0"),
    ],
)
def test_wrong_policies_are_named(policy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAugment(policy)  # type: ignore[arg-type]


def test_wrong_randaugment_is_named() -> None:
    with pytest.raises(ValueError, match=r"augment.policy.layers=0 must be at least 1"):
        RandAugment(0)
