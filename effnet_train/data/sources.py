"""Where images come from: an index gives the encoded bytes and the label."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class Source(Protocol):
    """Images by index; cheap to send to worker processes."""

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Return the encoded image (or a decoded one, where the source has no bytes) and its label."""
        ...

    def name(self, index: int) -> str:
        """Return what a person would look for: a path, or the place in an archive."""
        ...


class FolderSource:
    """`root/<class>/**/<image>`: classes in sorted order, images in sorted order within them.

    Hidden files and folders are left out. Names and labels lie in three tensors, not in a Python list: a million paths
    cost what their letters cost, and worker processes share them instead of copying.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.classes = _class_names(Path(root))
        letters, lengths, counts = bytearray(), [], []
        for name in self.classes:
            found = sorted(_images_below(os.path.join(self.root, name), name))
            if not found:
                raise FileNotFoundError(
                    f"the class folder {os.path.join(self.root, name)} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
                    "remove it, or add its images"
                )
            counts.append(len(found))
            letters += b"".join(found)
            lengths.append(np.fromiter(map(len, found), dtype=np.int64))
        self._ends = torch.from_numpy(np.cumsum(np.concatenate(lengths)))
        self._letters = torch.frombuffer(letters, dtype=torch.uint8)
        self._labels = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts))

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the file's bytes and its class number."""
        with open(self.name(index), "rb") as file:
            return file.read(), int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the file's path."""
        start = int(self._ends[index - 1]) if index else 0
        relative = self._letters[start : int(self._ends[index])].numpy().tobytes()
        return os.path.join(self.root, os.fsdecode(relative))


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {root} does not exist: set data.root to a folder with train/<class>/ and val/<class>/"
        )
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        raise FileNotFoundError(f"data folder {root} holds no class folders: it should hold <class>/<image>")
    return classes


def _images_below(folder: str, prefix: str) -> Iterable[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, os.path.join(prefix, entry.name))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield os.fsencode(os.path.join(prefix, entry.name))


class TorchvisionSource:
    """One or more splits of a `torchvision.datasets` class, one after another."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = tuple(datasets)
        self._starts = [0, *itertools.accumulate(len(dataset) for dataset in self.datasets)]
        names = [name[0] if isinstance(name, tuple) else str(name) for name in self.datasets[0].classes]
        self.classes = tuple(names)

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        part = next(i for i, start in enumerate(self._starts[1:]) if index < start)
        return part, index - self._starts[part]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return the image as torchvision gives it, and its label."""
        part, place = self._place(index)
        image, label = self.datasets[part][place]
        return image, int(label)

    def name(self, index: int) -> str:
        """Return the data set's class, split and the place in it."""
        part, place = self._place(index)
        return f"{type(self.datasets[part]).__name__}[{part}][{place}]"


class Subset:
    """Some images of another source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.classes = source.classes
        self._indices = torch.from_numpy(np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Return the image and label of the source's image."""
        return self.source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return the source's name for it."""
        return self.source.name(int(self._indices[index]))
