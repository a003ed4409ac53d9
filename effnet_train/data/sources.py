"""Where images come from: an index gives the encoded bytes and the label."""

import io
import itertools
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

STDIN = "-"
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


class Names:
    """Many paths, as two tensors instead of a list.

    A million cost what their letters cost, and worker processes share them instead of copying.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        letters, lengths = bytearray(), array("q")
        for name in names:
            letters += name
            lengths.append(len(name))
        self._ends = torch.from_numpy(np.cumsum(np.frombuffer(lengths, dtype=np.int64)))
        self._letters = torch.frombuffer(letters, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        # Through numpy, which takes a number out of an array ten times as fast as torch does.
        ends = self._ends.numpy()
        start = ends[index - 1] if index else 0
        return os.fsdecode(self._letters.numpy()[start : ends[index]].tobytes())


class FolderSource:
    """`root/<class>/**/<image>`: classes in sorted order, images in sorted order within them.

    Hidden files and folders are left out. Names and labels lie in tensors, see `Names`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.classes = _class_names(Path(root))
        counts: list[int] = []
        self._names = Names(self._below_classes(counts))
        self._labels = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts))

    def _below_classes(self, counts: list[int]) -> Iterator[bytes]:
        for name in self.classes:
            found = sorted(_images_below(os.path.join(self.root, name), name))
            if not found:
                raise FileNotFoundError(
                    f"the class folder {os.path.join(self.root, name)} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
                    "remove it, or add its images"
                )
            counts.append(len(found))
            yield from found

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the file's bytes and its class number."""
        with open(self.name(index), "rb") as file:
            return file.read(), int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, self._names[index])


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {root} does not exist: set data.root to a folder with train/<class>/ and val/<class>/ "
            "(data=eval_folder evaluates on a folder of <class>/ alone)"
        )
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        raise FileNotFoundError(
            f"data folder {root} holds no class folders: it should hold <class>/<image>{_prepare_hint(root)}"
        )
    return classes


def _prepare_hint(root: Path) -> str:
    """Return what to say of a folder of ImageNet's validation images as their archive unpacks."""
    if not any(root.glob("ILSVRC2012_val_*")):
        return ""
    return (
        ". These are ImageNet's validation images without their classes: effnet-data prepare to=folder "
        "data.root=/folder/of/ImageNet's/archives output=/path writes train/ and val/ with class folders"
    )


def _images_below(folder: str, prefix: str) -> Iterable[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, os.path.join(prefix, entry.name))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield os.fsencode(os.path.join(prefix, entry.name))


class Files:
    """Images without labels: files by name, and `content`, the bytes of the one that has the name `-`, if any."""

    classes: tuple[str, ...] = ()

    def __init__(self, names: Iterable[bytes], content: bytes = b"") -> None:
        self._names, self._content = Names(names), content

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the file's bytes, and 0."""
        name = self.name(index)
        if name == STDIN:
            return self._content, 0
        with open(name, "rb") as file:
            return file.read(), 0

    def name(self, index: int) -> str:
        """Return the file's path."""
        return self._names[index]


def find_files(inputs: Sequence[str], stdin: bytes | None = None) -> Files:
    """Return the images that the inputs name: files, all images of folders and what is below them, and `-`.

    What comes through `-`, `stdin`, is one encoded image, or the paths of images and folders, one a line.
    Raises FileNotFoundError naming what is not there.
    """
    found: list[Iterable[bytes]] = []
    content = b""
    for text in inputs:
        if text != STDIN:
            found.append(_images_of(text))
        elif stdin and _is_image(stdin):
            found.append([os.fsencode(STDIN)])
            content = stdin
        else:
            # Of a long list, one name may be stale: it is told in its place, when it is read.
            lines = [line for line in (stdin or b"").splitlines() if line.strip()]
            found += [_images_of(os.fsdecode(line)) if os.path.isdir(line) else [line] for line in lines]
    if not found:
        raise FileNotFoundError(f"nothing came from {', '.join(inputs)}: neither an image nor paths of images")
    return Files(itertools.chain.from_iterable(found), content)


def _is_image(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: decoding will tell
            Image.open(io.BytesIO(data)).close()
            return True
    except (OSError, Image.DecompressionBombError):
        return b"\0" in data  # no list of paths either: it will be reported as an image that cannot be read


def _images_of(name: str) -> Iterable[bytes]:
    if os.path.isdir(name):
        found = sorted(_images_below(name, name))
        if not found:
            raise FileNotFoundError(f"the folder {name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        return found
    if not os.path.exists(name):
        raise FileNotFoundError(f"{name} does not exist: give images, folders, or - for standard input")
    return [os.fsencode(name)]


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
