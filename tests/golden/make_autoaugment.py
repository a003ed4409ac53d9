"""Make autoaugment.npz: what the authors' own AutoAugment code gives, run by TensorFlow.

    pip install tensorflow-cpu==2.15.1 "numpy<2"
    python make_autoaugment.py path/to/tensorflow/tpu/models/official/efficientnet/autoaugment.py

numpy < 2 because the authors' numpy let a constant overflow, and so must this one (see `solarize`). tf.contrib, which
TensorFlow 2 has lost, is stood in for by the same kernel under its new name.
"""

import json
import os
import sys
import types
import zlib
from pathlib import Path

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # the plain kernels, which TensorFlow 1 had

import numpy as np
import tensorflow as tf

FILL = [128, 128, 128]
FACTORS = (0.1, 0.28, 0.64, 1.0, 1.18, 1.72, 1.9, 2.8)
DEGREES = (*(sign * 3.0 * level for level in range(11) for sign in (1, -1)), 45.0)
SHEARS = (*(sign * (level / 10 * 0.3) for level in range(11) for sign in (1, -1)), 0.45)
PIXELS = (0.0, 25.0, -25.0, 225.0, -225.0, 12.5, -12.5, 10.0, -10.0, 3.0, -3.0)
LEVELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 17, 28)


def transform(image, matrix):
    """Stand in for tf.contrib.image.transform."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.reshape(tf.cast(tf.convert_to_tensor(matrix), tf.float32), [1, 8]),
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def rotate(image, radians):
    """Stand in for tf.contrib.image.rotate, which turns about the centre of the pixels' centres."""
    bottom, right = (tf.constant(size - 1, tf.float32) for size in image.shape[:2])
    cos, sin = tf.cos(tf.constant(radians, tf.float32)), tf.sin(tf.constant(radians, tf.float32))
    x, y = (right - (cos * right - sin * bottom)) / 2, (bottom - (sin * right + cos * bottom)) / 2
    return transform(image, tf.stack([cos, -sin, x, sin, cos, y, 0.0, 0.0]))


def load(path):
    """Import the authors' file."""
    image = types.ModuleType("tensorflow.contrib.image")
    image.transform, image.rotate = transform, rotate
    image.translate = lambda pixels, by: transform(pixels, [1.0, 0.0, -by[0], 0.0, 1.0, -by[1], 0.0, 0.0])
    training = types.ModuleType("tensorflow.contrib.training")
    training.HParams = types.SimpleNamespace
    contrib = types.ModuleType("tensorflow.contrib")
    contrib.image, contrib.training = image, training
    sys.modules |= {m.__name__: m for m in (contrib, image, training)}
    module = types.ModuleType("authors")
    exec(compile(Path(path).read_text(), path, "exec"), module.__dict__)
    return module


def images():
    """Return noise; waves; and a dull one, whose red is constant and whose green never is 0 nor 255."""
    y, x = np.mgrid[0:24, 0:20]
    waves = [127.5 + 127.5 * np.sin(x / (3 + c) + y / (5 - c) + c) for c in range(3)]
    dull = [np.full_like(x, 77), 60 + (3 * x + y) % 130, (x * y) % 200]
    noise = np.random.default_rng(0).integers(0, 256, (16, 12, 3))
    return {name: np.asarray(p).astype(np.uint8) for name, p in
            (("noise", noise), ("waves", np.stack(waves, 2)), ("dull", np.stack(dull, 2)))}  # fmt: skip


def coordinates(height, width):
    """Return an image whose every pixel tells where it came from."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 255)], 2).astype(np.uint8)


def main():
    """Write the reference values."""
    authors = load(sys.argv[1])

    def run(name, image, *arguments):
        # In a graph, as the authors ran it.
        function = tf.function(lambda pixels: authors.NAME_TO_FUNC[name](pixels, *arguments), autograph=False)
        return function(tf.constant(image)).numpy()

    cases = [(name,) for name in ("AutoContrast", "Equalize", "Invert")]
    cases += [("Posterize", bits) for bits in (0, 1, 2, 3, 4, 6, 10, 11)]
    cases += [("Solarize", threshold) for threshold in (0, 51, 76, 204, 256, 384, 716)]
    cases += [("SolarizeAdd", addition) for addition in (0, 33, 77, 110, 165)]
    cases += [(name, f) for name in ("Color", "Contrast", "Brightness", "Sharpness") for f in FACTORS]
    found = {}
    for name, image in images().items():
        found[name] = image
        found[f"{name}/results"] = np.stack([run(case[0], image, *case[1:]) for case in cases])
    geometry = [("Rotate", v) for v in DEGREES] + [(n, v) for n in ("ShearX", "ShearY") for v in SHEARS]
    geometry += [(name, pixels) for name in ("TranslateX", "TranslateY") for pixels in PIXELS]
    checksums = {}
    for name, value in geometry:
        for size in ((24, 20), (224, 224), (150, 201)):
            result = run(name, coordinates(*size), value, FILL)
            checksums["/".join(map(str, (name, value, *size)))] = zlib.crc32(result.tobytes())
    magnitudes = {}
    for scale in ((250, 100), (100, 40)):
        table = authors.level_to_arg(types.SimpleNamespace(translate_const=scale[0], cutout_const=scale[1]))
        for name, arguments in table.items():
            for level in LEVELS:
                values = [abs(float(value)) for value in arguments(float(level))]
                magnitudes["/".join(map(str, (*scale, name, level)))] = values
    meta = {
        "versions": {"tensorflow": tf.__version__, "numpy": np.__version__},
        "source": "tensorflow/tpu, models/official/efficientnet/autoaugment.py",
        "cases": cases,
        "policy_v0": authors.policy_v0(),
        "checksums": checksums,
        "magnitudes": magnitudes,
    }
    np.savez_compressed(Path(__file__).with_name("autoaugment.npz"), meta=json.dumps(meta), **found)


if __name__ == "__main__":
    main()
