"""From a file's bytes to an RGB image."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


class DecodeError(ValueError):
    """An image that cannot be decoded; the message says why."""


def decode(data: bytes | Image.Image) -> Image.Image:
    """Return an RGB image of an encoded one (or of one that its source had decoded already).

    Transparency is dropped and 16 bits are cut to 8, as TensorFlow decodes them; an orientation tag is not applied,
    as no ImageNet pipeline does. Raises DecodeError.
    """
    try:
        return _rgb(Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data)
    except UnidentifiedImageError as error:
        # Pillow's own message names the buffer by its address in memory.
        raise DecodeError("the file holds no image of a known kind") from error
    # Pillow's readers of broken files raise whatever they stumble over: TypeError and struct.error are among it.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no agreed range: save the image with 8 bits")
    if image.mode.startswith("I;16"):
        # PIL's own conversion would clip: all but the darkest 256 levels of 65,536 would be white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if isinstance(image.info.get("transparency"), bytes):
        # PIL warns of a palette's transparency where it is dropped in one step.
        image = image.convert("RGBA")
    return image.convert("RGB")
