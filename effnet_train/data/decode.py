"""From a file's bytes to an RGB image."""

import io

from PIL import Image, UnidentifiedImageError


class DecodeError(ValueError):
    """An image that cannot be decoded; the message says why."""


def decode(data: bytes | Image.Image) -> Image.Image:
    """Return an RGB image of an encoded one (or of one that its source had decoded already).

    Transparent pixels lie on black, as TensorFlow and torchvision decode them; an orientation tag is not applied,
    as no ImageNet pipeline does. Raises DecodeError.
    """
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error
