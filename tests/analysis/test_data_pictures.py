"""Pictures of a data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from effnet_train.analysis.data_pictures import contact_sheet, histograms, shortened

SIDE, GAP, LINE = 128, 8, 20


def squares(count: int, size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(256, size=(size, size, 3), dtype=np.uint8) for _ in range(count)]


def test_every_pixel_is_on_the_sheet_and_names_stand_below() -> None:
    images = squares(5, 32)
    sheet = np.asarray(contact_sheet(images, ["a", "bee", "", "d", "a name much too long for it"], "title", width=3))
    top = GAP + LINE + GAP
    assert sheet.shape == (top + 2 * (SIDE + LINE + GAP), GAP + 3 * (SIDE + GAP), 3)
    for place, image in enumerate(images):
        left, upper = GAP + place % 3 * (SIDE + GAP), top + place // 3 * (SIDE + LINE + GAP)
        cell = sheet[upper : upper + SIDE, left : left + SIDE]
        assert np.array_equal(cell[2::4, 2::4], image)
        assert np.array_equal(cell, image.repeat(4, 0).repeat(4, 1))
        name = sheet[upper + SIDE : upper + SIDE + LINE, left : left + SIDE]
        assert (name.min() < 100) == (place != 2)
        # Nothing runs into the next one.
        assert sheet[upper + SIDE : upper + SIDE + LINE, left + SIDE : left + SIDE + GAP].min() == 255


@pytest.mark.parametrize(("size", "cell"), [(8, 112), (112, 112), (224, 224), (256, 256), (600, 256)])
def test_cells_can_be_seen(size: int, cell: int) -> None:
    assert contact_sheet(squares(1, size), ["x"], "").width == cell + 2 * GAP


def test_a_name_is_cut_where_it_must_be() -> None:
    font = ImageFont.load_default(14)
    assert shortened("ant", font, 100) == "ant"
    cut = shortened("a very long name of an animal", font, 100)
    assert cut[-1] == "…"
    assert font.getlength(cut) <= 100 < font.getlength(cut[:-1] + "xx")


def test_histograms_are_drawn(tmp_path: Path) -> None:
    table = np.array([[0, 1000, 40, 30], [1, 900, 30, 40], [1, 5000, 300, 40]])
    histograms(table, {"images": 3, "per_class": {"a": 1, "b": 2}}, tmp_path / "sizes.png")
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.size == (1350, 900)
        assert len(set(picture.convert("RGB").get_flattened_data())) > 10
