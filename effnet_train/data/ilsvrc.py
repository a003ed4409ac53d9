"""Which class each of ImageNet's validation images is of: from the devkit, or from a text file as people keep it."""

import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
_SYNSET = re.compile(r"n\d{8}")


def devkit_synsets() -> list[str]:
    """Return the 1,000 synsets of ILSVRC 2012 as the devkit numbers them: place i has ILSVRC2012_ID i + 1.

    Source: the devkit's meta.mat. Unlike class numbers these do not follow the sorted names.
    """
    return Path(__file__).with_name("ilsvrc2012_synsets.txt").read_text().split()


def validation_synsets(file: str) -> list[str]:
    """Return the synset of each validation image, in the order of their names.

    `file` is the devkit (.tar.gz), or a text of a line per image: its synset, its ILSVRC2012_ID (1 to 1,000) or the
    place of its synset among the sorted ones (0 to 999), alone, or behind the image's name. So are the devkit's own
    ground truth, TensorFlow's list of synsets, Caffe's val.txt and Kaggle's LOC_val_solution.csv.
    Raises ValueError naming what is wrong; ImportError where SciPy, which reads the devkit's MATLAB files, is missing.
    """
    return _in_devkit(file) if tarfile.is_tarfile(file) or file.endswith("gz") else _in_text(file)


def _in_devkit(devkit: str) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{devkit} holds MATLAB files: pip install 'effnet-train[datasets]'") from error
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name in ("meta.mat", _GROUND_TRUTH):
                    file = tar.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
        meta = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        synset = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
        return [synset[int(number)] for number in contents[_GROUND_TRUTH].split()]
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{devkit} is not ImageNet's devkit of 2012, tasks 1 and 2 ({error!r})") from error


def _in_text(file: str) -> list[str]:
    named: dict[int, str] = {}
    try:
        lines = [line.replace(",", " ").split() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        words = [line for line in lines if line and line[0] != "ImageId"]  # Kaggle's heading
        for place, line in enumerate(words, start=1):
            image = _VALIDATION_IMAGE.search(line[0])
            named[int(image[1]) if image else place] = line[1 if image else 0]
        if not words or sorted(named) != list(range(1, len(words) + 1)):
            raise ValueError(f"of {len(words):,} lines some are of the same image, or images are missing")
        return _synsets([named[number] for number in sorted(named)])
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"data.val_labels={file} does not give each validation image's synset, ILSVRC2012_ID or place among the "
            f"sorted synsets, a line each ({error})"
        ) from error


def _synsets(labels: Sequence[str]) -> list[str]:
    if all(_SYNSET.fullmatch(label) for label in labels):
        return list(labels)
    numbers = [int(label) for label in labels]
    by_id = devkit_synsets()
    # Every class has validation images, so that the least number tells which numbers they are.
    first, table = (1, by_id) if min(numbers) == 1 else (0, sorted(by_id))
    if min(numbers) != first or max(numbers) >= first + len(table):
        raise ValueError(f"numbers go from {min(numbers)} to {max(numbers)}")
    return [table[number - first] for number in numbers]
