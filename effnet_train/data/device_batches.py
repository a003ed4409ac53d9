"""Batches whose pixels are made on the device: what workers prepare for it, and the making, one batch ahead.

A worker reads the files and draws all that is random from the samples' keys, as on the CPU path; nothing here draws.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effnet_train.data.augment import Augment, Draws, erase_value
from effnet_train.data.backends import DEVICE_BACKENDS, Box, import_nvimgcodec, open_picture, plain_jpeg_size
from effnet_train.data.device_augment import Steps, apply, fill, flip, pinned, plan, send
from effnet_train.data.device_decode import DEVICE_FILTERS, Decoder, rounded_, scaled, shrinks_too_much
from effnet_train.data.preprocess import Preprocess, View, crop_view, eval_view, five_views

T = TypeVar("T")
_AT_ONCE = 32


class Sample(NamedTuple):
    """An image for the device: a JPEG as it is, uint8 (bytes,), or its view's scaled box (height, width, 3) uint8."""

    content: np.ndarray
    draws: Draws


class Part(NamedTuple):
    """Where a sample stands among a batch's contents, what of it is seen, and its image's place in the source."""

    start: int
    stop: int
    encoded: bool
    view: View
    image: int


@dataclass(frozen=True)
class Encoded:
    """A batch without its pixels.

    `contents` (bytes,) uint8 are the samples' one after another; `flips` (N,) bool; `erased` (N, 4) int64, the boxes
    (left, top, right, bottom), empty where nothing is erased, or None where that holds for all; labels, keys and errors
    are those of `loader.Batch`.
    """

    contents: Tensor
    parts: tuple[Part, ...]
    flips: Tensor
    erased: Tensor | None
    steps: Steps
    labels: Tensor
    keys: Tensor
    errors: list[str]

    def pin_memory(self, device: Any = None) -> "Encoded":
        """Return a copy in memory from which a device copies by itself: DataLoader calls this."""
        groups, *arrays = self.steps
        tensors: Any = {key: pinned(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, steps=Steps(groups, *map(pinned, arrays)))


def check_device(
    backend: str,
    device: torch.device,
    preprocess: Preprocess,
    augment: Augment | None = None,
    *,
    key: str = "data.backend",
) -> None:
    """Check that a data set can be decoded where it is asked to be; `key` is what the user sets.

    Raises ValueError; ImportError naming the extra.
    """
    if backend not in DEVICE_BACKENDS:
        return
    if device.type != "cuda":
        raise ValueError(
            f"{key}={backend} works on a GPU, and device={device} is none: set {key}=simplejpeg, "
            "or device=cuda where there is one"
        )
    if backend == "nvjpeg" and preprocess.interpolation not in DEVICE_FILTERS:
        raise ValueError(
            f"preprocess.interpolation={preprocess.interpolation} is none of {', '.join(DEVICE_FILTERS)}, which "
            f"{key}={backend} has: set {key}=pillow for it"
        )
    if augment is not None:
        augment.check_drawable()
    if backend == "nvjpeg":
        import_nvimgcodec(backend)


# --- in a worker ---


def sample(
    data: bytes | Image.Image, backend: str, preprocess: Preprocess, draw: Callable[[tuple[int, int]], Draws]
) -> Sample:
    """Prepare an image; `draw` tells what is to be done to one of its size. Raises DecodeError.

    What no device can read is read and scaled here, as on the CPU path; with `hybrid` that is everything.
    """
    size = plain_jpeg_size(data) if backend == "nvjpeg" else None
    if size is not None:
        assert isinstance(data, bytes)
        draws = draw(size)
        if not shrinks_too_much(draws.view.box, draws.view.size):
            return Sample(np.frombuffer(data, dtype=np.uint8), draws)
    picture = open_picture(data, backend)
    draws = draw(picture.size)
    return Sample(picture.resized(draws.view.box, draws.view.size, preprocess.interpolation), draws)


def evaluation_draws(size: tuple[int, int], preprocess: Preprocess, crops: int) -> Draws:
    """Return what is to be seen of an image in evaluation: one crop, or five."""
    return Draws((eval_view if crops == 1 else five_views)(size, preprocess))


def encoded(
    samples: Sequence[Sample],
    indices: Sequence[int],
    labels: Sequence[int],
    keys: Sequence[int],
    errors: list[str],
    *,
    resolution: int,
) -> Encoded:
    """Put samples together, for images of `resolution` pixels square."""
    stops = np.cumsum([0, *(one.content.size for one in samples)]).tolist()
    parts = tuple(
        Part(start, stop, one.content.ndim == 1, one.draws.view, index)
        for start, stop, one, index in zip(stops, stops[1:], samples, indices, strict=False)
    )
    contents = np.empty(stops[-1], dtype=np.uint8)
    for part, one in zip(parts, samples, strict=True):
        contents[part.start : part.stop] = one.content.reshape(-1)
    boxes = [one.draws.erase for one in samples]
    return Encoded(
        contents=torch.from_numpy(contents),
        parts=parts,
        flips=torch.tensor([one.draws.flip for one in samples], dtype=torch.bool),
        erased=torch.tensor([_edges(box) for box in boxes]) if any(boxes) else None,
        steps=plan([one.draws.operations for one in samples], (resolution, resolution)),
        labels=torch.tensor(labels, dtype=torch.int64),
        keys=torch.tensor(keys, dtype=torch.int64),
        errors=errors,
    )


def _edges(box: Box | None) -> Box:
    if box is None:
        return 0, 0, 0, 0
    left, top, width, height = box
    return left, top, left + width, top + height


# --- on the device ---


def crops(batch: Encoded, decode: Decoder, preprocess: Preprocess, device: torch.device) -> tuple[Tensor, list[int]]:
    """Decode and scale: return pixels (N, crops, R, R, 3) uint8 on the device, and whom the decoder could not read.

    Those are black. There must be something to decode.
    """
    contents, size = batch.contents.numpy(), preprocess.resolution
    if not any(part.encoded or part.view != crop_view(part.view.box, preprocess) for part in batch.parts):
        return send(batch.contents, device).view(-1, 1, size, size, 3), []  # all is done
    coded = [row for row, part in enumerate(batch.parts) if part.encoded]
    files = [contents[batch.parts[row].start : batch.parts[row].stop] for row in coded]
    found = dict(zip(coded, decode(files, [batch.parts[row].view.box for row in coded]), strict=True))
    unread = [row for row in coded if found[row] is None]
    views = len(batch.parts[0].view.corners)
    pixels = torch.empty(len(batch.parts), views, size, size, 3, dtype=torch.uint8, device=device)
    # As floats they are four times as large: only some at a time, but rounded all of these at once.
    for first in range(0, len(batch.parts), _AT_ONCE):
        floats = torch.zeros(pixels[first : first + _AT_ONCE].shape, device=device)
        for row, squares in enumerate(floats, first):
            part = batch.parts[row]
            image = found.pop(row) if part.encoded else _sent(batch, part, device)
            if image is not None:
                whole = scaled(image, part.view.size, preprocess.interpolation).permute(1, 2, 0)
                for corner, square in zip(part.view.corners, squares, strict=True):
                    _cut(whole, corner, part.view.shift, square)
        pixels[first : first + _AT_ONCE] = rounded_(floats)
    return pixels, unread


def _sent(batch: Encoded, part: Part, device: torch.device) -> Tensor:
    """Copy pixels that were scaled on the CPU."""
    width, height = part.view.size
    return send(batch.contents[part.start : part.stop].view(height, width, 3), device)


def _cut(whole: Tensor, corner: tuple[int, int], shift: tuple[int, int], square: Tensor) -> None:
    """Copy a square of an image into a black one, as `preprocess.View.cut` does."""
    (left, top), (right, down), size = corner, shift, len(square)
    rows, columns = (slice(max(0, by), size + min(0, by)) for by in (down, right))
    to_rows, to_columns = (slice(max(0, -by), size - max(0, by)) for by in (down, right))
    square[to_rows, to_columns] = whole[top : top + size, left : left + size][rows, columns]


def augmented(pixels: Tensor, batch: Encoded, preprocess: Preprocess) -> Tensor:
    """Flip, apply the policy and erase: images (N, R, R, 3) uint8."""
    images = apply(flip(pixels, batch.flips), batch.steps)  # of the copy that flip makes, in place
    if batch.erased is None:
        return images
    colour = send(torch.tensor([erase_value(preprocess)]), pixels.device)
    return fill(images, send(batch.erased, pixels.device), colour)


def ahead(make: Callable[[], T | None], device: torch.device, tensors: Callable[[T], Sequence[Tensor]]) -> Iterator[T]:
    """Yield what `make` makes until it makes None, each begun while the one before is used.

    It is called in a thread of its own, as decoding takes the host's time too, and on a GPU on a stream of its own. The
    current stream waits for what is yielded, whose `tensors` it may then use; the host waits for neither.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def on_stream() -> tuple[T | None, torch.cuda.Event | None]:
        if stream is None:
            return make(), None
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            made, done = make(), torch.cuda.Event()
            done.record(stream)
            return made, done

    with ThreadPoolExecutor(1, thread_name_prefix="device-batches") as thread:
        coming = thread.submit(on_stream)
        while True:
            made, done = coming.result()
            if made is None:
                return
            coming = thread.submit(on_stream)
            if done is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(done)
                for tensor in tensors(made):
                    tensor.record_stream(current)
            yield made
