"""From an encoded image to the resized pixels of a part of it, by the fastest way that is installed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from effnet_train.data.decode import decode

Box = tuple[int, int, int, int]

BACKENDS = ("simplejpeg", "pillow", "nvimgcodec", "nvjpeg", "hybrid")
# Those that augment on the device, where nvjpeg also decodes: see `device_batches`.
DEVICE_BACKENDS = ("nvjpeg", "hybrid")
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "nearest", "lanczos")}

# torch's resize of bytes; it has no other filters.
_TORCH_FILTERS = ("bicubic", "bilinear")
# Bytes at the end of a file in which its end marker is looked for: some writers add a few of their own.
_TAIL = 64
# libjpeg's warning of data after the last row.
_ROWS_LEFT = "extraneous bytes before marker"


class Picture(Protocol):
    """An image of which only what is asked for is decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        ...

    def resized(self, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """Cut out the box (left, top, width, height), scale it to `size` (width, height): (H, W, 3) uint8.

        Raises DecodeError.
        """
        ...


def open_picture(data: bytes | Image.Image, backend: str) -> Picture:
    """Return the picture in encoded bytes, or of an image that its source had decoded already.

    `backend` reads plain JPEGs (8 bits, grey or three channels, with an end); Pillow reads the rest, and says what is
    wrong with files that are damaged. One of a device is simplejpeg here. Raises DecodeError.
    """
    if backend != "pillow" and isinstance(data, bytes):
        header = _jpeg_header(data)
        if header is not None:
            return _Jpeg(data, header, _DECODERS[backend])
    return Decoded(decode(data))


def plain_jpeg_size(data: bytes | Image.Image) -> tuple[int, int] | None:
    """Return width and height of a JPEG that other decoders than Pillow are asked to read; None for all else."""
    header = _jpeg_header(data) if isinstance(data, bytes) else None
    return None if header is None else (header.width, header.height)


def as_picture(image: Picture | Image.Image) -> Picture:
    """Return the picture, or that of an RGB image in memory."""
    return Decoded(image) if isinstance(image, Image.Image) else image


def check_backend(backend: str, *, key: str = "data.backend") -> None:
    """Raise ValueError for a backend that is not known, ImportError for one that is not installed.

    `key` is what the user sets.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{key}={backend} is not known: use one of {', '.join(BACKENDS)}")
    if backend == "nvimgcodec":
        _nvimgcodec()


def import_nvimgcodec(backend: str) -> Any:
    """Return nvImageCodec's module. Raises ImportError naming the extra, which has the backend's name."""
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise ImportError(
            f"data.backend={backend} needs nvImageCodec: pip install 'effnet-train[{backend}]', "
            "or use data.backend=simplejpeg"
        ) from error
    return nvimgcodec


class Decoded:
    """An RGB image in memory, cut and resized by Pillow."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        return self.image.size

    def resized(self, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """Cut out the box and scale it."""
        left, top, width, height = box
        # Cut first: Pillow's resize(box=...) would let the pixels around the box bleed into its border.
        crop = self.image.crop((left, top, left + width, top + height))
        # A copy, because PyTorch warns of the read-only array that np.asarray would give.
        return np.array(crop.resize(size, FILTERS[interpolation]))


class _Header(NamedTuple):
    """What a JPEG's headers say; `rows_at` is where its height stands, 0 where the height must not be changed."""

    width: int
    height: int
    rows_at: int
    mcu_height: int


class _Jpeg:
    """A JPEG whose box is decoded by `region`, a function of the bytes, the header and the box."""

    def __init__(self, data: bytes, header: _Header, region: Callable[[bytes, _Header, Box], np.ndarray]) -> None:
        self._data, self._header, self._region = data, header, region

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        return self._header.width, self._header.height

    def resized(self, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """Decode the box and scale it."""
        try:
            pixels = self._region(self._data, self._header, box)
        except (ValueError, RuntimeError):
            # Pillow knows what is wrong with it, or reads it nevertheless.
            return Decoded(decode(self._data)).resized(box, size, interpolation)
        return _resize(pixels, size, interpolation)


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Scale (H, W, 3) uint8 as Pillow does, with vector instructions and weights of 16 bits where it has 22."""
    if interpolation not in _TORCH_FILTERS:
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, FILTERS[interpolation]))
    # Channels-last, for which torch has the quick way: the strides must say so, that of the one image included.
    images = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(images, size[::-1], mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def _jpeg_header(data: bytes) -> _Header | None:
    """Return the header of a plain and complete JPEG; None for all else.

    Source: ITU-T T.81, annex B.
    """
    if data[:2] != b"\xff\xd8" or data.find(b"\xff\xd9", max(2, len(data) - _TAIL)) < 0:
        return None
    frame, place = None, 2
    while place + 18 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker in (0xC0, 0xC1, 0xC2):
            frame = place
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, hierarchical or arithmetic
        elif marker == 0xDA:
            return None if frame is None else _frame_header(data, frame, scan_components=data[place + 4])
        elif marker == 0xFF or marker < 0xC0:
            return None  # filling, which is rare, or not a JPEG's marker
        place += 2 + length
    return None


def _frame_header(data: bytes, place: int, *, scan_components: int) -> _Header | None:
    bits, height, width = (
        data[place + 4],
        int.from_bytes(data[place + 5 : place + 7]),
        int.from_bytes(data[place + 7 : place + 9]),
    )
    components = data[place + 9]
    if bits != 8 or components not in (1, 3) or not width or not height:
        return None
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        return None  # Pillow warns, or refuses
    # A progressive JPEG goes over all its rows several times, and so does one whose channels come one after another.
    in_order = data[place + 1] != 0xC2 and scan_components == components
    sampling = max(data[place + 11 + 3 * component] & 15 for component in range(components))
    return _Header(width, height, place + 5 if in_order else 0, 8 * sampling)


def _simplejpeg_region(data: bytes, header: _Header, box: Box) -> np.ndarray:
    import simplejpeg

    left, top, width, height = box
    # Where the rows come in order, those below the box need not be decoded: the header is told of fewer. One row of
    # blocks more is kept, as colour is interpolated between the rows of its own, coarser grid.
    rows = (-(-(top + height) // header.mcu_height) + 1) * header.mcu_height
    encoded: bytes | bytearray = data
    if header.rows_at and rows < header.height:
        encoded = bytearray(data)
        encoded[header.rows_at : header.rows_at + 2] = rows.to_bytes(2)
    pixels = np.empty((header.height if encoded is data else rows, header.width, 3), dtype=np.uint8)
    try:
        # Strict, as what is refused is left to Pillow: after a warning, libjpeg's errors would pass for warnings too.
        simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True, buffer=pixels)
    except ValueError as error:
        # The rows left out. They are found to be too many once all others are in the buffer.
        if encoded is data or _ROWS_LEFT not in str(error):
            raise
    return pixels[top : top + height, left : left + width]


def _nvimgcodec_region(data: bytes, header: _Header, box: Box) -> np.ndarray:
    nvimgcodec, decoder, params = _nvimgcodec()
    left, top, width, height = box
    region = nvimgcodec.Region(top, left, top + height, left + width)
    image = decoder.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(region=region), params=params)
    if image is None:
        raise ValueError("nvImageCodec cannot decode it")
    return np.asarray(image.cpu())


@functools.cache
def _nvimgcodec() -> tuple[Any, Any, Any]:
    """Return nvImageCodec, its decoder on the processor (it needs no GPU) and how it is to decode."""
    nvimgcodec = import_nvimgcodec("nvimgcodec")
    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        max_num_cpu_threads=1,
    )
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
    return nvimgcodec, decoder, params


_DECODERS = {**dict.fromkeys(("simplejpeg", *DEVICE_BACKENDS), _simplejpeg_region), "nvimgcodec": _nvimgcodec_region}
