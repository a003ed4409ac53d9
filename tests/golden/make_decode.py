"""Make decode.npz: images of unusual kinds, and TensorFlow's pixels of them.

pip install tensorflow-cpu==2.15.1 pillow==11.3.0; CUDA_VISIBLE_DEVICES= python make_decode.py
"""

import io
import json
from pathlib import Path

import numpy as np
import PIL
import tensorflow as tf
from PIL import Image

SIZE = (6, 9)  # height, width


def encoded(image, kind, **options):
    """Return the bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def kinds():
    """Return the files by name."""
    generator = np.random.default_rng(3)
    rgba = generator.integers(256, size=(*SIZE, 4), dtype=np.uint8)
    grey = Image.fromarray(rgba[..., 0])
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    wide = Image.fromarray(generator.integers(2**16, size=SIZE, dtype=np.uint16))
    sixteen = generator.integers(2**16, size=(*SIZE, 3), dtype=np.uint16)
    return {
        "png/rgb": encoded(Image.fromarray(rgba[..., :3]), "PNG"),
        "png/rgba": encoded(Image.fromarray(rgba), "PNG"),
        "png/grey": encoded(grey, "PNG"),
        "png/grey with alpha": encoded(Image.merge("LA", Image.fromarray(rgba).split()[:2]), "PNG"),
        "png/grey with a transparent value": encoded(grey, "PNG", transparency=int(rgba[0, 0, 0])),
        "png/palette": encoded(palette, "PNG"),
        "png/palette with transparency": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png/palette with a transparent colour": encoded(palette, "PNG", transparency=3),
        "png/one bit": encoded(Image.fromarray(rgba[..., 0] > 127), "PNG"),
        "png/16 bits grey": encoded(wide, "PNG"),
        "png/16 bits rgb": tf.io.encode_png(sixteen).numpy(),
        "bmp/rgb": encoded(Image.fromarray(rgba[..., :3]), "BMP"),
    }


def main():
    """Write the files and their pixels."""
    golden = {}
    for name, data in kinds().items():
        golden[f"{name}/file"] = np.frombuffer(data, np.uint8)
        golden[f"{name}/pixels"] = tf.io.decode_image(data, channels=3, expand_animations=False).numpy()
    versions = json.dumps({"tensorflow": tf.__version__, "numpy": np.__version__, "pillow": PIL.__version__})
    np.savez_compressed(Path(__file__).with_name("decode.npz"), versions=versions, **golden)


if __name__ == "__main__":
    main()
