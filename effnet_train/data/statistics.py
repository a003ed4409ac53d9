"""Measure a data set: sizes, shapes, colours, and how many images each class has."""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from effnet_train.data.decode import DecodeError, decode
from effnet_train.data.parallel import map_ordered
from effnet_train.data.preprocess import Preprocess, eval_image
from effnet_train.data.sources import Source

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # per cent
_CHUNK = 32  # images in a piece of work


class _Part(NamedTuple):
    """Of some images: label, bytes, width, height (N, 4); sums of pixels and of their squares (3,); failures."""

    table: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    errors: list[str]


class _Measure:
    """Measures some images, in a worker."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self.source, self.preprocess = source, preprocess

    def __call__(self, indices: np.ndarray) -> _Part:
        rows: list[tuple[int, int, int, int]] = []
        errors: list[str] = []
        # Whole numbers: exact, whatever is added first, up to 10 ** 14 pixels.
        sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
        for index in indices.tolist():
            try:
                data, label = self.source.read(index)
                image = decode(data)
            except (DecodeError, OSError) as error:
                errors.append(f"{self.source.name(index)}: {error}")
                continue
            rows.append((label, 0 if isinstance(data, Image.Image) else len(data), *image.size))
            pixels = eval_image(image, self.preprocess).astype(np.int64)
            sums += pixels.sum(axis=(0, 1))
            squares += (pixels * pixels).sum(axis=(0, 1))
        return _Part(np.array(rows, np.int64).reshape(-1, 4), sums, squares, errors)


def measure(
    source: Source, preprocess: Preprocess, *, count: int | None = None, workers: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Return a source's statistics, plain values for JSON, and label, bytes, width and height of each image (N, 4).

    `count` images, spread evenly, stand for all; None: all. Mean and deviation are of the pixels, in [0, 1], of the
    evaluation crop that `preprocess` makes. Raises ValueError where no image can be read.
    """
    from tqdm import tqdm

    chosen = np.arange(len(source))
    if count is not None and count < len(source):
        chosen = chosen * len(source) // count
        chosen = chosen[:count]
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    parts: list[_Part] = []
    with tqdm(total=len(chosen), unit="img", disable=None, file=sys.stderr) as bar:
        for part in map_ordered(_Measure(source, preprocess), chunks, workers=workers):
            parts.append(part)
            bar.update(len(part.table) + len(part.errors))
    table = np.concatenate([part.table for part in parts])
    errors = [text for part in parts for text in part.errors]
    if not len(table):
        raise ValueError(f"none of {len(chosen):,} images can be read, the first: {errors[0]}")
    pixels = len(table) * preprocess.resolution**2
    colours = [
        (sum(int(part.sums[channel]) for part in parts), sum(int(part.squares[channel]) for part in parts))
        for channel in range(3)
    ]
    per_class = np.bincount(table[:, 0], minlength=len(source.classes)).tolist()
    statistics = {
        "images": len(table),
        "of": len(source),
        "unreadable": errors,
        "resolution": preprocess.resolution,
        "mean": [total / pixels / 255 for total, _ in colours],
        "std": [math.sqrt(pixels * squares - total * total) / pixels / 255 for total, squares in colours],
        "quantiles": {name: _quantiles(values) for name, values in columns(table).items()},
        "per_class": dict(zip(source.classes, per_class, strict=True)),
    }
    return statistics, table


def columns(table: np.ndarray) -> dict[str, np.ndarray]:
    """Return what is measured of each image, from `measure`'s table."""
    _, size, width, height = table.T
    return {
        "width": width,
        "height": height,
        "shorter": np.minimum(width, height),
        "aspect": width / height,
        "bytes": size,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, [percent / 100 for percent in QUANTILES])
    return dict(zip(map(str, QUANTILES), found.tolist(), strict=True))


def statistics_lines(statistics: Mapping[str, Any]) -> list[str]:
    """Word statistics for people."""
    counts = list(statistics["per_class"].values())
    lines = [
        f"images   {statistics['images']:,} of {statistics['of']:,}",
        f"classes  {len(counts):,}, of {min(counts):,} to {max(counts):,} images, {sum(counts) / len(counts):,.1f} on "
        "average",
        f"mean     {_triple(statistics['mean'])}   of the evaluation crop's pixels at {statistics['resolution']}",
        f"std      {_triple(statistics['std'])}",
        "",
        " ".join([" " * 8, *(f"{percent:>9}%" for percent in QUANTILES)]),
    ]
    for name, values in statistics["quantiles"].items():
        form = ",.3f" if name == "aspect" else ",.0f"
        lines.append(" ".join([f"{name:8}", *(f"{value:>10{form}}" for value in values.values())]))
    lines += [f"unreadable: {text}" for text in statistics["unreadable"]]
    return lines


def _triple(values: list[float]) -> str:
    return "  ".join(f"{value:.4f}" for value in values)
