"""Pseudo-labels: which of a teacher's are kept, and images under them beside the labelled ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effnet_train.data.keys import sample_keys
from effnet_train.data.order import MixedOrder, Order
from effnet_train.data.sources import Source

MANIFEST, CHOSEN, SOFT = "manifest.json", "chosen.npy", "soft.npy"
# The pseudo-labelled images' order and augmentation must have nothing to do with the labelled ones'.
_SALT = 0x70736575646F


def select(
    labels: np.ndarray, confidences: np.ndarray, *, threshold: float, per_class: int | None, seed: int = 0
) -> np.ndarray:
    """Return the indices of the images to train on, int64; one may be there several times.

    `labels` (N,) are a teacher's likeliest classes, `confidences` (N,) their probabilities. Images below the
    `threshold` are left out, and those without a probability above 0. With `per_class`, each class that any image is
    left of gets just so many: the most confident ones, or where there are fewer, all of them again and again, and of
    the last time a random part. Source: Xie et al., "Self-training with Noisy Student", 2020, section 3.1.
    """
    kept = np.flatnonzero((confidences >= threshold) & (confidences > 0))
    if per_class is None:
        return kept
    ranked = kept[np.lexsort((kept, -confidences[kept].astype(np.float64), labels[kept]))]
    groups = np.split(ranked, np.flatnonzero(np.diff(labels[ranked])) + 1) if len(ranked) else []
    return np.concatenate([np.arange(0), *(_filled(group, per_class, seed) for group in groups)])


def _filled(group: np.ndarray, count: int, seed: int) -> np.ndarray:
    times, rest = divmod(count, len(group))
    if not times:
        return group[:count]
    some = group[np.argsort(sample_keys(seed, 0, group), kind="stable")[:rest]]
    return np.concatenate([np.tile(group, times), some])


@dataclass(frozen=True, kw_only=True)
class Pseudo:
    """Which pseudo-labels there are, if any, and how many images of them go with each labelled one. Raises ValueError.

    `labels` is the folder that `effnet-label` wrote, `root` the place of the images if that has changed; with `soft`
    the targets are the teacher's probabilities.
    """

    labels: str | None = None
    root: str | None = None
    ratio: int = 1
    soft: bool = True

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"pseudo.ratio={self.ratio} must be at least 1: pseudo-labelled images to a labelled one")
        idle = [one for one in fields(self) if one.name != "labels" and getattr(self, one.name) != one.default]
        if self.labels is None and idle:
            raise ValueError(
                f"pseudo.{idle[0].name}={getattr(self, idle[0].name)} needs pseudo-labels: give pseudo.labels=..., the "
                "folder that effnet-label wrote"
            )


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """Return what `effnet-label` says of the labels in a folder. Raises FileNotFoundError where it has not ended."""
    try:
        manifest: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"pseudo.labels={folder} holds no {MANIFEST}: let effnet-label output={folder} come to its end first"
        ) from error
    return manifest


class PseudoLabelled:
    """Images of `source` by `chosen`, int64 (M, 3): image, class, and the row of the teacher's probabilities.

    A label is a class, or with `soft` the number of classes and the row: `SoftLabels` turns both into targets.
    """

    def __init__(self, source: Source, chosen: np.ndarray, classes: tuple[str, ...], *, soft: bool) -> None:
        self.source, self.classes = source, classes
        self._images = torch.from_numpy(chosen[:, 0].copy())
        self._labels = torch.from_numpy(len(classes) + chosen[:, 2] if soft else chosen[:, 1].copy())

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Return the image, and its label."""
        return self.source.read(int(self._images[index]))[0], int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the source's name for it."""
        return self.source.name(int(self._images[index]))


class Joined:
    """The images of two sources, one after another."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second, self.classes = first, second, first.classes

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """Return the image and label of the one that it is of."""
        return self.first.read(index) if index < len(self.first) else self.second.read(index - len(self.first))

    def name(self, index: int) -> str:
        """Return its name there."""
        return self.first.name(index) if index < len(self.first) else self.second.name(index - len(self.first))


class SoftLabels:
    """Targets (N, classes) float32 of labels (N,) int64 on the CPU; `rows` (U, classes) are probabilities."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __call__(self, labels: Tensor) -> Tensor:
        """Return a class's label as one of probability 1; the others' rows, whose sum rounding has moved from 1."""
        count = self.rows.shape[1]
        targets = torch.nn.functional.one_hot(labels.clamp(max=count - 1), count).to(torch.float32)
        soft = labels >= count
        rows = torch.from_numpy(self.rows[labels[soft].numpy() - count].astype(np.float32))
        targets[soft] = rows / rows.sum(dim=1, keepdim=True)
        return targets.pin_memory() if labels.is_pinned() else targets


def hard(labels: Tensor) -> Tensor:
    """Return labels that are classes as they are."""
    return labels


@dataclass(frozen=True)
class Mixture:
    """What the steps read: labelled images, and with each of them `ratio` of those behind them in `source`."""

    source: Source
    labelled: int
    ratio: int = 0

    def order(self, batch_size: int, seed: int, **place: Any) -> Order | MixedOrder:
        """Return the order of the steps' images, with `batch_size` labelled ones in each; `place` is `Order`'s."""
        order = Order(self.labelled, batch_size, seed, **place)
        if not self.ratio:
            return order
        rest = len(self.source) - self.labelled
        return MixedOrder(order, Order(rest, batch_size * self.ratio, seed ^ _SALT, **place))
