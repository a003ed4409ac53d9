import io
import shutil

import pytest
from PIL import Image

from effnet_train.data.sources import FolderSource
from effnet_train.data.verify import KINDS, NOTES, inspect, report_lines, verify


@pytest.fixture
def photos(imagenet_jpegs, tmp_path):
    """Return a folder of real images: train/ with two classes of ten, val/ with two of five."""
    root = tmp_path / "photos"
    for place, data in enumerate(list(imagenet_jpegs.values())[:30]):
        split = "train" if place < 20 else "val"
        folder = root / split / ("ant", "bee")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place:02d}.JPEG").write_bytes(data)
    return root


def checked(root, workers=0, expected=None, min_side=8):
    splits = {split: FolderSource(root / split) for split in ("train", "val")}
    return verify(splits, expected=expected, min_side=min_side, workers=workers)


def found(report, root):
    """Return the images' paths, or groups of them, by kind."""

    def path(row):
        return row.split(": ")[0].removeprefix(f"{root}/") if isinstance(row, str) else [path(name) for name in row]

    both = report["problems"] | report["notes"]
    return {kind: [path(row) for row in rows] for kind, rows in both.items()}


def test_real_images_are_well(photos):
    report = checked(photos, expected={"classes": 2, "train": 20, "val": 10})
    assert report["problems"] == {}
    train = report["splits"]["train"]
    assert train["per_class"] == {"ant": 10, "bee": 10}
    assert train["bytes"] == sum(file.stat().st_size for file in photos.glob("train/*/*"))
    assert train["formats"] == {"JPEG": 20}
    assert report_lines(report)[-1] == "no problems"


def test_what_is_wrong_is_found_and_named(photos):
    files = {int(file.stem): file for file in photos.glob("*/*/*")}
    data = {number: file.read_bytes() for number, file in files.items()}
    files[0].write_bytes(data[0][: len(data[0]) // 2])
    files[1].write_bytes(data[1][:-2])
    files[2].write_bytes(b"")
    files[3].write_bytes(b"no image at all")
    files[4].write_bytes(encoded("PNG", "RGB"))
    files[5].write_bytes(encoded("WEBP", "RGB"))
    files[6].write_bytes(encoded("JPEG", "CMYK"))
    files[7].write_bytes(encoded("JPEG", "RGB", orientation=6))
    files[8].write_bytes(encoded("JPEG", "RGB", size=(3, 70)))
    shutil.copy(files[10], files[12])  # both ants
    shutil.copy(files[11], files[14])  # a bee among the ants
    shutil.copy(files[13], files[21])  # bees, of train and of val
    report = checked(photos, expected={"classes": 2, "train": 21, "val": 10})
    assert found(report, photos) == {
        "counts": ["train"],
        "unreadable": ["train/ant/00.JPEG", "train/ant/02.JPEG", "train/bee/01.JPEG", "train/bee/03.JPEG"],
        "tiny": ["train/ant/08.JPEG"],
        "across": [["train/bee/13.JPEG", "val/bee/21.JPEG"]],
        "contradicting": [["train/ant/14.JPEG", "train/bee/11.JPEG"]],
        "repeated": [["train/ant/10.JPEG", "train/ant/12.JPEG"]],
        "disguised": ["train/ant/04.JPEG", "train/bee/05.JPEG"],
        "cmyk": ["train/ant/06.JPEG"],
        "rotated": ["train/bee/07.JPEG"],
    }
    assert report["problems"].keys() | report["notes"].keys() == KINDS.keys() - {"damaged", "empty"}
    assert set(report["notes"]) == set(NOTES)
    assert report["problems"]["counts"] == ["train: 21 expected, 20 found"]
    lines = report_lines(report, shown=3)
    assert "problem: 4 images that cannot be decoded, or end too soon (unreadable)" in lines
    assert "  ... and 1 more" in lines
    # Nor does it matter how many read.
    assert checked(photos, workers=2, expected={"classes": 2, "train": 21, "val": 10}) == report


def encoded(kind, mode, *, size=(20, 30), orientation=None):
    image, stream = Image.effect_noise(size, 50).convert("RGB").convert(mode), io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


def test_a_copy_is_told_by_its_digest(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    one, other = (checked(root)["splits"] for root in (photos, tmp_path / "copy"))
    assert one == other
    changed = tmp_path / "copy/val/ant/20.JPEG"
    changed.write_bytes(changed.read_bytes() + b"\0")
    third = checked(tmp_path / "copy")["splits"]
    assert third["train"] == one["train"]
    assert third["val"]["digest"] != one["val"]["digest"]


def test_a_file_that_cannot_be_opened(photos):
    source = FolderSource(photos / "train")
    (photos / "train/ant/02.JPEG").unlink()
    report = verify({"train": source}, expected=None, min_side=8, workers=0)
    (row,) = report["problems"]["unreadable"]
    assert "No such file" in row
    assert report["splits"]["train"]["per_class"] == {"ant": 9, "bee": 10}


def test_the_end_of_a_jpeg_is_its_own(imagenet_jpegs):
    thumbnail = encoded("JPEG", "RGB")
    for data in list(imagenet_jpegs.values())[:5]:
        inner = b"\xff\xe3" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail  # APP3, whose content is anybody's
        data = data[:2] + inner + data[2:]
        assert inspect(data, 0).error is None
        assert inspect(data + bytes(10_000), 0).error is None
        assert "truncated" in inspect(data[: data.rindex(b"\xff\xd9")], 0).error


def test_images_that_their_source_has_decoded():
    one, other = Image.new("L", (9, 4), 7), Image.new("L", (4, 9), 7)
    assert inspect(one, 3)[:2] == (3, 0)
    assert inspect(one, 3).digest == inspect(one.copy(), 3).digest != inspect(other, 3).digest
    assert inspect(one, 3).size == (9, 4)
