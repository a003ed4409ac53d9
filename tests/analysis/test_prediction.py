"""From an image's file to its row and its map, with networks whose answers are known."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from effnet_train.analysis.prediction import Predictor, class_number
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import find_files

RESOLUTION = 64


class Brightness(nn.Module):
    """Features are brightness and darkness of each 16 x 16 pixels; class 1 is bright, class 2 dark, 0 neither."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(2, 3)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 1.0]]))
            self.classifier.bias.copy_(torch.tensor([-9.0, 0.0, 0.0]))

    def features(self, images: Tensor) -> Tensor:
        bright = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16)
        return torch.cat([bright, 1 - bright], dim=1)


class OnePixel(Brightness):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images).mean((2, 3), keepdim=True)


def predictor(model: nn.Module, maps: Path | None, mapped: int | None = None) -> Predictor:
    preprocess = Preprocess(resolution=RESOLUTION, crop_padding=0, mean=(0, 0, 0), std=(1, 1, 1))
    names = ("neither", "bright", "dark")
    return Predictor(model=model.eval(), preprocess=preprocess, classes=names, words=names, maps=maps, mapped=mapped)


def rows_of(predict: Predictor, *files: Path) -> list[dict[str, Any]]:
    found = find_files([str(file) for file in files])
    return list(predict(found, batch_size=2, workers=0, device=torch.device("cpu")))


def with_square(file: Path, left: int, top: int) -> Path:
    """Write an image of 128 x 64, of which the network sees the middle 64, with a bright square of 16."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[top : top + 16, left : left + 16] = 255
    Image.fromarray(pixels).save(file)
    return file


def hottest(file: Path) -> tuple[int, int]:
    """Return the column and row, of four each, where a picture's map is reddest."""
    with Image.open(file) as picture:
        heat = np.asarray(picture).astype(int)[:256, 260:516]
    redness = (heat[..., 0] - heat[..., 2]).reshape(4, 64, 4, 64).sum(axis=(1, 3))
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    return int(x), int(y)


@pytest.mark.parametrize(
    ("left", "top", "place"), [(32, 0, (0, 0)), (80, 0, (3, 0)), (32, 48, (0, 3)), (64, 16, (2, 1))]
)
def test_the_map_is_hot_where_the_crop_shows_the_square(
    tmp_path: Path, left: int, top: int, place: tuple[int, int]
) -> None:
    """Of a wide image: columns are counted from the crop's edge, which is pixel 32 of the file."""
    file = with_square(tmp_path / "one.png", left, top)
    (row,) = rows_of(predictor(Brightness(), tmp_path / "", mapped=1), file)
    assert row["top"][0]["class"] == "dark"  # most of it is
    assert hottest(tmp_path / "00000-one.png") == place


def test_the_map_is_of_the_likeliest_class_or_of_the_one_asked_for(tmp_path: Path) -> None:
    file = with_square(tmp_path / "one.png", 32, 0)
    for folder, mapped in (("likeliest", None), ("dark", 2), ("bright", 1)):
        (tmp_path / folder).mkdir()
        rows_of(predictor(Brightness(), tmp_path / folder, mapped), file)
    likeliest, dark, bright = (
        (tmp_path / folder / "00000-one.png").read_bytes() for folder in ("likeliest", "dark", "bright")
    )
    assert likeliest == dark
    assert likeliest != bright


def test_maps_and_rows_keep_their_images_where_others_are_lost(tmp_path: Path) -> None:
    """Every other file is broken, and a batch holds nothing else."""
    files = [with_square(tmp_path / f"{index}.png", 32 + 16 * (index % 4), 0) for index in range(6)]
    for index in (1, 2, 3, 5):
        files[index].write_bytes(b"broken")
    (tmp_path / "maps").mkdir()
    rows = rows_of(predictor(Brightness(), tmp_path / "maps", mapped=1), *files)
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [index for index, row in enumerate(rows) if "error" in row] == [1, 2, 3, 5]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["00000-0.png", "00004-4.png"]
    assert hottest(tmp_path / "maps" / "00004-4.png") == (0, 0)


def test_features_of_one_pixel_have_no_map(tmp_path: Path) -> None:
    """It would be one colour all over, which looks like a finding."""
    file = with_square(tmp_path / "one.png", 32, 0)
    assert rows_of(predictor(OnePixel(), None), file)[0]["top"][0]["class"] == "dark"
    with pytest.raises(ValueError, match=r"cam=.*: at 64 pixels the last features are a single one"):
        rows_of(predictor(OnePixel(), tmp_path), file)


def test_a_map_has_a_name_that_the_disk_takes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    file = tmp_path / ("é" * 125 + ".png")  # 254 bytes
    file.write_bytes(buffer.getvalue())
    (tmp_path / "maps").mkdir()
    rows_of(predictor(Brightness(), tmp_path / "maps"), file)
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [f"00000-{'é' * 60}.png"]


def test_a_class_by_name_word_or_number() -> None:
    classes, words = ["n1", "n2", "0"], ["tench", "crane", "naught"]
    assert [class_number(asked, classes, words) for asked in (None, "n2", "crane", 1, "2")] == [None, 1, 1, 1, 2]
    assert class_number("0", classes, words) == 2  # a name comes before a number
    with pytest.raises(
        ValueError, match="cam_class=3 is no class of the checkpoint: give its name, or a number below 3"
    ):
        class_number(3, classes, words)
