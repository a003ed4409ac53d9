"""AutoAugment and RandAugment: which operations an image gets, drawn as the authors' TensorFlow code draws them.

Source: tensorflow/tpu, models/official/efficientnet/autoaugment.py.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from effnet_train.data import operations as op
from effnet_train.data.keys import integer

SubPolicy = tuple[tuple[str, float, float], ...]

# (operation, probability, level of 10); one of the 25 is drawn per image. Despite its name in the authors' code it is
# not the ImageNet policy of the AutoAugment paper, which torchvision implements.
_V0: tuple[SubPolicy, ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


class _Scale(NamedTuple):
    """What the levels of a policy are multiples of: pixels at level 10; and the value of pixels from outside."""

    translate: float
    cutout: float
    fill: int


def _either(value: float, rng: random.Random) -> float:
    return value if rng.random() < 0.5 else -value


def _enhance(level: float) -> float:
    return (level / 10) * 1.8 + 0.1


def _translation(size: tuple[int, int], level: float, rng: random.Random, scale: _Scale) -> tuple[float, int]:
    return _either(level / 10 * scale.translate, rng), scale.fill


def _shear(size: tuple[int, int], level: float, rng: random.Random, scale: _Scale) -> tuple[float, int]:
    return _either(level / 10 * 0.3, rng), scale.fill


_Arguments = Callable[[tuple[int, int], float, random.Random, _Scale], tuple[Any, ...]]

# Each with what it takes besides the pixels: of the image's size (width, height), the level of 10 (RandAugment's may be
# more), the sample's generator and the scale.
_OPERATIONS: dict[str, tuple[Callable[..., np.ndarray], _Arguments]] = {
    "AutoContrast": (op.autocontrast, lambda size, level, rng, scale: ()),
    "Equalize": (op.equalize, lambda size, level, rng, scale: ()),
    "Invert": (op.invert, lambda size, level, rng, scale: ()),
    "Rotate": (op.rotate, lambda size, level, rng, scale: (_either(level / 10 * 30, rng), scale.fill)),
    "Posterize": (op.posterize, lambda size, level, rng, scale: (int(level / 10 * 4),)),
    "Solarize": (op.solarize, lambda size, level, rng, scale: (int(level / 10 * 256),)),
    "SolarizeAdd": (op.solarize_add, lambda size, level, rng, scale: (int(level / 10 * 110),)),
    "Color": (op.color, lambda size, level, rng, scale: (_enhance(level),)),
    "Contrast": (op.contrast, lambda size, level, rng, scale: (_enhance(level),)),
    "Brightness": (op.brightness, lambda size, level, rng, scale: (_enhance(level),)),
    "Sharpness": (op.sharpness, lambda size, level, rng, scale: (_enhance(level),)),
    "ShearX": (op.shear_x, _shear),
    "ShearY": (op.shear_y, _shear),
    "TranslateX": (op.translate_x, _translation),
    "TranslateY": (op.translate_y, _translation),
    "Cutout": (
        op.cutout,
        lambda size, level, rng, scale: (
            int(level / 10 * scale.cutout),
            (integer(rng, size[0]), integer(rng, size[1])),
            scale.fill,
        ),
    ),
}


class Operation(NamedTuple):
    """One of the operations, with all that it takes besides the pixels."""

    name: str
    arguments: tuple[Any, ...]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return changed pixels (H, W, 3) uint8; they may be read-only."""
        function, _ = _OPERATIONS[self.name]
        return function(pixels, *self.arguments)


def _drawn(name: str, size: tuple[int, int], level: float, rng: random.Random, scale: _Scale) -> Operation:
    _, arguments = _OPERATIONS[name]
    return Operation(name, arguments(size, level, rng, scale))


def _applied(operations: Sequence[Operation], pixels: np.ndarray) -> np.ndarray:
    for operation in operations:
        pixels = operation(pixels)
    return pixels


def _sub_policy(operations: Sequence[Sequence]) -> SubPolicy:
    """Check and copy one sub-policy."""
    found = tuple((str(name), float(probability), float(level)) for name, probability, level in operations)
    for name, probability, level in found:
        if name not in _OPERATIONS:
            raise ValueError(f"augment.policy: there is no operation {name!r}, only {', '.join(_OPERATIONS)}")
        if not 0 <= probability <= 1 or level < 0:
            raise ValueError(
                f"augment.policy: {name} with probability {probability} and level {level}; "
                "the probability must be in [0, 1], the level 0 or more"
            )
    return found


class AutoAugment:
    """Draw one sub-policy per image and apply each of its operations with the operation's probability.

    `policy` is "v0", the authors', or a list of lists of (operation, probability, level). `translate` and `cutout` are
    pixels at level 10 (the authors use the same at all resolutions), `fill` the value of pixels from outside.
    """

    def __init__(
        self,
        policy: str | Sequence[Sequence[Sequence]] = "v0",
        *,
        translate: float = 250,
        cutout: float = 100,
        fill: int = 128,
    ) -> None:
        if isinstance(policy, str) and policy != "v0":
            raise ValueError(
                f"augment.policy={policy!r}: give v0, or a list of lists of [operation, probability, level]"
            )
        self.policy = _V0 if isinstance(policy, str) else tuple(_sub_policy(operations) for operations in policy)
        if not self.policy:
            raise ValueError("augment.policy is an empty list: give sub-policies, or augment.policy=null for none")
        self.scale = _Scale(translate, cutout, fill)

    def __call__(self, pixels: np.ndarray, rng: random.Random) -> np.ndarray:
        """Return augmented pixels (H, W, 3) uint8: those that were given, or others that may be read-only."""
        return _applied(self.draw(pixels.shape[1::-1], rng), pixels)

    def draw(self, size: tuple[int, int], rng: random.Random) -> tuple[Operation, ...]:
        """Return what happens to an image of `size` (width, height)."""
        chosen = self.policy[integer(rng, len(self.policy))]
        return tuple(_drawn(name, size, level, rng, self.scale) for name, p, level in chosen if rng.random() < p)


class RandAugment:
    """Apply `layers` operations per image, drawn from all 16, each at level `magnitude` of 10.

    Beyond 10 some of them come round again, as in TensorFlow: see `operations.posterize` and `solarize`.
    """

    def __init__(
        self, layers: int = 2, magnitude: float = 10, *, translate: float = 100, cutout: float = 40, fill: int = 128
    ) -> None:
        if layers < 1 or magnitude < 0:
            raise ValueError(
                f"augment.policy.layers={layers} must be at least 1 (for none: augment.policy=null), "
                f"augment.policy.magnitude={magnitude} at least 0"
            )
        self.layers, self.magnitude = layers, magnitude
        self.scale = _Scale(translate, cutout, fill)

    def __call__(self, pixels: np.ndarray, rng: random.Random) -> np.ndarray:
        """Return augmented pixels (H, W, 3) uint8: those that were given, or others that may be read-only."""
        return _applied(self.draw(pixels.shape[1::-1], rng), pixels)

    def draw(self, size: tuple[int, int], rng: random.Random) -> tuple[Operation, ...]:
        """Return what happens to an image of `size` (width, height)."""
        names = tuple(_OPERATIONS)
        # No probability: the authors' code draws one and does not use it.
        return tuple(
            _drawn(names[integer(rng, len(names))], size, self.magnitude, rng, self.scale) for _ in range(self.layers)
        )
