"""`effnet-plot`: what the pictures hold."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from effnet_train.analysis.families import families
from effnet_train.analysis.figures import FAMILY_FIGURES, Point, accuracy_figure, place_labels
from effnet_train.analysis.runs import find_runs
from effnet_train.cli import paper
from effnet_train.cli.app import CONFIG_DIR

Cli = Callable[..., Any]
Finished = Callable[..., Path]
CIFAR = ("data=cifar10", "model=b0", "model.width=0.25", "model.resolution=32")
SCALED = {
    "base": {},
    "deep": {"depth": 2},
    "wide": {"width": 0.5},
    "wider": {"width": 0.75},
    "fine": {"resolution": 64},
    "all": {"depth": 1.4, "width": 0.3, "resolution": 42},
    "deep-wide": {"depth": 2, "width": 0.5},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keep the figures that are saved, to look at what they hold."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def points(axes: Any, label: str) -> np.ndarray:
    [line] = [line for line in axes.lines if line.get_label() == label]
    return line.get_xydata()


@pytest.mark.parametrize(("figure", "key"), [("figure1", "parameters_m"), ("figure5", "multiply_adds_b")])
def test_accuracy_figures_hold_table_2(
    cli: Cli, finished: Finished, drawn: list[Figure], figure: str, key: str
) -> None:
    finished("mine", "model=b0", top1=0.7654)
    finished("of-other-data", *CIFAR, top1=0.99, classes=10, images=50000)
    finished("tuned", "model=b0", "init_from=runs/mine", top1=0.79)
    finished("attacked", "model=b0", "recipe=advprop", top1=0.78)
    done = cli("plot", figure)
    assert (done.status, done.out) == (0, f"figures/{figure}.png\nfigures/{figure}.svg\n"), done.err
    with Image.open(f"figures/{figure}.png") as image:
        assert image.size == (1600, 1120)
    assert Path(f"figures/{figure}.svg").read_text().startswith("<?xml")
    rows = yaml.safe_load((CONFIG_DIR / "tables/table2.yaml").read_text())["rows"]
    printed = [(row["name"], row[key], 100 * row["top1"]) for row in rows if key in row]
    [axes] = drawn[0].axes
    ours = [point for name, *point in printed if name.startswith("EfficientNet")]
    np.testing.assert_allclose(points(axes, "EfficientNet, from the paper"), ours)
    others = [point for name, *point in printed if not name.startswith("EfficientNet")]
    np.testing.assert_allclose(points(axes, "others, from the paper"), others)
    size = {"figure1": 5.288548, "figure5": 0.385871}[figure]
    np.testing.assert_allclose(points(axes, "trained here"), [[size, 76.54]], rtol=2e-3)
    names = [text.get_text() for text in axes.texts]
    assert sorted(names) == sorted([*(name.removeprefix("EfficientNet-") for name, *_ in printed), "mine"])


def test_figure_6_has_a_panel_for_each_data_set(cli: Cli, finished: Finished, drawn: list[Figure]) -> None:
    made = {"classes": 10, "images": 50000}
    finished("tuned", "model=b0", "data=cifar10", "recipe=finetune", "init_from=x", top1=0.977, **made)
    finished("scratch", "model=b0", "data=cifar10", top1=0.95, **made)
    assert cli("plot", "figure6", "output=f.svg").out == "f.svg\n"
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == [row["name"] for row in paper.table(6)["rows"]]
    assert drawn[0].get_suptitle() == "Figure 6: size and accuracy after transfer"
    for axes in drawn[0].axes:
        boxes = [text.get_window_extent().padded(1.5) for text in axes.texts]
        assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)], axes.get_title("left")
    cifar, cars = drawn[0].axes[0], drawn[0].axes[3]
    np.testing.assert_allclose(points(cifar, "EfficientNet, from the paper"), [[4, 98.1], [64, 98.9]])
    np.testing.assert_allclose(points(cifar, "others, from the paper"), [[85, 98], [556, 99]])
    np.testing.assert_allclose(points(cifar, "trained here"), [[4.02, 97.7]], rtol=1e-3)
    assert not [line for line in cars.lines if line.get_label() == "trained here"]
    # Of B7 on Cars the paper prints no size, which is counted; of DAT neither is known.
    np.testing.assert_allclose(points(cars, "EfficientNet, from the paper"), [[10, 93.6], [64.29, 94.7]], rtol=1e-3)
    np.testing.assert_allclose(points(cars, "others, from the paper"), [[41, 93.4]])


@pytest.fixture
def study(finished: Finished) -> dict[str, list[float]]:
    """Write three seeds of each network of a family, and return their accuracies."""
    scores = {name: [0.5 + 0.04 * i + 0.01 * seed**2 for seed in range(3)] for i, name in enumerate(SCALED)}
    for name, factors in SCALED.items():
        for seed, top1 in enumerate(scores[name]):
            words = [f"model.{key}={value}" for key, value in factors.items()]
            finished(f"{name}-{seed}", *CIFAR, *words, f"seed={seed}", top1=top1, classes=10, images=50000)
    return scores


def test_figures_of_families(cli: Cli, finished: Finished, study: dict[str, list[float]], drawn: list[Figure]) -> None:
    done = cli("plot", "figure8")
    assert done.status == 0, done.err
    [axes] = drawn[0].axes
    assert axes.get_title(loc="left") == "EfficientNet (width 0.25) at 32 pixels, CIFAR-10"
    means = {name: 100 * float(np.mean(values)) for name, values in study.items()}
    lines = {"depth": ["base", "deep"], "width": ["base", "wide", "wider"], "resolution": ["base", "fine"]}
    for method, members in lines.items():
        np.testing.assert_allclose(points(axes, f"scale by {method}")[:, 1], [means[name] for name in members])
    np.testing.assert_allclose(points(axes, "compound scaling")[:, 1], [means["base"], means["all"]])
    cost = paper.count_model(paper.composed_model("b0", CIFAR[2:]), 32, 10, source="").multiply_adds
    np.testing.assert_allclose(points(axes, "baseline"), [[cost / 1e6, means["base"]]])
    [bar] = [part for part in axes.containers if part.lines[0].get_ydata()[-1] == pytest.approx(means["all"])]
    half = np.diff(bar.lines[2][0].get_segments()[-1][:, 1])[0] / 2
    assert half == pytest.approx(100 * np.std(study["all"], ddof=1))
    assert drawn[0].get_supxlabel() == "Mean and standard deviation over 3 seeds"

    finished("smaller", *CIFAR, "model.width=0.125", "model.resolution=64", top1=0.5, classes=10, images=50000)
    done = cli("plot", "figure8", "base=runs/deep-1", "output=deep.svg")
    assert drawn[-1].axes[0].get_title(loc="left") == "EfficientNet (width 0.25 x depth 2) at 32 pixels, CIFAR-10"
    assert "note: runs/smaller is not drawn: its network is scaled from no base of such runs" in done.err
    shutil.rmtree("runs/smaller")
    found, _ = families(find_runs(Path("runs"), [("CIFAR-10", 10, 50000)])[0], lambda run: run.shape["width"] * 1e8)
    panels = FAMILY_FIGURES["figure3"](found).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["width", "depth", "resolution"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [
        ["w = 1", "w = 2", "w = 3"],
        ["d = 1", "d = 2"],
        ["r = 1", "r = 2"],
    ]
    [axes] = FAMILY_FIGURES["figure4"](found).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["d = 1, r = 1", "d = 2, r = 1"]
    np.testing.assert_allclose(points(axes, "d = 2, r = 1")[:, 1], [means["deep"], means["deep-wide"]])


def test_candidates_of_a_search_are_no_line(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factors = {"base": (1, 0.25, 32), "one": (1.2, 0.3, 36), "two": (1.3, 0.3, 36), "three": (1.2, 0.33, 35)}
    for i, (name, (depth, width, resolution)) in enumerate(factors.items()):
        words = (f"model.depth={depth}", f"model.width={width}", f"model.resolution={resolution}")
        finished(name, *CIFAR, *words, top1=0.5 + 0.1 * i, classes=10, images=50000)

    def cost(run: Any) -> int:
        return {name: 100 + 90 * (i > 0) + i for i, name in enumerate(factors)}[run.folder.name]

    found, _ = families(find_runs(Path("runs"))[0], cost)
    [axes] = FAMILY_FIGURES["figure8"](found).axes
    [line] = [line for line in axes.lines if line.get_label() == "compound scaling"]
    assert line.get_linestyle() == "None"
    np.testing.assert_allclose(line.get_ydata(), [60, 70, 80])


@pytest.mark.parametrize("figure", FAMILY_FIGURES)
def test_without_a_family_it_is_told_how_to_make_one(cli: Cli, finished: Finished, figure: str) -> None:
    finished("alone", *CIFAR, top1=0.5, classes=10, images=50000)
    done = cli("plot", figure)
    assert done.status == 2
    assert "run_root=runs holds 1 finished runs, and among them no network beside the same network scaled" in done.err
    assert "effnet-train -m model=b0 data=... model.depth=1,2,4 seed=0,1,2" in done.err
    assert not Path("figures").exists()


def test_figure_7(cli: Cli, tiny: list[str], few_digits: Path, drawn: list[Figure]) -> None:
    images = sorted((few_digits / "val").glob("*/*.png"))[::20]
    given = f"images=[{','.join(map(str, images))}]"
    assert cli("train", *tiny, "model.resolution=64").status == 0
    assert cli("train", *tiny[:-1], "name=deep", "model.resolution=96", "model.depth=0.5").status == 0
    done = cli(
        "plot", "figure7", given, "checkpoints=[run,deep]", "cam_class=3", "labels=[base,deeper]", "output=m.png"
    )
    assert (done.status, done.out) == (0, "m.png\n"), done.err
    axes = drawn[0].axes
    assert [part.get_title() for part in axes] == ["image", "base", "deeper", "", "", ""]
    assert [part.images[0].get_array().shape for part in axes[:3]] == [(96, 96, 3), (64, 64, 3), (96, 96, 3)]
    assert axes[0].get_xlabel() == images[0].name
    assert all(part.get_xlabel().startswith("3, ") for part in (*axes[1:3], *axes[4:]))
    for words, message in (
        (("checkpoints=[run]", "labels=[a,b]"), "2 for 1 checkpoints; give each one of its own"),
        ((), "run_root=runs holds no finished run of a network of Table 7 (model=b0; model=b0 model.depth=4; "),
        (("checkpoints=[nowhere]",), "checkpoint=nowhere does not exist"),
    ):
        done = cli("plot", "figure7", given, *words)
        assert done.status == 2
        assert message in done.err
    assert "images: no.png does not exist" in cli("plot", "figure7", "images=[no.png]", "checkpoints=[run]").err


def test_a_network_of_one_last_pixel_has_no_map(cli: Cli, trained: Path, few_digits: Path) -> None:
    image = next((few_digits / "val").glob("*/*.png"))
    done = cli("plot", "figure7", f"images=[{image}]", f"checkpoints=[{trained}]")
    assert done.status == 2
    assert "at 32 pixels the last features are a single one, which tells no place from another" in done.err


def test_curves(cli: Cli, trained: Path, drawn: list[Figure]) -> None:
    assert cli("plot", "curves", f"runs=[{trained}]").out == "figures/curves.png\nfigures/curves.svg\n"
    assert drawn[0].get_suptitle() == "run"
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scores = [row["val_ema/top1"] for row in logged if "val_ema/top1" in row]
    np.testing.assert_allclose(drawn[0].axes[1].lines[1].get_ydata(), scores)
    both = f"runs=[{trained},{trained}/metrics.jsonl]"
    assert cli("plot", "curves", both, "labels=[B0,B1]", "title=Both", "output=c.png").out == "c.png\n"
    assert drawn[-1].get_suptitle() == "Both"
    assert [text.get_text() for text in drawn[-1].axes[0].get_legend().get_texts()][:2] == ["B0", "B1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("figure2",), "figure2 is no figure: give one of figure1, figure3,"),
        (("figure1", "output=x.jpg"), "output=x.jpg must end in .png, .svg or .pdf"),
        (("figure1", "run_root=nowhere"), "run_root=nowhere does not exist"),
        (("figure1", "images=[a]"), "images is not a key of effnet-plot figure1, but of figure7"),
        (
            ("figure1", "dataset=CIFAR-10"),
            "dataset is not a key of effnet-plot figure1, but of figure3, figure4, figure8",
        ),
        (("figure8", "base=runs/a"), "base=runs/a is no finished run below run_root=runs: give such a run's folder"),
        (("figure7",), "images has no value: give images=..."),
        (("curves",), "runs has no value: give runs=..."),
        (("curves", "runs=[]"), "runs=[] is empty"),
        (("curves", "runs=[nowhere]"), "plot: error: nowhere: no metrics here; name the folder of a run"),
        (("curves", "runs=[.]"), "plot: error: metrics.jsonl: no metrics here; name the folder of a run"),
        (("curves", "runs=[a,b]", "labels=[B0]"), "labels: 1 for 2 runs; give each run one of its own, or none at all"),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, words: tuple[str, ...], message: str) -> None:
    done = cli("plot", *words)
    assert done.status == 2
    assert message in done.err


def test_names_cover_neither_each_other_nor_points() -> None:
    crowd = [Point(f"network {i}", 10 + i, 0.7 + 0.0003 * i, None) for i in range(5)]
    figure = accuracy_figure(crowd[:2], crowd[2:], [], label="Cost", title="Crowd")
    [axes] = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(crowd)
    overlapping = [(i, j) for i in range(5) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not overlapping
    at = axes.transData.transform([(point.x, 100 * point.y) for point in crowd])
    assert not any(box.contains(*place) for box in boxes for place in at)
    place_labels(figure, axes, [])


def test_the_same_figure_gives_the_same_svg(cli: Cli) -> None:
    cli("plot", "figure5", "output=a.svg")
    cli("plot", "figure5", "output=b.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()
