"""The picture of top-1 against the size of the test images."""

from collections.abc import Mapping
from pathlib import Path

from effnet_train.analysis.figures import new_figure
from effnet_train.analysis.plots import COLORS


def sweep_picture(top1: Mapping[int, float], *, trained_at: int, best: int, title: str, output: Path) -> None:
    """Draw top-1 (fractions) against pixels into a picture; a line shows the size of training.

    Raises ImportError without matplotlib.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    sizes = sorted(top1)
    axes.plot(sizes, [100 * top1[size] for size in sizes], color=COLORS[0], marker="o", markersize=4)
    axes.axvline(trained_at, color="0.6", linestyle="--", linewidth=1, label=f"trained at {trained_at}")
    share = f"best: {top1[best]:.2%} at {best}"
    axes.plot([best], [100 * top1[best]], color=COLORS[1], marker="o", markersize=8, linestyle="none", label=share)
    axes.set_xlabel("test size (pixels)")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150)
