"""Batches of decoded, augmented images from worker processes."""

import errno
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from effnet_train.data.augment import Augment, Draws
from effnet_train.data.backends import DEVICE_BACKENDS, open_picture
from effnet_train.data.datasets import Data
from effnet_train.data.decode import DecodeError
from effnet_train.data.device_augment import send
from effnet_train.data.device_batches import Encoded, Sample, ahead, augmented, crops, encoded, evaluation_draws, sample
from effnet_train.data.device_decode import decoder_on
from effnet_train.data.order import MixedOrder, Order
from effnet_train.data.preprocess import eval_image, five_crops
from effnet_train.data.sources import Source
from effnet_train.data.workers import leave_with_the_trainer, worker_context

# How many neighbours stand in for a corrupt training image before the loader gives up.
_SUBSTITUTES = 10
# Errors that say nothing of the image: passed over, they would take one after another for corrupt.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_CPU = torch.device("cpu")
# Batches that a worker may be ahead.
_PREFETCH = 2
T = TypeVar("T")
_Items = list[tuple[int, int]]  # index and key of each image


class Batch(NamedTuple):
    """Images (N, R, R, 3) uint8, labels (N,) int64, keys (N,) int64, and what could not be read.

    In evaluation a key is the image's index in its source, and with several crops images are (N, crops, R, R, 3).
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    errors: list[str]


class DataError(ValueError):
    """A corrupt image, where `data.on_error=raise`."""


class _Images(Dataset[Batch]):
    """Turns a list of (index, key) into a batch; `augment` None is the evaluation transform, of 1 or 5 crops."""

    def __init__(self, source: Source, data: Data, augment: Augment | None, crops: int = 1) -> None:
        self.source, self.augment, self.crops = source, augment, crops
        self.preprocess, self.backend = data.preprocess, data.backend

    def empty(self, *counts: int) -> Tensor:
        """Return room for the pixels of so many images."""
        size = self.preprocess.resolution
        shape = (*counts, *(() if self.crops == 1 else (self.crops,)), size, size, 3)
        # numpy's memory comes in large pages: with torch's, as long goes by as in decoding every eighth image.
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))

    def __getitems__(self, items: _Items) -> Batch:
        return self.batch(items, self.empty(len(items)))

    def batch(self, items: _Items, room: Tensor) -> Batch:
        """Return the batch of the items, its pixels in the first of the `room`."""
        images = room.numpy()
        labels: list[int] = []
        keys: list[int] = []
        errors: list[str] = []
        for index, key in items:
            found = self.load(index, key, errors, self.pixels)
            if found is not None:
                images[len(labels)], label, _ = found
                labels.append(label)
                keys.append(key)
        pixels = room[: len(labels)]
        return Batch(pixels, torch.tensor(labels, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64), errors)

    def load(self, index: int, key: int, errors: list[str], make: Callable[[Any, int], T]) -> tuple[T, int, int] | None:
        """Return what is made of an image and a key, label and index; in training, of the next for a corrupt one."""
        tries = _SUBSTITUTES if self.augment else 1
        for place in range(index, index + tries):
            place %= len(self.source)
            try:
                data, label = self.source.read(place)
                return make(data, key), label, place
            except (DecodeError, OSError) as error:
                if getattr(error, "errno", None) in _OF_THE_MACHINE:
                    raise
                errors.append(f"{self.source.name(place)}: {error}")
        return None

    def pixels(self, data: bytes | Image.Image, key: int) -> np.ndarray:
        """Return the pixels of one image."""
        picture = open_picture(data, self.backend)
        if self.augment:
            return self.augment(picture, self.preprocess, key)
        return eval_image(picture, self.preprocess) if self.crops == 1 else five_crops(picture, self.preprocess)


class _Shared(Dataset[Batch]):
    """The same in a worker, whose pixels go to places in memory that all processes see: (place, [(index, key), ...]).

    Making such memory anew for each batch takes a worker as long as one image in twenty.
    """

    def __init__(self, images: _Images, batch_size: int, batches: int) -> None:
        rooms = images.empty(batches, batch_size)
        try:
            self.images, self.rooms = images, rooms.share_memory_()
        except RuntimeError as error:
            raise ValueError(
                f"data workers need {rooms.nbytes / 1e9:.1f} GB of shared memory for {batches} batches of {batch_size} "
                f"images, which is not to be had ({error}): set fewer workers=, more accumulate=, or give a container "
                "more (docker run --shm-size=...)"
            ) from error

    def __getitems__(self, placed: tuple[int, _Items]) -> Batch:
        place, items = placed
        return self.images.batch(items, self.rooms[place])

    def places(self, lists: Iterable[_Items]) -> Iterator[tuple[int, _Items]]:
        """Give each list its place, in turn."""
        return ((number % len(self.rooms), items) for number, items in enumerate(lists))


class _Samples(Dataset[Encoded]):
    """The same for a device, which makes the pixels."""

    def __init__(self, images: _Images) -> None:
        self.images = images

    def __getitems__(self, items: _Items) -> Encoded:
        errors: list[str] = []
        loaded = [(self.images.load(index, key, errors, self._sample), key) for index, key in items]
        rows = [(*found, key) for found, key in loaded if found is not None]
        samples, labels, indices, keys = zip(*rows, strict=True) if rows else ((), (), (), ())
        return encoded(samples, indices, labels, keys, errors, resolution=self.images.preprocess.resolution)

    def _sample(self, data: bytes | Image.Image, key: int) -> Sample:
        return sample(data, self.images.backend, self.images.preprocess, partial(self._draw, key))

    def _draw(self, key: int, size: tuple[int, int]) -> Draws:
        augment, preprocess = self.images.augment, self.images.preprocess
        return augment.draw(size, preprocess, key) if augment else evaluation_draws(size, preprocess, self.images.crops)


class _OnDevice:
    """Makes the pixels of what `_Samples` prepared."""

    def __init__(self, images: _Images, device: torch.device) -> None:
        self.images, self.device, self.decode = images, device, decoder_on(device, images.backend)

    def __call__(self, prepared: Encoded) -> Batch:
        if not prepared.parts:
            return Batch(self.images.empty(0).to(self.device), prepared.labels, prepared.keys, prepared.errors)
        preprocess = self.images.preprocess
        pixels, unread = crops(prepared, self.decode, preprocess, self.device)
        if self.images.crops == 1:
            pixels = pixels[:, 0]
        if self.images.augment:
            pixels = augmented(pixels, prepared, preprocess)
        batch = Batch(pixels, prepared.labels, prepared.keys, prepared.errors)
        return self._mended(batch, [(row, prepared.parts[row].image) for row in unread]) if unread else batch

    def _mended(self, batch: Batch, unread: _Items) -> Batch:
        """Read on the CPU what the device could not, as its header did not tell: (row, index in the source)."""
        labels, kept, errors = batch.labels.clone(), torch.ones(len(batch.labels), dtype=torch.bool), [*batch.errors]
        for row, index in unread:
            found = self.images.load(index, int(batch.keys[row]), errors, self.images.pixels)
            kept[row] = found is not None
            if found is not None:
                pixels, labels[row], _ = found
                batch.images[row] = send(torch.tensor(pixels), self.device)
        rows = kept.nonzero()[:, 0]
        labels, keys = labels[rows], batch.keys[rows]
        if self.device.type == "cuda":
            labels, keys = labels.pin_memory(), keys.pin_memory()
        return Batch(batch.images[send(rows, self.device)], labels, keys, errors)


def _identity(batch: Any) -> Any:
    return batch


def _batches(
    images: _Images, lists: "_MicroBatches | _Shares", workers: int, device: torch.device, batch_size: int
) -> Iterator[Batch]:
    """Yield the batch of each list of (index, key), of `batch_size` at most.

    Its pixels are in pinned memory where the device is a GPU, or on the device if they are made there.
    """
    if images.backend in DEVICE_BACKENDS:
        prepared, make = _loader(_Samples(images), lists, workers, device), _OnDevice(images, device)

        def following() -> Batch | None:
            batch = next(prepared, None)
            return None if batch is None else make(batch)

        yield from ahead(following, device, lambda batch: [batch.images])
    elif workers:
        # One place more than batches on their way: that of the batch which was asked for last, and is copied below.
        shared = _Shared(images, batch_size, min(workers * _PREFETCH + 1, max(1, len(lists))))
        for batch in _loader(shared, shared.places(lists), workers, device):
            # The pinned is a copy already.
            yield batch if device.type == "cuda" else batch._replace(images=_copy(batch.images))
    else:
        yield from _loader(images, lists, workers, device)


def _copy(images: Tensor) -> Tensor:
    return torch.from_numpy(images.numpy().copy())  # numpy: see `_Images.empty`


def _loader(images: Dataset[Any], lists: Iterable[Any], workers: int, device: torch.device) -> Iterator[Any]:
    """Return what is made of each of `lists`, begun at once."""
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=lists,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=leave_with_the_trainer,
        pin_memory=device.type == "cuda",
        multiprocessing_context=worker_context() if workers else None,
        prefetch_factor=_PREFETCH if workers else None,
    )
    return _received(iter(loader))


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield a DataLoader's batches. Raises RuntimeError of a worker that has died."""
    try:
        yield from batches
    # The fork server may tell of a death only after what the dead one had ready could not be fetched from it.
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
    except RuntimeError as error:
        if not str(error).startswith("Pin memory thread exited"):  # of the same, in a thread of its own
            raise
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({error})") from error


class _MicroBatches:
    """The (index, key) lists of all micro-batches of `steps`, made when asked for.

    A worker makes one at a time: what a rank holds in shared memory shrinks as `accumulate` grows.
    """

    def __init__(self, order: Order | MixedOrder, steps: range, accumulate: int) -> None:
        self.order, self.steps, self.accumulate = order, steps, accumulate
        self.size, rest = divmod(order.batch_size // order.world_size, accumulate)
        assert not rest

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[_Items]:
        for step in self.steps:
            indices, keys = self.order.batch(step)
            items = list(zip(indices.tolist(), keys.tolist(), strict=True))
            yield from (items[start : start + self.size] for start in range(0, len(items), self.size))


class _Shares:
    """The (index, index) lists of a rank's share of an evaluation, `starts.step` images each, made when asked for."""

    def __init__(self, mine: range, starts: range) -> None:
        self.mine, self.starts = mine, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[_Items]:
        for start in self.starts:
            yield [(i, i) for i in self.mine[start : start + self.starts.step]]


def train_batches(
    data: Data,
    augment: Augment,
    order: Order | MixedOrder,
    *,
    start: int,
    stop: int,
    accumulate: int = 1,
    workers: int = 0,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """Yield this rank's `accumulate` equal micro-batches for each of the steps from `start` to before `stop`.

    They are the same for any number of workers. With `data.backend` one of a device, their pixels are made and lie on
    `device`, which may be a CPU for a trial; else they are to be copied there. Raises DataError for a corrupt image
    where the data set says `raise`; else the next image takes its place.
    """
    parts = _MicroBatches(order, range(start, stop), accumulate)
    for batch in _batches(_Images(data.train, data, augment), parts, workers, device, parts.size):
        _raise_errors(batch, data.on_error)
        if len(batch.labels) < parts.size:
            raise DataError(
                f"{_SUBSTITUTES} images in a row cannot be read, the last {batch.errors[-1]}; mend or remove them"
            )
        yield batch


def eval_batches(
    source: Source,
    data: Data,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device = _CPU,
    crops: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of `source`, every image once over all ranks, none repeated to fill a batch.

    `crops` is 1, the central one, or 5 (`preprocess.five_crops`); an image's key is its index in `source`.
    All ranks have as many batches, so that they can agree on something after each: the last may be empty on some.
    """
    mine, most = range(rank, len(source), world_size), math.ceil(len(source) / world_size)
    assert crops in (1, 5)
    lists = _Shares(mine, range(0, most, batch_size))
    for batch in _batches(_Images(source, data, None, crops), lists, workers, device, min(batch_size, most)):
        _raise_errors(batch, data.on_error)
        yield batch


def listing(batches: Iterable[Batch], file: Path) -> Iterator[Batch]:
    """Yield `batches`, adding to `file` a line for each image skipped: its name and what is wrong; each once."""
    known = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()
    for batch in batches:
        new = dict.fromkeys(" ".join(text.splitlines()) for text in batch.errors)
        lines = [text for text in new if text not in known]
        if lines:
            known.update(lines)
            # Of one write, so that the lines of several ranks do not mix.
            with file.open("a", encoding="utf-8") as opened:
                opened.write("".join(f"{line}\n" for line in lines))
        yield batch


def _raise_errors(batch: Batch, on_error: str) -> None:
    if on_error == "skip":
        for text in batch.errors:
            print(f"warning: skipped the image {text}", file=sys.stderr)
    elif batch.errors:
        raise DataError(
            f"cannot read the image {batch.errors[0]}; mend or remove it, or set data.on_error=skip to go on without it"
        )
