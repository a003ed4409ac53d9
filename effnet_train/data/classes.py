"""Which of a model's classes the classes of a data set are, and ImageNet's reassessed labels."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from effnet_train.data.sources import Source

Match = Literal["same", "any", "subset", "index"]
_VALIDATION_IMAGE = re.compile(r"val_(\d+)\.[^./]+$")


def match_classes(found: Sequence[str], trained: Sequence[str], how: Match) -> list[int]:
    """Return the model's classes to score by, in the order of a data set's labels: place i is its class i.

    `found` names the data set's classes, `trained` the model's. `how`: `same` names in the same order; `any`: only
    their number must be the same; `subset`: some of the names, and only those are scored; `index`: folders are named
    by the number of the model's class, and the classes without a folder are scored too, behind the others.
    Raises ValueError naming the choice that would fit.
    """
    assert how in get_args(Match)
    places = {name: place for place, name in enumerate(trained)}
    if how == "index":
        return _numbered(found, len(trained))
    if how == "subset":
        unknown = [name for name in found if name not in places]
        if unknown:
            raise ValueError(
                f"classes=subset: {len(unknown)} of the data set's {len(found)} classes are none of the checkpoint's "
                f"{len(trained)}: {', '.join(map(repr, unknown[:5]))}{_hint(found, trained)}"
            )
        return [places[name] for name in found]
    if len(found) != len(trained):
        raise ValueError(
            f"the data set has {len(found)} classes, the checkpoint {len(trained)}"
            f"{_hint(found, trained) or ': choose the data it was trained on'}"
        )
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, trained, strict=True)) if a != b]
    if wrong and how == "same":
        place, here, there = wrong[0]
        raise ValueError(
            f"{len(wrong)} classes are named differently: class {place} is {here!r} in the data set and {there!r} in "
            f"the checkpoint{_hint(found, trained) or '; if only the names differ, not their order, set classes=any'}"
        )
    return list(range(len(trained)))


def _numbered(found: Sequence[str], count: int) -> list[int]:
    wrong = [name for name in found if not _is_number(name, count)]
    if wrong:
        raise ValueError(
            f"classes=index: the class folder {wrong[0]!r} is not named by a number from 0 to {count - 1}, the "
            "checkpoint's classes: choose classes=same, any or subset"
        )
    numbers = [int(name) for name in found]
    if len(set(numbers)) < len(numbers):
        twice = next(name for name, number in zip(found, numbers, strict=True) if numbers.count(number) > 1)
        raise ValueError(f"classes=index: two class folders have the number of {twice!r}: put them into one")
    return numbers + sorted(set(range(count)) - set(numbers))


def _is_number(name: str, count: int) -> bool:
    return name.isascii() and name.isdecimal() and int(name) < count


def _hint(found: Sequence[str], trained: Sequence[str]) -> str:
    """Say which other choice of `classes` fits, or nothing where none does."""
    if set(found) <= set(trained):
        return "; its names are all among the checkpoint's: classes=subset goes by name, and scores by those only"
    if all(_is_number(name, len(trained)) for name in found):
        return "; its names are numbers: with classes=index they are the numbers of the checkpoint's classes"
    return ""


def real_labels(file: Path, source: Source, scored: Sequence[int]) -> Tensor:
    """Read ImageNet's reassessed labels: for each image of `source` the places in `scored` of all that are right.

    (N, L) int64, filled up with -1; a row of -1 alone is an image without a label, which does not count. The file is a
    JSON list, whose entry i holds the model's classes of the image named ..._val_0000000{i + 1}.
    Source: Beyer et al. 2020, "Are we done with ImageNet?" (ReaL), and their real.json.
    Raises FileNotFoundError, ValueError.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"real_labels={file} does not exist: give ReaL's real.json (github.com/google-research/reassessed-imagenet)"
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"real_labels={file} is no JSON ({error}): give ReaL's real.json") from error
    places = {label: place for place, label in enumerate(scored)}
    _check_entries(file, entries, len(places))
    chosen = [entries[_number(file, source.name(i), len(entries)) - 1] for i in range(len(source))]
    table = torch.full((len(chosen), max([1, *map(len, chosen)])), -1)
    for row, labels in zip(table, chosen, strict=True):
        row[: len(labels)] = torch.tensor([places[label] for label in labels])
    return table


def _check_entries(file: Path, entries: object, classes: int) -> None:
    if not isinstance(entries, list) or not all(isinstance(entry, list) for entry in entries):
        raise ValueError(f"real_labels={file} must be a JSON list of lists of class numbers: give ReaL's real.json")
    for place, entry in enumerate(entries):
        for label in entry:
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
                raise ValueError(
                    f"real_labels={file}: entry {place} holds {label!r}, which is no class from 0 to {classes - 1} of "
                    "the checkpoint: is it of other classes?"
                )


def _number(file: Path, name: str, count: int) -> int:
    found = _VALIDATION_IMAGE.search(name)
    if found is None:
        raise ValueError(
            f"real_labels={file}: the image {name} is not named as ILSVRC2012_val_00000001.JPEG is, so its labels "
            "cannot be found: ReaL's labels are for split=val of ImageNet"
        )
    number = int(found[1])
    if not 1 <= number <= count:
        raise ValueError(
            f"real_labels={file} has {count:,} entries, none for the image {name}: give the whole list, which for "
            "ImageNet has 50,000"
        )
    return number
