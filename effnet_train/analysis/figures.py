"""The paper's figures: its points from the tables, and what was trained here, told apart by colour and shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effnet_train.analysis.families import METHODS, Family, Member
from effnet_train.analysis.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

BLUE, ORANGE, GREEN, PINK, *_ = COLORS
GREY = "#777777"
# By method: colour, marker. Okabe and Ito's colours; the markers tell them apart in print without colour.
_STYLES: Mapping[str, tuple[str, str]] = {
    "depth": (GREEN, "s"),
    "width": (BLUE, "D"),
    "resolution": (PINK, "^"),
    "compound": (ORANGE, "o"),
}
_LETTERS = {"depth": "d", "width": "w", "resolution": "r"}


@dataclass(frozen=True)
class Point:
    """Hold a named point of a figure; `spread` is a standard deviation."""

    name: str
    x: float
    y: float
    spread: float | None = None


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, sizes in inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # Not pyplot: it keeps state and may look for a display.
    except ImportError as error:
        raise ImportError("plots need the extra plots (matplotlib): pip install 'effnet-train[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", outputs: Sequence[Path], *, dpi: int = 200) -> None:
    """Write a figure into files of the kinds that their names end in; the same figure gives the same SVG."""
    from matplotlib import rc_context

    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "effnet_train"}):
            figure.savefig(output, dpi=dpi, metadata={"Date": None} if output.suffix == ".svg" else {})


def accuracy_figure(
    ours: Sequence[Point], others: Sequence[Point], trained: Sequence[Point], *, label: str, title: str
) -> "Figure":
    """Draw Figure 1 or 5: ImageNet's top-1 against a cost, of the paper's networks and of one's own runs.

    Accuracies are fractions; `label` is the cost's.
    """
    figure = new_figure(8, 5.6)
    axes = figure.subplots()
    axes.set_xscale("log")
    _points(axes, others, color=GREY, marker="s", label="others, from the paper")
    line = sorted(ours, key=lambda point: point.x)
    _points(axes, line, color=ORANGE, marker="o", label="EfficientNet, from the paper", line="-")
    if trained:
        _points(axes, trained, color=BLUE, marker="*", label="trained here", size=13, hollow=False)
    dress(axes, label, "ImageNet top-1")
    axes.legend(loc="lower right", frameon=False, fontsize=10)
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left")
    axes.margins(x=0.12, y=0.08)
    place_labels(figure, axes, [*ours, *others, *trained], line, color=ORANGE)
    return figure


def transfer_figure(
    rows: Sequence[Mapping[str, Any]], trained: Mapping[str, Sequence[Point]], *, title: str
) -> "Figure":
    """Draw Figure 6 from the rows of Table 5: accuracy against parameters, a panel a data set.

    `trained` holds the runs of one's own by data set. Networks without a size, `parameters_m`, are not drawn.
    """
    from matplotlib.ticker import FixedLocator

    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = new_figure(12, 6.2)
    panels = figure.subplots(2, 4).flat
    for axes, name in zip(panels, names, strict=True):
        here = [row for row in rows if row["name"] == name]
        ours = [_transfer_point(row["model"].upper(), row) for row in here if "parameters_m" in row]
        others = [_transfer_point(r["other"]["name"], r["other"]) for r in here if "parameters_m" in r["other"]]
        axes.set_xscale("log")
        _points(axes, others, color=GREY, marker="s", label="others, from the paper")
        _points(axes, ours, color=ORANGE, marker="o", label="EfficientNet, from the paper", line="-")
        runs = trained.get(name, ())
        if runs:
            _points(axes, runs, color=BLUE, marker="*", label="trained here", size=13, hollow=False)
        dress(axes, "", "")
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlim(2, 1500)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 1.5) - 0.2, max(high, low + 1.5) + 0.2)  # no tenth of a point as large as a panel
        axes.xaxis.set_major_locator(FixedLocator([10, 100, 1000]))
        place_labels(figure, axes, [*ours, *others, *runs], ours, color=ORANGE)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel("Parameters, millions", fontsize=12)
    figure.supylabel("Top-1", fontsize=12)
    found = dict(zip(*reversed([list(part) for part in _handles(figure)]), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=10)
    return figure


def _handles(figure: "Figure") -> tuple[list[Any], list[str]]:
    pairs = [axes.get_legend_handles_labels() for axes in figure.axes]
    return [handle for handles, _ in pairs for handle in handles], [text for _, texts in pairs for text in texts]


def _transfer_point(name: str, row: Mapping[str, Any]) -> Point:
    return Point(name, row["parameters_m"], row["top1"])


def single_dimensions_figure(found: Sequence[Family]) -> "Figure":
    """Draw Figure 3: top-1 against multiply-adds where width, depth and resolution are scaled, a panel each."""
    figure = new_figure(12, 4.2 * len(found))
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    drawn: list[tuple[Axes, list[Point], str]] = []
    for part, family in zip(parts, found, strict=True):
        part.suptitle(family.name, fontsize=12)
        panels = part.subplots(1, 3, sharey=True)
        for axes, method in zip(panels, ("width", "depth", "resolution"), strict=True):
            color, marker = _STYLES[method]
            points = [_of(member, _factor_name(member, method)) for member in family.by(method)]
            _points(axes, points, color=color, marker=marker, line="-", hollow=False)
            dress(axes, "Multiply-adds, millions", f"Top-1 on {family.base.scores.first.data.name}")
            axes.set_title(method, fontsize=11, loc="left")
            axes.margins(x=0.15, y=0.15)
            drawn.append((axes, points, color))
        for axes in panels[1:]:
            axes.set_ylabel("")
        _say_spread(part, [family])
    for axes, points, color in drawn:  # when all axes have their places
        place_labels(figure, axes, points, points, color=color)
    return figure


def width_figure(found: Sequence[Family]) -> "Figure":
    """Draw Figure 4: what width gives under other depths and resolutions, a line for each of these."""
    figure, panels = _panels(found)
    for axes, family in zip(panels, found, strict=True):
        everyone = [family.base, *family.members]
        pairs = sorted({(round(m.factors["depth"], 3), round(m.factors["resolution"], 3)) for m in everyone})
        lines = {pair: [m for m in everyone if m.at(depth=pair[0], resolution=pair[1])] for pair in pairs}
        lines = {pair: line for pair, line in lines.items() if len(line) > 1}
        for ((depth, resolution), line), color, marker in zip(lines.items(), cycle(COLORS), cycle("oDs^vP")):
            points = [_of(member, "") for member in line]
            name = f"d = {depth:.3g}, r = {resolution:.3g}"
            _points(axes, points, color=color, marker=marker, line="-", label=name, hollow=False)
        _finish_family(axes, family)
    _say_spread(figure, found)
    return figure


def methods_figure(found: Sequence[Family]) -> "Figure":
    """Draw Figure 8: the methods of scaling, from the same base."""
    figure, panels = _panels(found)
    for axes, family in zip(panels, found, strict=True):
        for method in METHODS:
            color, marker = _STYLES[method]
            points = [_of(member, "") for member in family.by(method)]
            if len(points) > 1:
                name = "compound scaling" if method == "compound" else f"scale by {method}"
                line = "-" if method != "compound" or family.grows else ""
                shown = points if line else points[1:]
                _points(axes, shown, color=color, marker=marker, line=line, label=name, hollow=False)
        base = _of(family.base, "")
        axes.plot(
            base.x, 100 * base.y, marker="o", color="black", markersize=8, linestyle="", label="baseline", zorder=5
        )
        _finish_family(axes, family)
    _say_spread(figure, found)
    return figure


def _panels(found: Sequence[Family]) -> tuple["Figure", Sequence["Axes"]]:
    figure = new_figure(7.5, 5 * len(found))
    return figure, list(figure.subplots(len(found), 1, squeeze=False).flat)


def _finish_family(axes: "Axes", family: Family) -> None:
    dress(axes, "Multiply-adds, millions", f"Top-1 on {family.base.scores.first.data.name}")
    axes.set_title(family.name, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=10, loc="best")
    axes.margins(x=0.08, y=0.12)


def _say_spread(figure: "FigureBase", found: Sequence[Family]) -> None:
    counts = sorted({len(m.scores.runs) for family in found for m in (family.base, *family.members)})
    if counts[-1] > 1:
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        figure.supxlabel(f"Mean and standard deviation over {seeds} seeds", fontsize=9, color="#444444")


def _factor_name(member: Member, key: str) -> str:
    return f"{_LETTERS[key]} = {member.factors[key]:.3g}"


def _of(member: Member, name: str) -> Point:
    return Point(name, member.multiply_adds / 1e6, member.scores.top1, member.scores.spread)


def maps_figure(columns: Sequence[str], images: Sequence[Sequence[tuple[np.ndarray, str]]]) -> "Figure":
    """Draw Figure 7: a row an image, a column a network; each picture (H, W, 3) uint8 has its caption below."""
    figure = new_figure(2.3 * len(columns), 2.65 * len(images) + 0.3)
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, pictures in zip(grid, images, strict=True):
        for axes, (pixels, caption) in zip(row, pictures, strict=True):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(caption, fontsize=8)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=11)
    return figure


def _points(
    axes: "Axes",
    points: Sequence[Point],
    *,
    color: str,
    marker: str,
    label: str | None = None,
    line: str = "",
    size: float = 6,
    hollow: bool = True,
) -> None:
    """Draw points, hollow where they are the paper's; bars are standard deviations."""
    x, y = [point.x for point in points], [100 * point.y for point in points]
    if any(point.spread is not None for point in points):
        bars = [100 * (point.spread or 0) for point in points]
        axes.errorbar(x, y, yerr=bars, linestyle="", color=color, capsize=3, linewidth=1.2)
    face = "white" if hollow else color
    axes.plot(
        x,
        y,
        linestyle=line,
        marker=marker,
        color=color,
        markerfacecolor=face,
        markersize=size,
        markeredgewidth=1.6,
        linewidth=1.6,
        label=label,
        zorder=3,
    )


def dress(axes: "Axes", x_label: str, y_label: str) -> None:
    """Label the axes, of which the vertical one is in per cent, and keep their lines in the background."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=10)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def place_labels(
    figure: "Figure", axes: "Axes", points: Sequence[Point], line: Sequence[Point] = (), *, color: str = "#333333"
) -> None:
    """Write each point's name beside it, where it covers the least of other names, of points and of `line`.

    The names of the line's own points have its `color`.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the axes, so that texts have their places
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in (_pixels(axes, point) for point in points)]
    for point in points:  # their bars
        ends = [axes.transData.transform((point.x, 100 * (point.y + sign * (point.spread or 0)))) for sign in (-1, 1)]
        taken.append(Bbox([(ends[0][0] - 4, ends[0][1]), (ends[1][0] + 4, ends[1][1])]))
    for one, other in pairwise(line):
        way = np.linspace(_pixels(axes, one), _pixels(axes, other), 40)
        taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in way]
    for point in points:
        if point.name:
            taken.append(_place_label(axes, point, taken, color if point in line else "#333333"))


def _place_label(axes: "Axes", point: Point, taken: Sequence[Any], color: str) -> Any:
    """Write a point's name at the best of several places, and return the box that others are to leave free."""
    frame = axes.get_window_extent()
    tried: list[tuple[float, int, Any, Any]] = []
    for across, up in _PLACES:
        text = axes.annotate(
            point.name,
            (point.x, 100 * point.y),
            xytext=(across, up),
            textcoords="offset points",
            fontsize=8.5,
            color=color,
            ha=_align(across, "left", "right"),
            va=_align(up, "bottom", "top"),
        )
        text.set_in_layout(False)  # else it would move the axes, and with them all that has its place
        box = text.get_window_extent()
        outside = box.width * box.height - _overlap(box, frame)
        tried.append((sum(_overlap(box, other) for other in taken) + outside, len(tried), text, box))
    _, best, _, box = min(tried, key=lambda entry: entry[:2])
    for _, number, text, _ in tried:
        if number != best:
            text.remove()
    return box.padded(_ROOM)


def _pixels(axes: "Axes", point: Point) -> Any:
    return axes.transData.transform((point.x, 100 * point.y))


_ROOM = 5  # pixels between names, so that two are not read as one
_PLACES = (
    *((7, 0), (-7, 0), (0, 7), (0, -7), (6, 6), (-6, 6), (6, -6), (-6, -6)),
    *((9, 12), (-9, 12), (9, -12), (-9, -12), (9, 20), (9, -20), (-9, 20), (-9, -20)),
)


def _align(offset: float, positive: str, negative: str) -> str:
    return positive if offset > 0 else negative if offset < 0 else "center"


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


FAMILY_FIGURES: Mapping[str, Callable[[Sequence[Family]], "Figure"]] = {
    "figure3": single_dimensions_figure,
    "figure4": width_figure,
    "figure8": methods_figure,
}
