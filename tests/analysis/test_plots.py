import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet_train.analysis.plots import read_metrics, series, training_curve


def rows(epochs=4, top1=0.8, each=10):
    made = []
    for step in range(1, epochs * each + 1):
        epoch = step / each
        made.append({"step": step, "epoch": epoch, "train/loss": 7 - epoch, "train/lr": 0.1 * epoch})
        if step % each == 0:
            scores = {"val/top1": top1 * epoch / epochs - 0.05, "val_ema/top1": top1 * epoch / epochs, "val/loss": 2.0}
            made.append({"step": step, "epoch": epoch, **scores})
    return made


def write(folder, made):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are saved, to look at what they hold."""
    figures = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_what_was_logged_once_is_seen(tmp_path, drawn):
    """A run of two steps has one loss and one learning rate: a line of one point is none."""
    training_curve([row for row in rows(epochs=1) if row["epoch"] == 1], tmp_path / "curve.png")
    loss, top1, rate = drawn[0].axes
    lines = [line for axes in (loss, top1, rate) for line in axes.lines]
    assert len(lines) == 6
    assert all(line.get_xdata().tolist() == [1] and line.get_marker() in (".", "o") for line in lines)
    training_curve(rows(), tmp_path / "longer.png")
    assert [axes.lines[0].get_marker() for axes in drawn[1].axes] == ["", ".", ""]


def test_one_run(tmp_path, drawn):
    output = tmp_path / "docs" / "curve.png"
    training_curve(write(tmp_path / "b0_digits", rows()), output)
    with Image.open(output) as image:
        assert image.size == (1200, 1200)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    [figure] = drawn
    loss, top1, rate = figure.axes
    assert figure.get_suptitle() == "b0_digits"
    assert legend(loss) == ["training", "validation"]
    assert legend(top1) == ["raw weights", "EMA weights", "best 80.0 %"]
    np.testing.assert_allclose(top1.lines[1].get_xydata(), [(e, 0.8 * e / 4) for e in range(1, 5)])
    assert top1.lines[2].get_xydata().tolist() == [[4, 0.8]]
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [0.1 * step / 10 for step in range(1, 41)])
    assert (loss.get_ylabel(), top1.get_ylabel(), rate.get_xlabel()) == ("Loss", "Validation top-1", "Epoch")
    assert top1.yaxis.get_major_formatter()(0.5, 0) == "50 %"


def test_legends_lie_above_the_panels_and_inside_the_picture(tmp_path, drawn):
    long = "runs/a_very_long_name_of_a_folder/" * 4
    training_curve({long + "1": rows(), long + "2": rows(3)}, tmp_path / "curve.png")
    [figure] = drawn
    for axes in figure.axes[:2]:
        box, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert box.y0 >= panel.y1
        assert panel.width > 0.8 * figure.bbox.width
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def test_several_runs_share_a_picture(tmp_path, drawn):
    runs = {"B0": write(tmp_path / "b0", rows()) / "metrics.jsonl", "B1": rows(6, top1=0.9)}
    training_curve(runs, tmp_path / "curve.svg", title="Digits")
    [figure] = drawn
    loss, top1, rate = figure.axes
    assert figure.get_suptitle() == "Digits"
    assert legend(loss) == ["B0", "B1", "validation"]
    assert legend(top1) == ["B0: best 80.0 %", "B1: best 90.0 %", "EMA weights", "raw weights"]
    assert len({line.get_color() for line in rate.lines}) == 2
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_noisy_losses_are_smoothed_without_a_shift(tmp_path, drawn):
    made = rows(epochs=40)
    training_curve(made, tmp_path / "curve.png")
    raw, smooth = drawn[0].axes[0].lines[:2]
    assert raw.get_alpha() < 0.5
    inner = slice(10, -10)
    np.testing.assert_allclose(smooth.get_ydata()[inner], raw.get_ydata()[inner])  # a straight line stays one
    np.testing.assert_allclose(smooth.get_ydata(), raw.get_ydata(), atol=0.5)  # and bends little at its ends


def test_gaps_and_unfinished_lines_are_left_out(tmp_path):
    folder = write(
        tmp_path / "run", [{"step": 1, "epoch": 0.5, "train/loss": None}, {"step": 2, "epoch": 1, "train/loss": 3}]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    assert len(read_metrics(folder)) == 2
    epochs, values = series(read_metrics(folder), "train/loss")
    assert (epochs.tolist(), values.tolist()) == ([1], [3])
    training_curve(folder, tmp_path / "curve.png")


def test_a_run_without_metrics_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl: no metrics here; name the folder of a run"):
        training_curve(tmp_path, tmp_path / "curve.png")
    with pytest.raises(ValueError, match="nothing to draw: no row has a loss or a top-1 yet"):
        training_curve(write(tmp_path, []), tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"plots need the extra plots \(matplotlib\): pip install 'effnet-train\[plots\]'"
    ):
        training_curve(rows(), tmp_path / "curve.png")
