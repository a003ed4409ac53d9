"""Make crops.npz: TensorFlow's random crops, the random numbers they were made of, and central crops.

pip install tensorflow-cpu==2.15.1; python make_crops.py
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf

SIZES = ((500, 375), (375, 500), (64, 64), (32, 32), (333, 250), (7, 5), (3, 3), (1, 1), (1, 40), (2000, 30))  # w, h
SEEDS = 120
DRAWS = 20_000
RESOLUTIONS = (32, 224, 240, 260, 300, 380, 456, 528, 600)


@tf.function(reduce_retracing=True)
def crop(size, seed):
    """Return (left, top, width, height)."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        size,
        bounding_boxes=tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=(3.0 / 4, 4.0 / 3.0),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.stack([begin[1], begin[0], extent[1], extent[0]])


@tf.function
def side(resolution_ratio, shorter):
    """Return the side of the central crop, as the authors compute it."""
    return tf.cast(resolution_ratio * tf.cast(shorter, tf.float32), tf.int32)


def main():
    """Write the reference values."""
    # The op and this one, given the same seed, read the same stream of 32-bit numbers.
    streams = [
        tf.raw_ops.StatelessRandomUniformFullInt(shape=[48], seed=[seed, 7], dtype=tf.uint32).numpy()
        for seed in range(SEEDS)
    ]
    boxes = [
        [crop(tf.constant([height, width, 3]), tf.constant([seed, 7])).numpy() for seed in range(SEEDS)]
        for width, height in SIZES
    ]
    levels = np.linspace(0.05, 0.95, 19)
    quantiles = {}
    for width, height in ((500, 375), (64, 64)):
        size = tf.constant([height, width, 3])
        drawn = np.array([crop(size, tf.constant([seed, 11])).numpy() for seed in range(DRAWS)], dtype=np.float64)
        drawn = drawn[~((drawn[:, 2] == width) & (drawn[:, 3] == height))]
        area, aspect = drawn[:, 2] * drawn[:, 3] / (width * height), drawn[:, 2] / drawn[:, 3]
        quantiles[f"quantiles/{width}x{height}"] = np.array([np.quantile(v, levels) for v in (area, aspect)])
    shorter = np.arange(2, 1500, 3)
    sides = [side(resolution / (resolution + 32), tf.constant(shorter)).numpy() for resolution in RESOLUTIONS]
    np.savez_compressed(
        Path(__file__).with_name("crops.npz"),
        meta=json.dumps({"versions": {"tensorflow": tf.__version__, "numpy": np.__version__}, "draws": DRAWS}),
        streams=np.array(streams),
        sizes=np.array(SIZES),
        boxes=np.array(boxes, dtype=np.int16),
        levels=levels,
        resolutions=np.array(RESOLUTIONS),
        shorter=shorter.astype(np.int16),
        sides=np.array(sides, dtype=np.int16),
        **quantiles,
    )


if __name__ == "__main__":
    main()
