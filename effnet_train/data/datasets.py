"""Data sets: what to train on, what to select on, what to report, and how pixels reach the model."""

import difflib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import numpy as np

from effnet_train.data.backends import BACKENDS, check_backend
from effnet_train.data.order import permutation
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import FolderSource, Source, Subset, TorchvisionSource

ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class Data:
    """A data set ready to read.

    `val` is what training is watched and selected by; `test` is None, or the untouched validation set where `val` was
    held out of the training images. `on_error` says what a corrupt image does: `raise`, or `skip` with a count;
    `backend` is what decodes and resizes, see `backends.open_picture`. `per_class` asks for the mean of the classes'
    accuracies too.
    """

    train: Source
    val: Source
    test: Source | None
    preprocess: Preprocess
    on_error: str
    backend: str = BACKENDS[0]
    per_class: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names, in the order of the labels."""
        return self.train.classes


class Common(TypedDict, total=False):
    """The arguments that all data sets share; `assemble` tells what they mean and what they are without a value."""

    preprocess: Required[Preprocess]
    minival: int
    on_error: str
    backend: str
    expected: Mapping[str, int] | None
    per_class: bool


def assemble(
    root: str,
    train: Source,
    val: Source,
    *,
    preprocess: Preprocess,
    minival: int = 0,
    on_error: str = "raise",
    backend: str = BACKENDS[0],
    expected: Mapping[str, int] | None = None,
    per_class: bool = False,
) -> Data:
    """Check that `train` and `val` belong together, and hold `minival` images out of `train` for selection.

    `expected` (classes, train, val) is what a complete copy holds: a plan can be made without the images, and a copy
    that differs is refused.
    """
    check_counts(root, [train, val], expected)
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f"data.root={root}: train has {len(train.classes)} classes and val {len(val.classes)}, and they differ: "
            f"only in train {only_train[:5]}, only in val {only_val[:5]}; the class folders of both must be the same"
        )
    if len(train.classes) < 2:
        raise ValueError(
            f"data.root={root}: there is one class, {train.classes[0]!r}: to tell classes apart, give at least two"
        )
    check_on_error(on_error)
    check_backend(backend)
    if not 0 <= minival < len(train):
        raise ValueError(f"data.minival={minival} must be less than the {len(train)} training images, and not negative")
    if minival == 0:
        return Data(train, val, None, preprocess, on_error, backend, per_class)
    # The split must not change with the run's seed: two runs are to be selected by the same images.
    shuffled = permutation(0, 0, len(train))
    held_out, rest = np.sort(shuffled[:minival]), np.sort(shuffled[minival:])
    return Data(Subset(train, rest), Subset(train, held_out), val, preprocess, on_error, backend, per_class)


def check_on_error(on_error: str) -> None:
    """Check what a corrupt image is to do. Raises ValueError."""
    if on_error not in ON_ERROR:
        raise ValueError(f"data.on_error={on_error} is not known: use one of {', '.join(ON_ERROR)}")


def image_folders(root: str, *, train: str = "train", val: str = "val", **common: Unpack[Common]) -> Data:
    """Read `root/train/<class>/<image>` and `root/val/<class>/<image>`, ImageNet's layout."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root} does not exist: set it to a folder that holds {train}/ and {val}/")
    for key, name in (("train", train), ("val", val)):
        if not Path(root, name).is_dir():
            raise FileNotFoundError(
                f"data.root={root} has no folder data.{key}={name}: set data.root to a folder with {train}/<class>/ "
                f"and {val}/<class>/, or data.{key} to another name (data=eval_folder evaluates on a folder of "
                "<class>/ alone)"
            )
    return assemble(root, *(FolderSource(Path(root) / split) for split in (train, val)), **common)


def birdsnap(root: str, *, train: str = "train", val: str = "test", **common: Unpack[Common]) -> Data:
    """Read Birdsnap, which torchvision does not know, in ImageNet's layout."""
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"data.root={root} does not exist, and Birdsnap is not downloaded from here: its authors' lists, "
            "birdsnap.tgz of https://thomasberg.org, give the photographs' addresses, of which many are gone; what is "
            f"left goes to {train}/<class>/ and, if test_images.txt names it, {val}/<class>/ there"
        )
    return image_folders(root, train=train, val=val, **common)


def eval_folder(
    root: str,
    *,
    preprocess: Preprocess,
    on_error: str = "raise",
    backend: str = BACKENDS[0],
    expected: Mapping[str, int] | None = None,
) -> Data:
    """Read `root/<class>/<image>` to evaluate on: there are no training images."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root} does not exist: set it to a folder that holds <class>/<image>")
    val = FolderSource(root)
    none = Subset(val, np.arange(0))
    check_counts(root, [none, val], expected)
    check_on_error(on_error)
    check_backend(backend)
    return Data(none, val, None, preprocess, on_error, backend)


def torchvision_splits(
    root: str,
    *,
    dataset: str,
    train: Sequence[Mapping[str, Any]],
    val: Sequence[Mapping[str, Any]],
    **common: Unpack[Common],
) -> Data:
    """Read a class of `torchvision.datasets`; `train` and `val` list the arguments of the splits each is made of.

    The data are downloaded where they are absent and there is a network. Raises FileNotFoundError otherwise.
    """
    from torchvision import datasets

    if dataset not in datasets.__all__:
        near = difflib.get_close_matches(dataset, datasets.__all__) or datasets.__all__
        raise ValueError(f"data.dataset={dataset} is no class of torchvision.datasets: did you mean {', '.join(near)}?")
    kind = getattr(datasets, dataset)

    def load(splits: Sequence[Mapping[str, Any]]) -> TorchvisionSource:
        return TorchvisionSource([_load(kind, root, dict(split)) for split in splits])

    return assemble(root, load(train), load(val), **common)


def _load(kind: Any, root: str, arguments: dict[str, Any]) -> Any:
    try:
        return kind(root, **arguments, download=False)
    except ModuleNotFoundError as error:
        raise ImportError(f"{kind.__name__} needs a package more: pip install 'effnet-train[datasets]'") from error
    except (RuntimeError, FileNotFoundError):
        pass
    try:
        # Downloads print progress bars; a folder that is already there is an error for some of these classes.
        return kind(root, **arguments, download=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"data.root={root} does not hold {kind.__name__} ({arguments}), and downloading it failed "
            f"({reason}): put the files of torchvision.datasets."
            f"{kind.__name__} under {Path(root).absolute()}, or run once where there is a network"
        ) from error


def check_counts(root: str, sources: Sequence[Source], expected: Mapping[str, int] | None) -> None:
    """Check that a data set is complete. Raises ValueError telling which numbers differ from those `expected`."""
    if expected is None:
        return
    found = {"classes": len(sources[0].classes), "train": len(sources[0]), "val": len(sources[1])}
    wrong = {key: (count, found[key]) for key, count in expected.items() if found[key] != count}
    if wrong:
        text = ", ".join(f"{key}: {want} expected, {got} found" for key, (want, got) in wrong.items())
        raise ValueError(f"data.root={root} is not complete ({text}): mend it, or set data.expected=null")


def digits(root: str, **common: Unpack[Common]) -> Data:
    """Read the 1,797 handwritten digits that scikit-learn carries, written to `root` once as an image folder.

    Every fifth image of each class is held out for validation.
    """
    if not Path(root).is_dir():
        _write_digits(Path(root))
    return image_folders(root, **common)


def _write_digits(root: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data=digits needs scikit-learn, which holds it: pip install 'effnet-train[digits]'"
        ) from error
    from PIL import Image

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a folder of that name is always whole.
    unfinished = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        for digit in range(10):
            for count, index in enumerate(np.flatnonzero(labels == digit)):
                folder = unfinished / ("val" if count % 5 == 0 else "train") / str(digit)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index]).save(folder / f"{index:04d}.png")
        os.chmod(unfinished, 0o755)
        try:
            unfinished.rename(root)
        except OSError:
            # Another run may have been quicker: what it wrote is the same.
            if not root.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
