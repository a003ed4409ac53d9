"""Draw the curve of a run: loss, validation top-1 and learning rate against epochs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SMOOTH_FROM = 200  # points from which the training loss is drawn as a moving average over its own pale line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a run's `metrics.jsonl`, or that of a run's folder; a last line still being written is left out.

    Raises:
        FileNotFoundError: where there is none.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no metrics here; name the folder of a run that had loggers.jsonl, or its file"
        )
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def run_name(path: Path) -> str:
    """Return what a run is called, whose folder or `metrics.jsonl` it is: the name of the folder."""
    return (path if path.is_dir() else path.absolute().parent).resolve().name


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs and the values of a key, without rows that lack it or hold null."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def training_curve(
    runs: Path | Rows | Mapping[str, Path | Rows], output: Path, *, title: str | None = None, dpi: int = 150
) -> None:
    """Draw one run, or several over each other, into a picture of the kind that `output` ends in (.png, .svg, .pdf).

    Args:
        runs: a run's folder, its `metrics.jsonl` or its rows; for several, a mapping from what the legend calls them.
        title: None for the name of the run's folder; with several runs, for none.

    Raises:
        ImportError: without matplotlib.
        ValueError: where a run has neither losses nor scores yet.
    """
    try:
        from matplotlib.figure import Figure  # Not pyplot: it keeps state and may look for a display.
    except ImportError as error:
        raise ImportError("plots need the extra plots (matplotlib): pip install 'effnet-train[plots]'") from error
    if title is None and isinstance(runs, Path):
        title = run_name(runs)
    named = runs if isinstance(runs, Mapping) else {"": runs}
    loaded = {name: read_metrics(run) if isinstance(run, Path) else run for name, run in named.items()}
    for name, rows in loaded.items():
        if not any(len(series(rows, key)[0]) for key in ("train/loss", "val/loss", "val/top1", "val_ema/top1")):
            raise ValueError(f"{name or output}: nothing to draw: no row has a loss or a top-1 yet")

    if len(loaded) == 1:  # Its name is a title, not a legend.
        [(name, rows)] = loaded.items()
        title, loaded = title or name, {"": rows}
    figure = Figure(figsize=(8, 8), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 1.2))
    loss, top1, rate = panels
    for i, (name, rows) in enumerate(loaded.items()):
        color = COLORS[i % len(COLORS)]
        _draw_loss(loss, rows, name, color=color, second=COLORS[1] if len(loaded) == 1 else color)
        _draw_top1(top1, rows, name, color=color)
        rate.plot(*series(rows, "train/lr"), color="#888888" if len(loaded) == 1 else color, linewidth=1.2)
    if len(loaded) > 1:  # Colours tell runs apart, and these say what the lines' styles do.
        loss.plot([], color="#555555", linestyle="--", label="validation")
        top1.plot([], color="#555555", linestyle="-", label="EMA weights")
        top1.plot([], color="#555555", linestyle=":", label="raw weights")
    _dress(panels)
    figure.align_ylabels()
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=dpi)


def _draw_loss(axes: "Axes", rows: Rows, name: str, *, color: str, second: str) -> None:
    epochs, values = series(rows, "train/loss")
    if len(values) >= SMOOTH_FROM:
        axes.plot(epochs, values, color=color, alpha=0.2, linewidth=0.8)
        values = _smooth(values, len(values) // 50)
    axes.plot(epochs, values, color=color, label=name or "training")
    for key, label in (("val_ema/loss", "validation, EMA weights"), ("val/loss", "validation")):
        epochs, values = series(rows, key)
        if len(values):
            line = axes.plot(epochs, values, color=second, linestyle="--", marker=_marker(values))[0]
            line.set_label("_" if name else label)  # An underscore keeps a line out of the legend.
            return


def _draw_top1(axes: "Axes", rows: Rows, name: str, *, color: str) -> None:
    best: tuple[float, float] | None = None
    for key, label, style, width in (
        ("val/top1", "raw weights", ":", 1.4),
        ("val_ema/top1", "EMA weights", "-", 2.0),
    ):
        epochs, values = series(rows, key)
        if len(values):
            line = axes.plot(epochs, values, color=color, linestyle=style, linewidth=width, marker=_marker(values))[0]
            line.set_label("_" if name else label)
            best = float(epochs[values.argmax()]), float(values.max())  # of the EMA weights where there are any
    if best is not None:
        label = (f"{name}: " if name else "") + f"best {100 * best[1]:.1f} %"
        ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 2}
        axes.plot(*best, color=color, linestyle="", label=label, zorder=3, **ring)


def _dress(panels: Sequence["Axes"]) -> None:
    """Label the axes in plain words, and put the legends where no line can be."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    loss, top1, rate = panels
    for axes, text in ((loss, "Loss"), (top1, "Validation top-1"), (rate, "Learning\nrate")):
        axes.set_ylabel(text, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            labels = [label if len(label) <= 70 else "…" + label[-69:] for label in labels]
            # As many columns as fit: a legend wider than the figure would squeeze the panels to nothing.
            columns = max(1, int(90 / (max(map(len, labels)) + 8)))
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
            axes.legend(handles, labels, ncols=min(columns, 3), frameon=False, fontsize=10, **place)
    top1.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_locator(MaxNLocator(3))
    rate.margins(x=0.02)
    rate.set_xlim(left=0)
    rate.set_xlabel("Epoch", fontsize=12)


def _marker(values: np.ndarray) -> str:
    """Show the points of a line that has few; a line of one point would not be seen at all."""
    return "." if len(values) <= 30 else ""


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with its neighbours, fewer of them towards the ends."""
    ones = np.ones(2 * (window // 2) + 1)
    smooth: np.ndarray = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return smooth
