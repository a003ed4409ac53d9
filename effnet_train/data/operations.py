"""The operations of AutoAugment and RandAugment as the authors' TensorFlow code computes them, pixel for pixel.

All take pixels (H, W, 3) uint8 and leave them as they are; what they return may be read-only.
Source: tensorflow/tpu, models/official/efficientnet/autoaugment.py. Results are held against that file, run by
TensorFlow, in tests/data/test_autoaugment.py.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Matrix = tuple[float, float, float, float, float, float]


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[0]


def _image(pixels: np.ndarray) -> Image.Image:
    # Half the time of fromarray, which copies first.
    return Image.frombuffer("RGB", _size(pixels), np.ascontiguousarray(pixels), "raw", "RGB", 0, 1)


def _values(table: np.ndarray) -> bytes:
    """Cut a table's values to [0, 255] and towards zero, as TensorFlow casts to uint8."""
    return table.clip(0, 255).astype(np.uint8).tobytes()


def _looked_up(image: Image.Image, tables: np.ndarray) -> np.ndarray:
    """Replace each channel's values by those of its table: (3, 256)."""
    # Not Image.point: it rounds the 768 numbers one by one in Python, which takes longer than the look-up.
    image.im = image.im.point(_values(tables), None)
    return np.asarray(image)


# TensorFlow's grey: its own weights; pixels / 255, times 255.5, cut. PIL adds a half before it cuts. Of all 2**24
# colours, 164 differ by a level.
GREY = (0.2989 * (255.5 / 255), 0.5870 * (255.5 / 255), 0.1140 * (255.5 / 255), -0.5)


def blend_constant(pixels: np.ndarray, constant: int, factor: float) -> np.ndarray:
    """Return constant + factor * (pixels - constant) in float32."""
    table = np.float32(constant) + np.float32(factor) * (np.arange(256, dtype=np.float32) - np.float32(constant))
    return np.frombuffer(pixels.tobytes().translate(_values(table)), dtype=np.uint8).reshape(pixels.shape)


def autocontrast(pixels: np.ndarray) -> np.ndarray:
    """Stretch each channel to the full range."""
    values = np.arange(256, dtype=np.float32)
    # Down the columns first, which numpy does many at a time.
    rows = pixels.reshape(len(pixels), -1)
    lows = rows.min(axis=0).reshape(-1, 3).min(axis=0).tolist()
    highs = rows.max(axis=0).reshape(-1, 3).max(axis=0).tolist()
    tables = []
    for low, high in zip(lows, highs, strict=True):
        # Float32 and cutting, where PIL's own autocontrast takes doubles: they differ by one level here and there.
        scale = np.float32(255) / np.float32(max(high - low, 1))
        tables.append(values * scale - np.float32(low) * scale if high > low else values)
    return _looked_up(_image(pixels), np.stack(tables))


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Make each channel's histogram flat."""
    image = _image(pixels)
    # PIL's own rule, ImageOps.equalize, without its loops over levels in Python.
    counts = np.array(image.histogram()).reshape(3, 256)
    last = 255 - (counts[:, ::-1] > 0).argmax(axis=1)
    steps = (image.width * image.height - counts[range(3), last])[:, None] // 255
    tables = (steps // 2 + counts.cumsum(axis=1) - counts) // np.maximum(steps, 1)
    return _looked_up(image, np.where(steps > 0, tables, np.arange(256)))


def invert(pixels: np.ndarray) -> np.ndarray:
    """Return the negative."""
    return ~pixels


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Keep the upper `bits` bits of each value, but at least one.

    TensorFlow cuts a shift of more than 7 to 7, so that no bits (v0 asks for them, at level 2) are one, and the image
    is not black; and takes it modulo 256, so that more than 8 bits (RandAugment of magnitude 23 and up) are one too.
    """
    shift = min((8 - bits) % 256, 7)
    return pixels & np.uint8(255 >> shift << shift)


def solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
    """Invert the values that are not below the threshold.

    TensorFlow 1 takes the threshold modulo 256: 256, which v0 asks for at level 10, inverts all instead of nothing,
    and RandAugment of magnitude 15 has 128.
    """
    above = (pixels >= np.uint8(threshold % 256)).view(np.uint8)
    return pixels ^ np.negative(above)  # all bits of 255, or none


def solarize_add(pixels: np.ndarray, addition: int) -> np.ndarray:
    """Add to the values under 128."""
    added = np.uint8(min(addition, 255))
    below = np.negative((pixels < 128).view(np.uint8))
    # A value of 128 and more has nothing to add; none may pass 255 and begin anew.
    return pixels + np.minimum(below & added, ~pixels)


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend from the grey image (0) to the image (1) and beyond."""
    image = _image(pixels)
    grey = image.convert("L", GREY)
    return np.asarray(Image.blend(Image.merge("RGB", (grey, grey, grey)), image, factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend from a constant (0) to the image (1) and beyond."""
    return blend_constant(pixels, contrast_constant(_size(pixels)), factor)


def contrast_constant(size: tuple[int, int]) -> int:
    """Return the constant that `contrast` blends an image of `size` (width, height) with."""
    # Meant: the mean grey value. TF code: the sum of the histogram's counts over 256, hence the number of pixels. We
    # follow the code: 196 at 224 x 224, white from 256 x 256 on, whatever the image shows.
    return min(255, size[0] * size[1] // 256)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend from black (0) to the image (1) and beyond."""
    return blend_constant(pixels, 0, factor)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend from the smoothed image (0) to the image (1) and beyond; the border of one pixel stays."""
    # A row is taken as one run of values, whose neighbours are three values away.
    rows = pixels.reshape(len(pixels), -1)
    smooth = rows.copy()
    # Few rows at a time stay in the processor's cache: twice as fast.
    for top in range(0, len(rows) - 2, 32):
        values = rows[top : top + 34].astype(np.float32)
        height, width = len(values) - 2, max(0, values.shape[1] - 6)
        thin, thick = values * np.float32(1 / 13), values[1:-1, 3:-3] * np.float32(5 / 13)
        total = np.zeros((height, width), dtype=np.float32)
        # In TensorFlow's order: where the sum is a whole number, its rounding decides which one it is cut to.
        for y in range(3):
            for x in (0, 3, 6):
                total += thick if (y, x) == (1, 3) else thin[y : y + height, x : x + width]
        smooth[top + 1 : top + 1 + height, 3:-3] = total
    return np.asarray(Image.blend(_image(smooth.reshape(pixels.shape)), _image(pixels), factor))


def _source(a: float, b: float, c: float, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Return round(a x + b y + c), in [-1, size], as float32 arithmetic has it."""
    across, down = np.float32(a) * x, np.float32(b) * y
    # Shears and translations need one axis only.
    values = across if b == 0 else down if a == 0 else across + down
    values += np.float32(c)
    # C's round: halves away from zero. Shears have whole rows of them.
    values += np.copysign(np.float32(0.5), values)
    return values.clip(-1, size).astype(np.int32)


# A policy has few angles and distances: v0 24, each of which comes again every few dozen images.
@functools.lru_cache(maxsize=32)
def _sources(width: int, height: int, a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    """Return for each pixel where its source stands in the image that a border of one pixel was put around."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return (_source(d, e, f, x, y, height) + 1) * (width + 2) + (_source(a, b, c, x, y, width) + 1)


_PIXEL = np.dtype("V3")  # moved as a whole


def _project(pixels: np.ndarray, matrix: Matrix, fill: int) -> np.ndarray:
    """Give each pixel (x, y) the value at (a x + b y + c, d x + e y + f), nearest neighbour, `fill` outside.

    Coordinates count from the centre of the first pixel. PIL's own transform works in 16-bit fractions, and takes
    another neighbour for one pixel per thousand of a rotation and ten of a shear.
    """
    width, height = _size(pixels)
    # A border of one fill pixel answers for all outside.
    framed = np.full((height + 2, width + 2, 3), fill, dtype=np.uint8)
    framed[1:-1, 1:-1] = pixels
    sources = _sources(width, height, *matrix)
    return framed.view(_PIXEL).reshape(-1).take(sources, mode="clip").view(np.uint8).reshape(pixels.shape)


def _rotation(size: tuple[int, int], degrees: float) -> Matrix:
    angle = np.float32(degrees * (math.pi / 180))
    cos, sin = np.cos(angle), np.sin(angle)
    right, bottom = np.float32(size[0] - 1), np.float32(size[1] - 1)
    c = (right - (cos * right - sin * bottom)) / 2
    f = (bottom - (sin * right + cos * bottom)) / 2
    return float(cos), float(-sin), float(c), float(sin), float(cos), float(f)


# Of an operation that moves pixels: `_project`'s matrix, by the image's size (width, height) and the magnitude.
MATRICES: dict[str, Callable[[tuple[int, int], float], Matrix]] = {
    "Rotate": _rotation,
    "ShearX": lambda size, level: (1, level, 0, 0, 1, 0),
    "ShearY": lambda size, level: (1, 0, 0, level, 1, 0),
    "TranslateX": lambda size, distance: (1, 0, distance, 0, 1, 0),
    "TranslateY": lambda size, distance: (1, 0, 0, 0, 1, distance),
}


def rotate(pixels: np.ndarray, degrees: float, fill: int) -> np.ndarray:
    """Turn about the centre, anticlockwise for positive degrees."""
    return _project(pixels, MATRICES["Rotate"](_size(pixels), degrees), fill)


def shear_x(pixels: np.ndarray, level: float, fill: int) -> np.ndarray:
    """Move row y by -level * y pixels."""
    return _project(pixels, MATRICES["ShearX"](_size(pixels), level), fill)


def shear_y(pixels: np.ndarray, level: float, fill: int) -> np.ndarray:
    """Move column x by -level * x pixels."""
    return _project(pixels, MATRICES["ShearY"](_size(pixels), level), fill)


def translate_x(pixels: np.ndarray, distance: float, fill: int) -> np.ndarray:
    """Move to the left by `distance` pixels."""
    return _project(pixels, MATRICES["TranslateX"](_size(pixels), distance), fill)


def translate_y(pixels: np.ndarray, distance: float, fill: int) -> np.ndarray:
    """Move upwards by `distance` pixels."""
    return _project(pixels, MATRICES["TranslateY"](_size(pixels), distance), fill)


def cutout(pixels: np.ndarray, pad: int, center: tuple[int, int], fill: int) -> np.ndarray:
    """Fill the square of side 2 * pad about `center` (x, y), which may reach outside."""
    x, y = center
    pixels = pixels.copy()
    pixels[max(0, y - pad) : max(0, y + pad), max(0, x - pad) : max(0, x + pad)] = fill
    return pixels
