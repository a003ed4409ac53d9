"""What an evaluation found class by class and by confidence: tables for programs, pictures for people."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"
CSV_CLASSES = 200  # up to so many the matrix is a .csv, which a million cells would make 2 MB of
SQUARE_CLASSES = 25  # up to so many the picture is the matrix; of more, whose numbers no one could read, the worst
WORST = 20
_SYNSET = re.compile(r"n\d{8}")


def write_details(folder: Path, confusion: np.ndarray, calibration: np.ndarray, classes: Sequence[str]) -> None:
    """Write per_class.csv, confusion.csv or .npz, confusion.png and calibration.png into `folder`.

    `confusion` (K, K + 1) and `calibration` (3, bins) are those of `engine.scores.Metrics`; `classes` the K names.
    Raises ImportError without matplotlib.
    """
    folder.mkdir(exist_ok=True)
    names = readable_names(classes)
    _write_csv(folder / "per_class.csv", ("class", "name", "images", "top1"), _class_rows(confusion, classes, names))
    for former in ("confusion.csv", "confusion.npz"):  # of an evaluation with another number of classes
        (folder / former).unlink(missing_ok=True)
    if len(classes) <= CSV_CLASSES:
        columns = [*classes, *_spare_columns(confusion)]
        rows = ([name, *row] for name, row in zip(classes, confusion[:, : len(columns)].tolist(), strict=True))
        _write_csv(folder / "confusion.csv", ("true class / predicted", *columns), rows)
    else:
        np.savez_compressed(folder / "confusion.npz", confusion=confusion, classes=np.array(classes))
    confusion_picture(confusion, names).savefig(folder / "confusion.png", dpi=150)
    calibration_picture(calibration).savefig(folder / "calibration.png", dpi=150)


def readable_names(classes: Sequence[str]) -> list[str]:
    """Return what people call the classes: of ImageNet's synsets the first word, of others their own name.

    Where two synsets have the same word (there are cranes that fly and cranes that lift), the synset is added.
    """
    if not all(_SYNSET.fullmatch(name) for name in classes):
        return list(classes)
    from timm.data import ImageNetInfo

    known = {  # of the 22k one of the 1k is missing
        name: info.label_name_to_description(name)
        for info in (ImageNetInfo("imagenet-22k"), ImageNetInfo("imagenet-1k"))
        for name in info.label_names()
    }
    words = [known.get(name, name).partition(",")[0] for name in classes]
    count = Counter(words)
    return [word if count[word] == 1 else f"{word} ({name})" for word, name in zip(words, classes, strict=True)]


def class_top1(confusion: np.ndarray) -> np.ndarray:
    """Return each class's share of hits (K,); NaN where it has no image."""
    images = confusion.sum(axis=1)
    share: np.ndarray = np.divide(
        confusion.diagonal(), images, out=np.full(len(images), np.nan), where=images > 0, dtype=float
    )
    return share


def confused_pairs(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return the `count` pairs (true class, predicted class, images) that are confused most, without empty ones."""
    wrong = confusion[:, : len(confusion)].copy()
    np.fill_diagonal(wrong, 0)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = ((int(place) // len(wrong), int(place) % len(wrong)) for place in worst)
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def _spare_columns(confusion: np.ndarray) -> list[str]:
    return ["(not finite)"] if confusion[:, -1].any() else []


def _class_rows(confusion: np.ndarray, classes: Sequence[str], names: Sequence[str]) -> Iterable[list[Any]]:
    images, top1 = confusion.sum(axis=1).tolist(), class_top1(confusion).tolist()
    for name, readable, count, share in zip(classes, names, images, top1, strict=True):
        yield [name, readable, count, f"{share:.6f}" if count else ""]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, its size in inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # Not pyplot: it keeps state and may look for a display.
    except ImportError as error:
        raise ImportError("details= draws with matplotlib: pip install effnet-train[plots]") from error
    return Figure(figsize=(width, height), layout="constrained")


def confusion_picture(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    """Draw the matrix with its numbers, or of many classes the worst ones and the pairs that are confused most."""
    return _square(confusion, names) if len(names) <= SQUARE_CLASSES else _worst(confusion, names)


def _square(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    columns = [*map(_short, names), *_spare_columns(confusion)]
    side = max(5.0, 0.55 * len(names) + 2.5)
    figure = new_figure(side, side)
    axes = figure.subplots()
    counts = confusion[:, : len(columns)]
    shares = counts / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:  # an empty cell says 0 more quietly
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    upright = max(map(len, columns)) <= 3
    axes.set_xticks(range(len(columns)), columns, rotation=0 if upright else 90, parse_math=False)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    axes.set_xlabel("Predicted class", fontsize=12)
    axes.set_ylabel("True class", fontsize=12)
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    top1 = confusion.diagonal().sum() / max(1, confusion.sum())
    axes.set_title(f"{confusion.sum():,} images, top-1 {_percent(top1)}\ncolour: share of the true class", fontsize=12)
    return figure


def _worst(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    figure = new_figure(13, 7.5)
    left, right = figure.subplots(1, 2)
    images, top1 = confusion.sum(axis=1), class_top1(confusion)
    worst = [int(i) for i in np.argsort(top1, kind="stable")[:WORST] if images[i]]  # NaN comes last
    labels = [f"{_short(names[i])} ({confusion[i, i]:,} of {images[i]:,})" for i in worst]
    _bars(left, labels, [100 * top1[i] for i in worst], BLUE, "{:.0f}")
    left.set_xlim(0, 100)
    left.set_xlabel("Top-1, %", fontsize=11)
    seen = int((images > 0).sum())
    mean = _percent(np.nansum(top1) / max(1, seen))
    left.set_title(f"The {len(worst)} worst of {seen:,} classes (mean of all: {mean})", fontsize=12)
    pairs = confused_pairs(confusion, WORST)
    labels = [f"{_short(names[true])} → {_short(names[predicted])}" for true, predicted, _ in pairs]
    _bars(right, labels, [count for _, _, count in pairs], ORANGE, "{:,}")
    if pairs:
        right.set_xlabel("Images", fontsize=11)
        right.set_title(f"The {len(pairs)} pairs confused most: true → predicted", fontsize=12)
    else:
        right.set_axis_off()
        right.set_title("No class is taken for another", fontsize=12)
    return figure


def _bars(axes: "Axes", labels: Sequence[str], values: Sequence[float], color: str, form: str) -> None:
    from matplotlib.ticker import MaxNLocator

    bars = axes.barh(range(len(values)), values, color=color, height=0.7)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(values)), labels, fontsize=9, parse_math=False)  # a folder's name may hold $
    axes.set_ylim(max(len(values), 1) - 0.4, -0.6)  # the worst on top
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def calibration_picture(bins: np.ndarray) -> "Figure":
    """Draw the reliability diagram of images, hits and summed confidence (3, bins): top-1 against confidence."""
    from matplotlib.ticker import PercentFormatter

    images, hits, confidence = bins
    figure = new_figure(6, 7)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    edges = np.linspace(0, 1, len(images) + 1)
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    full = images > 0
    share = np.divide(hits, images, out=np.zeros(len(images)), where=full)
    mean = np.divide(confidence, images, out=np.zeros(len(images)), where=full)
    top.bar(middles[full], share[full], width * 0.92, color=BLUE, label="top-1 of a bin")
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    points: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False, "zorder": 3}
    top.plot(mean[full], share[full], color=ORANGE, label="top-1 at a bin's mean confidence", **points)
    top.set_ylim(0, 1.02)
    top.set_ylabel("Top-1", fontsize=12)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "borderaxespad": 0.2}  # no bar there
    top.legend(ncols=2, frameon=False, fontsize=9, **place)
    error, sure, right = (x.sum() / max(1, images.sum()) for x in (np.abs(hits - confidence), confidence, hits))
    figure.suptitle(f"ECE {error:.4f}: mean confidence {_percent(sure)}, top-1 {_percent(right)}", fontsize=12)
    bottom.bar(middles, images / max(1, images.sum()), width * 0.92, color=GREY)
    bottom.set_ylabel("Images", fontsize=12)
    bottom.set_xlabel("Confidence: the probability of the predicted class", fontsize=12)
    bottom.set_xlim(0, 1)
    for axes in (top, bottom):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        axes.grid(color="#e4e4e4", linewidth=0.8, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    return figure
