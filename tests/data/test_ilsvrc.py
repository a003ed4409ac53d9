"""The labels of ImageNet's validation images, in every form that people keep them in."""

from importlib.resources import files
from pathlib import Path

import pytest

from effnet_train.data.ilsvrc import devkit_synsets, validation_synsets

# The first ten validation images: the devkit's ground truth, TensorFlow's list of synsets, and Caffe's val.txt.
IDS = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)
SYNSETS = (
    *("n01751748", "n09193705", "n02105855", "n04263257", "n03125729"),
    *("n01735189", "n02346627", "n02776631", "n03794056", "n02328150"),
)
PLACES = (65, 970, 230, 809, 516, 57, 334, 415, 674, 332)


def name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def test_the_devkits_synsets_are_imagenets() -> None:
    """Against timm's list, which stands in the order of the class numbers."""
    timms = (files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split()
    assert sorted(devkit_synsets()) == timms
    assert [devkit_synsets()[number - 1] for number in IDS] == list(SYNSETS)
    assert [timms[place] for place in PLACES] == list(SYNSETS)


# Each form ends with all classes, as the real ones have.
BY_ID, BY_PLACE = [*IDS, *range(1, 1001)], [*PLACES, *range(1000)]
FORMS = {
    "the devkit's ground truth": [f"{number}\n" for number in BY_ID],
    "TensorFlow's synsets": [f"{synset}\n" for synset in (*SYNSETS, *devkit_synsets())],
    "places alone": [f"{place}\r\n" for place in BY_PLACE],
    "Caffe's val.txt": [f"{name(i)}.JPEG {place}\n" for i, place in enumerate(BY_PLACE, 1)],
    "with folders, in another order": [f"val/{name(i)}.JPEG\t{v}\n" for i, v in reversed([*enumerate(BY_ID, 1)])],
    "Kaggle's table": [
        "ImageId,PredictionString\n",
        *(
            f"{name(i)},{synset} 85 1 499 272\n"
            for i, synset in reversed([*enumerate((*SYNSETS, *devkit_synsets()), 1)])
        ),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_labels(tmp_path: Path, form: str) -> None:
    (tmp_path / "labels.txt").write_text("".join(FORMS[form]))
    found = validation_synsets(str(tmp_path / "labels.txt"))
    assert len(found) == 1010
    assert found[:10] == list(SYNSETS)
    assert found[10:] == (sorted(devkit_synsets()) if "place" in form or "Caffe" in form else devkit_synsets())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tench\n",
        "2\n3\n",
        "1\n1001\n",
        "0\n1000\n",
        "-1\n0\n",
        "n01440764\n3\n",
        f"{name(1)} 0\n{name(1)} 1\n",
        f"{name(1)} 0\n{name(3)} 1\n",
        f"{name(1)}\n",
        "\xff\xfe",
    ],
)
def test_files_that_hold_no_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.val_labels=.*labels\.txt does not give each validation image's syns"):
        validation_synsets(str(tmp_path / "labels.txt"))
