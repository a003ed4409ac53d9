"""Tables and pictures of an evaluation say what the matrix holds."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effnet_train.analysis.details import (
    calibration_picture,
    class_top1,
    confused_pairs,
    confusion_picture,
    new_figure,
    readable_names,
    write_details,
)

BINS = np.zeros((3, 15))
BINS[:, 14] = 90, 80, 85.5
BINS[:, 7] = 10, 8, 5


def matrix(classes: int, *wrong: tuple[int, int, int]) -> np.ndarray:
    """Return nine hits for every class, and the images that are wrong."""
    counts = np.zeros((classes, classes + 1), np.int64)
    np.fill_diagonal(counts, 9)
    for true, predicted, images in wrong:
        counts[true, predicted] += images
    return counts


def test_top1_of_a_class_and_of_one_without_images() -> None:
    counts = matrix(3, (0, 1, 1), (2, 3, 9))
    counts[1] = 0
    np.testing.assert_array_equal(class_top1(counts), [0.9, np.nan, 0.5])


def test_the_pairs_confused_most_come_first_and_none_that_is_not() -> None:
    counts = matrix(4, (2, 0, 5), (0, 2, 7), (3, 1, 5), (1, 4, 99))  # the last is no class's
    assert confused_pairs(counts, 20) == [(0, 2, 7), (2, 0, 5), (3, 1, 5)]
    assert confused_pairs(counts, 1) == [(0, 2, 7)]


def test_synsets_have_names_that_tell_them_apart() -> None:
    found = readable_names(["n01440764", "n02012849", "n03126707", "n04399382", "n99999999"])
    assert found == ["tench", "crane (n02012849)", "crane (n03126707)", "teddy", "n99999999"]
    assert readable_names(["n01440764", "dog"]) == ["n01440764", "dog"]


def test_all_of_imagenets_names_are_known_and_differ() -> None:
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo().label_names()
    found = readable_names(synsets)
    assert len(set(found)) == 1000
    assert not set(found) & set(synsets)


def read(file: Path) -> list[list[str]]:
    return list(csv.reader(file.read_text(encoding="utf-8").splitlines()))


def test_what_few_classes_leave_behind(tmp_path: Path) -> None:
    folder = tmp_path / "details"
    names = ["a, b", 'the "c"', "ö"]
    write_details(folder, matrix(3, (0, 1, 1)), BINS, names)
    assert {path.name for path in folder.iterdir()} == {
        *("per_class.csv", "confusion.csv", "confusion.png", "calibration.png"),
    }
    assert read(folder / "per_class.csv") == [
        ["class", "name", "images", "top1"],
        ["a, b", "a, b", "10", "0.900000"],
        ['the "c"', 'the "c"', "9", "1.000000"],
        ["ö", "ö", "9", "1.000000"],
    ]
    assert read(folder / "confusion.csv")[:2] == [["true class / predicted", *names], ["a, b", "9", "1", "0"]]
    # What was not finite has a column where there is any.
    write_details(folder, matrix(3, (1, 3, 2)), BINS, names)
    assert read(folder / "confusion.csv")[2] == ['the "c"', "0", "9", "0", "2"]


def test_what_many_classes_leave_behind(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(201)]
    counts = matrix(201, (3, 200, 4))
    write_details(tmp_path, matrix(3), BINS, ["a", "b", "c"])
    write_details(tmp_path, counts, BINS, names)
    assert not (tmp_path / "confusion.csv").exists()  # of the evaluation before
    with np.load(tmp_path / "confusion.npz") as found:
        np.testing.assert_array_equal(found["confusion"], counts)
        assert found["classes"].tolist() == names


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def test_the_square_has_its_numbers_and_the_spare_column_only_where_needed() -> None:
    figure = confusion_picture(matrix(3, (0, 1, 1), (2, 1, 1234)), ["ant", "bee", "cow"])
    [axes] = figure.axes
    assert texts(axes) == ["9", "1", "9", "1,234", "9"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "bee", "cow"]
    assert axes.get_title().startswith("1,262 images, top-1 2.1 %")
    [axes] = confusion_picture(matrix(3, (0, 3, 1)), ["ant", "bee", "cow"]).axes
    assert axes.get_xticklabels()[-1].get_text() == "(not finite)"


def test_many_classes_show_the_worst() -> None:
    counts = matrix(30, (4, 5, 9), (7, 8, 1), (7, 9, 2))
    counts[11] = 0
    left, right = confusion_picture(counts, [f"c{i}" for i in range(30)]).axes
    assert [label.get_text() for label in left.get_yticklabels()][:3] == ["c4 (9 of 18)", "c7 (9 of 12)", "c0 (9 of 9)"]
    assert texts(left)[:3] == ["50", "75", "100"]
    assert left.get_title() == f"The 20 worst of 29 classes (mean of all: {100 * (27 + 0.5 + 0.75) / 29:.1f} %)"
    assert [label.get_text() for label in right.get_yticklabels()] == ["c4 → c5", "c7 → c9", "c7 → c8"]
    assert texts(right) == ["9", "2", "1"]
    _, right = confusion_picture(matrix(30), [f"c{i}" for i in range(30)]).axes
    assert right.get_title() == "No class is taken for another"


def test_the_reliability_diagram() -> None:
    figure = calibration_picture(BINS)
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == [0.8, pytest.approx(80 / 90)]
    assert [bar.get_x() + bar.get_width() / 2 for bar in top.patches] == pytest.approx([7.5 / 15, 14.5 / 15])
    np.testing.assert_allclose(top.lines[1].get_xydata(), [(0.5, 0.8), (0.95, 80 / 90)])
    assert figure.get_suptitle() == "ECE 0.0850: mean confidence 90.5 %, top-1 88.0 %"  # (3 + 5.5) / 100
    assert [bar.get_height() for bar in bottom.patches if bar.get_height()] == [0.1, 0.9]


@pytest.mark.parametrize("classes", [1, 2, 25, 26, 1000])
def test_pictures_of_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"$\\no$ {i}, and what is a rather long name" for i in range(classes)]  # no formula
    file = tmp_path / "picture.png"
    for counts in (matrix(classes), np.zeros((classes, classes + 1), np.int64)):
        confusion_picture(counts, names).savefig(file, dpi=50)
        with Image.open(file) as image:
            assert min(image.size) >= 250


def test_an_empty_evaluation_has_a_diagram(tmp_path: Path) -> None:
    calibration_picture(np.zeros((3, 15))).savefig(tmp_path / "empty.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"details= draws with matplotlib: pip install effnet-train\[plots\]"):
        new_figure(1, 1)
