"""A data set's classes find their places among a model's, and reassessed labels their images."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from effnet_train.data.classes import match_classes, real_labels
from effnet_train.data.datasets import eval_folder
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import FolderSource

TRAINED = ("ant", "bee", "cow", "dog")


@pytest.mark.parametrize(
    ("how", "found", "places"),
    [
        ("same", TRAINED, [0, 1, 2, 3]),
        ("any", ("w", "x", "y", "z"), [0, 1, 2, 3]),
        ("any", TRAINED, [0, 1, 2, 3]),
        ("subset", ("bee", "dog"), [1, 3]),
        ("subset", ("dog", "ant", "cow", "bee"), [3, 0, 2, 1]),
        ("index", ("0", "1", "2", "3"), [0, 1, 2, 3]),
        ("index", ("10", "2"), [10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]),
        ("index", ("007", "1"), [7, 1, 0, 2, 3, 4, 5, 6, 8, 9, 10]),
    ],
)
def test_places(how: str, found: tuple[str, ...], places: list[int]) -> None:
    trained = [str(name) for name in "abcdefghijk"] if len(places) == 11 else TRAINED
    assert match_classes(found, trained, how) == places  # type: ignore[arg-type]


def test_folders_of_numbers_stand_in_the_order_of_their_letters(tmp_path: Path) -> None:
    """ImageNet-V2's folders: 10 comes before 2, and the labels follow the folders."""
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / str(number) / "a.png")
    source = FolderSource(tmp_path)
    places = match_classes(source.classes, [chr(97 + i) for i in range(12)], "index")
    for index in range(12):
        assert places[source.read(index)[1]] == int(Path(source.name(index)).parent.name)


@pytest.mark.parametrize(
    ("how", "found", "message"),
    [
        ("same", ("ant", "bee"), "has 2 classes, the checkpoint 4; its names are all .*: classes=subset goes by name"),
        ("any", ("ant", "bee"), "the data set has 2 classes, the checkpoint 4; .* classes=subset"),
        ("same", ("x", "y"), "the data set has 2 classes, the checkpoint 4: choose the data it was trained on"),
        ("same", ("0", "1", "2", "3"), "4 classes are named differently: class 0 is '0' .* with classes=index they"),
        ("same", ("0", "3"), "the data set has 2 classes, the checkpoint 4; its names are numbers: with classes=index"),
        ("same", ("bee", "ant", "cow", "dog"), "2 classes are named differently: class 0 is 'bee' .*: classes=subset"),
        ("same", ("ant", "bee", "cow", "Dog"), "1 classes .* class 3 is 'Dog' .* 'dog' .* set classes=any"),
        ("subset", ("ant", "elk", "fox"), "2 of the data set's 3 classes are none of the checkpoint's 4: 'elk', 'fox'"),
        ("subset", ("0", "1"), "2 of the data set's 2 classes are none .* '0', '1'; its names are numbers: with"),
        ("index", ("0", "4"), "the class folder '4' is not named by a number from 0 to 3, .* classes=same, any"),
        ("index", ("-1",), "the class folder '-1' is not named by a number from 0 to 3"),
        ("index", ("1", "01"), "two class folders have the number of '1': put them into one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_choice_that_does(how: str, found: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(found, TRAINED, how)  # type: ignore[arg-type]


class Images:
    """A source of images that have names only."""

    classes = TRAINED

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[bytes, int]:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return self.names[index]


def validation(number: int) -> str:
    return f"/imagenet/val/n01440764/ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[3], [], [0, 2], [1]]))
    return path


def test_labels_go_by_the_number_in_the_name(file: Path) -> None:
    source = Images(validation(3), validation(1), validation(2))
    found = real_labels(file, source, range(4))
    assert found.tolist() == [[0, 2], [3, -1], [-1, -1]]
    assert found.dtype == torch.int64
    # Scored in another order, the labels are the places in it.
    assert real_labels(file, source, [3, 0, 1, 2]).tolist() == [[1, 3], [0, -1], [-1, -1]]


def test_no_label_at_all(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[]]")
    assert real_labels(tmp_path / "real.json", Images(validation(1)), range(4)).tolist() == [[-1]]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, validation(5), r"real.json has 4 entries, none for the image .*val_00000005.JPEG: give the whole list"),
        (None, validation(0), r"real.json has 4 entries, none for the image .*val_00000000.JPEG"),
        (None, "train/n01440764/n01440764_10026.JPEG", r"the image .* is not named as ILSVRC2012_val_00000001.JPEG"),
        (None, "val_1/dog.png", "the image val_1/dog.png is not named as"),
        ("[[3], [4]]", validation(1), r"entry 1 holds 4, which is no class from 0 to 3 of the checkpoint"),
        ("[[-1]]", validation(1), r"entry 0 holds -1, which is no class"),
        ('[["dog"]]', validation(1), r"entry 0 holds 'dog', which is no class"),
        ("[[true]]", validation(1), r"entry 0 holds True, which is no class"),
        ('{"a": [1]}', validation(1), r"must be a JSON list of lists of class numbers"),
        ("[1, 2]", validation(1), r"must be a JSON list of lists of class numbers"),
        ("[[1],", validation(1), r"is no JSON \(.*\): give ReaL's real.json"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_right(file: Path, text: str | None, name: str, message: str) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        real_labels(file, Images(name), range(4))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"real_labels=.*no.json does not exist: give ReaL's real.json"):
        real_labels(tmp_path / "no.json", Images(validation(1)), range(4))


def test_a_plain_folder_is_for_evaluation_only(image_root: Path) -> None:
    data = eval_folder(str(image_root / "val"), preprocess=Preprocess(16), on_error="skip")
    assert (len(data.train), len(data.val), data.test, data.on_error) == (0, 12, None, "skip")
    assert data.classes == ("ant", "bee", "cow")
    assert data.val.name(0) == str(image_root / "val/ant/a.jpg")
    eval_folder(str(image_root / "val"), preprocess=Preprocess(16), expected={"classes": 3, "val": 12})
    with pytest.raises(ValueError, match=r"is not complete \(val: 7500 expected, 12 found\)"):
        eval_folder(str(image_root / "val"), preprocess=Preprocess(16), expected={"classes": 3, "val": 7500})
    with pytest.raises(FileNotFoundError, match=r"data.root=no does not exist: set it to a folder that holds <class>"):
        eval_folder("no", preprocess=Preprocess(16))
    with pytest.raises(ValueError, match=r"data.on_error=ignore is not known"):
        eval_folder(str(image_root / "val"), preprocess=Preprocess(16), on_error="ignore")
