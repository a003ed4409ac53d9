import numpy as np
import pytest
from PIL import Image

from effnet_train.data.preprocess import Preprocess, eval_image
from effnet_train.data.sources import FolderSource
from effnet_train.data.statistics import columns, measure, statistics_lines

PREPROCESS = Preprocess(24, crop_padding=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_numpys_of_all_pixels(image_root, workers):
    source = FolderSource(image_root / "train")
    found, table = measure(source, PREPROCESS, workers=workers)
    images = []
    for path in sorted(image_root.glob("train/*/*")):
        with Image.open(path) as image:
            images.append((image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"), path))
    pixels = np.stack([eval_image(image, PREPROCESS) for image, _ in images]).reshape(-1, 3) / 255
    assert found["mean"] == pytest.approx(pixels.mean(axis=0), rel=1e-12)
    assert found["std"] == pytest.approx(pixels.std(axis=0), rel=1e-12)
    widths = [image.width for image, _ in images]
    assert table[:, 2].tolist() == widths
    sides = np.array([image.size for image, _ in images])
    reference = {
        "width": widths,
        "height": sides[:, 1],
        "shorter": sides.min(axis=1),
        "aspect": sides[:, 0] / sides[:, 1],
        "bytes": [path.stat().st_size for _, path in images],
    }
    assert columns(table).keys() == found["quantiles"].keys() == reference.keys()
    for name, values in reference.items():
        for percent, value in found["quantiles"][name].items():
            assert value == pytest.approx(np.percentile(values, int(percent)))
    assert found["per_class"] == {"ant": 6, "bee": 6, "cow": 6}
    assert (found["images"], found["of"], found["unreadable"]) == (18, 18, [])


def test_one_colour_has_no_deviation(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        Image.new("RGB", (30, 20), (255, 51, 0)).save(tmp_path / "a" / f"{number}.png")
    found, _ = measure(FolderSource(tmp_path), PREPROCESS)
    assert found["mean"] == [1.0, 0.2, 0.0]
    assert found["std"] == [0.0, 0.0, 0.0]


def test_some_images_stand_for_all(image_root):
    source = FolderSource(image_root / "train")
    found, table = measure(source, PREPROCESS, count=6)
    assert (found["images"], found["of"]) == (6, 18)
    assert found["per_class"] == {"ant": 2, "bee": 2, "cow": 2}
    assert len(table) == 6
    assert measure(source, PREPROCESS, count=99)[0]["images"] == 18


def test_what_cannot_be_read_is_named_and_does_not_count(image_root):
    bad = image_root / "train/bee/a.jpg"
    bad.write_bytes(b"no image")
    found, _ = measure(FolderSource(image_root / "train"), PREPROCESS)
    assert found["images"] == 17
    assert found["unreadable"] == [f"{bad}: the file holds no image of a known kind"]
    assert statistics_lines(found)[-1] == f"unreadable: {bad}: the file holds no image of a known kind"
    for path in image_root.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 18 images can be read, the first: "):
        measure(FolderSource(image_root / "train"), PREPROCESS)
