"""JPEGs decoded on the device that trains, and scaled there."""

import io
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from effnet_train.data.backends import Box, import_nvimgcodec, open_picture
from effnet_train.data.decode import DecodeError

# The filters of torch's antialiased resize, which has no others.
DEVICE_FILTERS = ("bicubic", "bilinear")
# How many pixels may become one: the weights of a row must fit a GPU's shared memory, which ends at some 90.
MOST_SHRUNK = 32


class Decoder(Protocol):
    """Something that decodes on a device."""

    def __call__(self, files: Sequence[np.ndarray], boxes: Sequence[Box]) -> list[Tensor | None]:
        """Return of each plain JPEG (bytes as uint8) its box: (height, width, 3) uint8; None where it cannot."""
        ...


def decoder_on(device: torch.device, backend: str) -> Decoder:
    """Return nvJPEG where it is asked for on a GPU; else what reads on a CPU, so that the rest can be tried there."""
    return NvjpegDecoder(device) if backend == "nvjpeg" and device.type == "cuda" else decode_on_cpu


def decode_on_cpu(files: Sequence[np.ndarray], boxes: Sequence[Box]) -> list[Tensor | None]:
    """Decode as the CPU path does."""
    found: list[Tensor | None] = []
    for file, box in zip(files, boxes, strict=True):
        try:
            # At its own size, which no resizing changes.
            found.append(torch.from_numpy(open_picture(file.tobytes(), "simplejpeg").resized(box, box[2:], "bicubic")))
        except DecodeError:
            found.append(None)
    return found


class NvjpegDecoder:
    """nvJPEG through nvImageCodec, which decodes no more than the boxes, a batch at once on the current stream.

    Huffman decoding takes threads of the CPU, the rest is the GPU's. Raises ImportError where nvJPEG is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._codec = import_nvimgcodec("nvjpeg")
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # One way for all images, not the hardware's beside it for as many as it has room for: else an image's pixels
        # would depend on the batch it is in. Colour is interpolated as libjpeg does it.
        self._decoder = self._codec.Decoder(
            device_id=torch.cuda.current_device() if device.index is None else device.index,
            max_num_cpu_threads=max(1, cores - 1),  # of all cores it warns
            backends=[self._codec.Backend(self._codec.BackendKind.HYBRID_CPU_GPU)],
            options=":fancy_upsampling=1",
        )
        self._params = decode_params(self._codec)
        # Without the library, each image would go the slow way, and nobody would be told.
        if self([_small_jpeg()], [(0, 0, 16, 16)])[0] is None:
            raise ImportError(
                "data.backend=nvjpeg needs the library nvJPEG, which nvImageCodec does not find: "
                "pip install 'effnet-train[nvjpeg]', or use data.backend=simplejpeg"
            )

    def __call__(self, files: Sequence[np.ndarray], boxes: Sequence[Box]) -> list[Tensor | None]:
        """Decode the boxes; the host waits for its own part of the work, and not for the device."""
        if not files:
            return []
        streams = [code_stream(self._codec, file, box) for file, box in zip(files, boxes, strict=True)]
        images = self._decoder.decode(streams, params=self._params, cuda_stream=torch.cuda.current_stream().cuda_stream)
        return [None if image is None else torch.from_dlpack(image) for image in images]


def decode_params(codec: Any) -> Any:
    """Return how nvImageCodec is to decode: as `decode.decode`, to RGB, and no tag turns the image."""
    return codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)


def code_stream(codec: Any, file: np.ndarray, box: Box) -> Any:
    """Return nvImageCodec's view of a box in a file, whose memory it goes on using."""
    left, top, width, height = box
    region = codec.Region(top, left, top + height, left + width)
    return codec.CodeStream(file).get_sub_code_stream(region=region)


def _small_jpeg() -> np.ndarray:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8).copy()


def scaled(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Scale (height, width, 3) uint8 to `size` (width, height): (3, height, width) float32, not rounded nor cut yet."""
    # To the layout in which torch resizes floats fastest on a GPU.
    images = pixels.permute(2, 0, 1)[None].to(torch.float32, memory_format=torch.contiguous_format)
    width, height = size
    # Pillow scales rows, cuts them to bytes, and then scales columns (since 13 also the other way round, by the sizes).
    # Done at once, what bicubic overshoots would make pixels differ by up to six levels; and it is more to compute.
    if images.shape[3] != width:
        images = _interpolated(images, (images.shape[2], width), interpolation)
        images = rounded_(images).floor_()
    if images.shape[2] != height:
        images = _interpolated(images, size[::-1], interpolation)
    return images[0]


def rounded_(pixels: Tensor) -> Tensor:
    """Prepare floats, in place, to be cut to bytes: halves are rounded up, as by Pillow."""
    return pixels.add_(0.5).clamp_(0, 255)


def _interpolated(images: Tensor, size: tuple[int, ...], interpolation: str) -> Tensor:
    return nn.functional.interpolate(images, size, mode=interpolation, antialias=True)


def shrinks_too_much(box: Box, size: tuple[int, int]) -> bool:
    """Say whether a box must be scaled on the CPU."""
    return max(box[2] / size[0], box[3] / size[1]) > MOST_SHRUNK
