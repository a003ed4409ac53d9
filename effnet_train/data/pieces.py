"""What `prepare` writes: its options, and how the images of a split are cut into pieces, a shard each."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from effnet_train.data.decode import decode
from effnet_train.data.order import permutation

FORMATS = ("folder", "shards")
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_SUFFIXES = {"PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "PPM": ".ppm", "TIFF": ".tif"}
FOLDER_PIECE = 500  # images


@dataclass(frozen=True)
class Options:
    """What is written: all that makes one output differ from another.

    `to` is `shards` or `folder`. A shard holds at most so many `images` and so many `megabytes` (10**6 bytes), None
    being no limit, and at least one image. The training images of shards stand in an order drawn by `seed`, or with
    None in their source's. With `resize` images whose shorter side is longer are scaled down to that, as RGB JPEGs of
    `quality` and `subsampling` without EXIF and colour profile; all other bytes stay as they are. Raises ValueError.
    """

    to: str
    images: int | None = 5000
    megabytes: float | None = None
    seed: int | None = 0
    resize: int | None = None
    quality: int = 95
    subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise ValueError(f"to={self.to} is not known: use {' or '.join(FORMATS)}")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"subsampling={self.subsampling} is not known: use one of {', '.join(SUBSAMPLINGS)}")
        for name, value in (("images", self.images), ("resize", self.resize), ("quality", self.quality)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.megabytes is not None and (self.megabytes <= 0 or self.to != "shards"):
            raise ValueError(
                f"megabytes={self.megabytes} is the size of a shard: give more than 0, and to=shards, or null"
            )
        if self.quality > 100:
            raise ValueError(f"quality={self.quality} must be at most 100")


class Piece(NamedTuple):
    """A part of a split, which one worker writes: images `indices` of the source, at places `start` and on."""

    split: str
    number: int
    start: int
    indices: np.ndarray

    @property
    def name(self) -> str:
        """Return what the manifest and the shard's file call it."""
        return f"{self.split}-{self.number:06d}"


def suffix_of(data: bytes) -> str:
    """Return the suffix of a file of an encoded image; `.jpg` where it is of no kind that has one here."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _SUFFIXES.get(image.format or "", ".jpg")
    except Exception:  # what it is, whoever decodes it will tell
        return ".jpg"


def shrink(data: bytes | Image.Image, options: Options) -> bytes | None:
    """Return an image scaled down as a JPEG, or None where it is small enough. Raises DecodeError."""
    assert options.resize is not None
    image = decode(data)
    shorter = min(image.size)
    if shorter <= options.resize:
        return None
    width, height = (max(1, round(side * options.resize / shorter)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    small.info = {}  # or Pillow would write the former file's comment
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=options.quality, subsampling=options.subsampling)
    return stream.getvalue()


def cut(split: str, count: int, options: Options, starts: Sequence[int] | None = None) -> Iterator[Piece]:
    """Yield the pieces of a split of `count` images: from each of `starts` to the next, or of the options' `images`."""
    shuffled = options.to == "shards" and split == "train" and options.seed is not None
    order = permutation(options.seed or 0, 0, count) if shuffled else np.arange(count)
    if starts is None:
        size = FOLDER_PIECE if options.to == "folder" else options.images or max(1, count)
        starts = range(0, count, size)
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], count], strict=True)):
        yield Piece(split, number, start, order[start:stop])


def starts_by_bytes(sizes: Iterable[int], options: Options) -> list[int]:
    """Return where shards begin that keep to the options' limits, given the bytes that each image takes in a shard."""
    assert options.megabytes is not None
    starts: list[int] = []
    images, total = 0, 0
    for place, size in enumerate(sizes):
        too_many = options.images is not None and images == options.images
        if not starts or too_many or shard_size(total + size) > options.megabytes * 1e6:
            starts.append(place)
            images, total = 0, 0
        images, total = images + 1, total + size
    return starts


def shard_size(members: int) -> int:
    """Return the bytes of a tar file whose members take so many: two empty blocks follow, and records are filled up."""
    return -(-(members + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def member(name: str, content: bytes) -> tarfile.TarInfo:
    """Return the header of a file in a shard: neither time nor owner, so that the same images give the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


def member_size(info: tarfile.TarInfo) -> int:
    """Return the bytes that a file takes in a shard: its header, and its content in whole blocks."""
    return len(info.tobuf(tarfile.PAX_FORMAT)) + padded(info.size)


def padded(length: int) -> int:
    """Return the bytes of the whole blocks that so many bytes take in a tar file."""
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
