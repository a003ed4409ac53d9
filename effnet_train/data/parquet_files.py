"""Parquet files of images, as the Hugging Face hub holds them: which files and columns, and images read in place."""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from effnet_train.data.decode import DecodeError
from effnet_train.data.shard_layout import expand

HUB = "hub:"
_SUFFIX = ".parquet"
_CARD = "README.md"


def modules() -> Any:
    """Return pyarrow and its module for parquet. Raises ImportError naming the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"data=parquet needs a package more ({error}): pip install 'effnet-train[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def located(root: str, *splits: str) -> str:
    """Return the folder of a data set: `root`, or where it is `hub:owner/name`, what was fetched of it for `splits`.

    Raises FileNotFoundError, ValueError.
    """
    if root.startswith(HUB):
        return _from_hub(root, splits)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data.root={root} does not exist: set it to a folder of .parquet files, or hub:owner/name"
        )
    return root


def find(folder: str, split: str) -> list[str]:
    """Return the files of a split.

    It is a word in the files' names below the folder (`data/train-00000-of-00002.parquet`, `train/0000.parquet`), or a
    pattern for them (`plain/tr*.parquet`, `train-{000..107}.parquet`). Raises FileNotFoundError, ValueError.
    """
    names = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob(f"*{_SUFFIX}"))
    return [os.path.join(folder, name) for name in choose(names, split, folder)]


def choose(names: Sequence[str], split: str, root: str) -> list[str]:
    """Return those of `names` that belong to `split`. Raises FileNotFoundError, ValueError where it is not clear."""
    names = [name for name in names if name.endswith(_SUFFIX)]
    if split.endswith(_SUFFIX):
        patterns = expand(split)
        found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])")
        found = [name for name in names if word.search(name.removesuffix(_SUFFIX))]
        folders = sorted({os.path.dirname(name) for name in found})
        if len(folders) > 1:
            raise ValueError(
                f"data.root={root}: the split {split} lies in {len(folders)} folders ({', '.join(folders[:4])}), which "
                f"may be several data sets: choose one by a pattern, as {folders[0]}/*{split}*{_SUFFIX}"
            )
    if not found:
        there = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else f"no {_SUFFIX} file"
        raise FileNotFoundError(
            f"data.root={root}: no file belongs to {split}; there is {there}: set data.train and data.val to a word in "
            f"the names, or to patterns ending in {_SUFFIX}"
        )
    return found


def _from_hub(root: str, splits: Sequence[str]) -> str:
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, _, revision = root.removeprefix(HUB).partition("@")
    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
    failure: Exception | None = None
    try:
        names = sorted(HfApi().list_repo_files(repository, **where))
    except Exception as error:  # OSError, ValueError, and those of the HTTP library: fetched before, it will do
        names, failure = [], error
    # Of a large data set only what is asked for; without the hub's list it is held against what was listed last time.
    if failure is None:
        wanted = [name for split in splits for name in choose(names, split, root)]
    else:
        wanted = [name for split in splits for name in (expand(split) if split.endswith(_SUFFIX) else [f"*{split}*"])]
    patterns = [*wanted, "classes.txt", "classes.json", _CARD]
    try:
        return snapshot_download(repository, **where, allow_patterns=patterns, local_files_only=failure is not None)
    except Exception as error:
        first = failure or error
        reason = f"{type(first).__name__}: {first}".splitlines()[0]
        raise FileNotFoundError(
            f"data.root={root}: cannot fetch it from {constants.ENDPOINT} ({reason}), and it is not in "
            f"{constants.HF_HUB_CACHE} (HF_HOME): log in (hf auth login) where it asks for that, run once where there "
            "is a network and take that folder along, or give a folder of its .parquet files"
        ) from error


class Columns(NamedTuple):
    """Where image and label lie: `encoded` is the path of the column of bytes, `path` that of the file names or ''."""

    encoded: str
    path: str
    label: str
    classes: tuple[str, ...]  # as the files name them; empty where they do not


def columns(file: str, chosen: Mapping[str, str] | None = None) -> Columns:
    """Find the columns of images and labels by what `datasets` wrote into the schema, else by their types and names.

    `chosen` names them instead (image, label). Raises ValueError naming the file and the choices.
    """
    pyarrow, _ = modules()
    schema = opened(file).schema_arrow
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in written.items() if isinstance(feature, Mapping)}
    kinds = {field.name: kinds.get(field.name) or _kind(pyarrow, field) for field in schema}
    image = _column(file, "image", kinds, "Image", chosen)
    label = _column(file, "label", kinds, "ClassLabel", chosen)
    kind = schema.field(image).type
    inner = {kind.field(i).name for i in range(kind.num_fields)}
    names = written.get(label, {}).get("names") or ()
    bare = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    if not bare and "bytes" not in inner:
        raise ValueError(
            f"{file}: the column {image} is of {kind}, no images: set data.columns.image to one that holds bytes"
        )
    return Columns(
        image if bare else f"{image}.bytes", f"{image}.path" if "path" in inner else "", label, tuple(map(str, names))
    )


def described_classes(folder: str, file: str, label: str) -> tuple[str, ...]:
    """Return the names of the classes of the column `label` in the data set's card, README.md; none where it has none.

    Of a card of several configurations it is the one whose folder `file` lies in, unless all have the same names.
    """
    import yaml

    try:
        heading = re.match(r"---\n(.*?)\n---", (Path(folder) / _CARD).read_text(encoding="utf-8"), re.DOTALL)
        described = yaml.safe_load(heading[1]).get("dataset_info") if heading else None
        infos = described if isinstance(described, list) else [described]
        found = {str(info.get("config_name")): _names(info["features"], label) for info in infos if info}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError):  # written for people: of no use
        return ()
    if len(set(found.values())) > 1:
        folders = Path(file).relative_to(folder).parts
        found = {name: names for name, names in found.items() if name in folders}
    return next(iter(found.values())) if len(set(found.values())) == 1 else ()


def _names(features: Sequence[Mapping[str, Any]], label: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel as a card has them: `dtype: {class_label: {names: {'0': ant, '1': bee}}}`."""
    for feature in features:
        kind = feature.get("dtype")
        if feature.get("name") == label and isinstance(kind, Mapping):
            names = kind.get("class_label", {}).get("names", {})
            found = sorted((int(number), str(name)) for number, name in names.items())
            if [number for number, _ in found] == list(range(len(found))):
                return tuple(name for _, name in found)
    return ()


def _kind(pyarrow: Any, field: Any) -> str | None:
    """Return what `datasets` would call a column."""
    if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        return "Image"
    return "ClassLabel" if field.name in ("label", "labels") else None


def _column(file: str, role: str, kinds: Mapping[str, str | None], kind: str, chosen: Mapping[str, str] | None) -> str:
    name = (chosen or {}).get(role)
    if name is not None:
        if name not in kinds:
            raise ValueError(f"data.columns.{role}={name} is no column of {file}: it has {', '.join(kinds)}")
        return name
    found = [name for name in kinds if kinds[name] == kind]
    if len(found) != 1:
        which = f"several ({', '.join(found)})" if found else f"none of its columns ({', '.join(kinds)})"
        raise ValueError(f"{file}: {which} may be the {role}: choose one as data.columns.{role}=")
    return found[0]


def opened(file: str) -> Any:
    """Open a parquet file. Raises ValueError naming it where it is none, or a truncated one."""
    pyarrow, parquet = modules()
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file, or a truncated one ({_line(error)}): fetch it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def values(file: str, column: str, *, rows: int = 1024) -> Iterator[Any]:
    """Yield the values of a column (`a.b`: of a part of it) in pieces of at most `rows`, as Arrow's arrays.

    Raises ValueError naming the file.
    """
    pyarrow, _ = modules()
    try:
        with opened(file) as reader:
            for batch in reader.iter_batches(rows, columns=[column], use_threads=False):
                # Flattened, a part is null where the whole is.
                yield batch.column(0).flatten()[0] if "." in column else batch.column(0)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: the column {column} cannot be read ({_line(error)}): fetch the file again"
        ) from error


def read_labels(files: Sequence[str], label: str, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers, int32, of all rows of `files`, and the classes: `classes`, or those the labels show.

    Text is numbered in sorted order, as folders are; numbers without names are named by themselves. Raises ValueError.
    """
    pyarrow, _ = modules()
    from pyarrow import compute

    pieces = [piece for file in files for piece in values(file, label, rows=65_536)]
    column = pyarrow.chunked_array(pieces)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    if column.null_count or not (text or pyarrow.types.is_integer(column.type)):
        raise ValueError(
            f"{files[0]}: the column {label} ({column.type}, {column.null_count} without a value) holds no labels"
        )
    if text:
        names = sorted(column.unique().to_pylist())
        index = pyarrow.array(names, column.type)
        return compute.index_in(column, index).to_numpy().astype(np.int32), tuple(names)
    numbers = column.to_numpy().astype(np.int32)
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, -1)
    if low < 0 or (classes and high >= len(classes)):
        raise ValueError(
            f"{files[0]} and its like hold labels from {low} to {high}, for {len(classes) or 'unnamed'} classes: "
            "images without a label (-1, as in a hidden test set) cannot be used, set data.train and data.val to others"
        )
    return numbers, tuple(classes) or tuple(map(str, range(high + 1)))


class ParquetSource:
    """Images read where they lie. A process keeps the row group it read last.

    So images in the files' order cost little, but in random order each costs the reading of a whole row group.
    """

    def __init__(self, files: Sequence[str], found: Columns, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self.files, self.columns, self.classes = tuple(files), found, classes
        self._labels = torch.from_numpy(labels)
        groups = list(_row_groups(files))
        self._places = torch.tensor([place for *place, _ in groups], dtype=torch.int64)
        self._ends = torch.tensor([rows for *_, rows in groups], dtype=torch.int64).cumsum(0)
        self._kept: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": (-1, None)}

    def __len__(self) -> int:
        return len(self._labels)

    def _place(self, index: int) -> tuple[int, int, int, int]:
        """Return the number of the row group, its file and number there, and the row in it."""
        group = int(torch.searchsorted(self._ends, index, right=True))
        file, number = self._places[group].tolist()
        return group, file, number, index - (int(self._ends[group - 1]) if group else 0)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the image's bytes and its class number. Raises OSError, DecodeError."""
        group, file, number, row = self._place(index)
        if self._kept[0] != group:
            self._kept = (-1, None)  # before the next is read, to hold one at a time
            self._kept = (group, self._row_group(self.files[file], number))
        value = self._kept[1][row].as_py()
        if value is None:
            raise DecodeError("the row holds no image")
        return value, int(self._labels[index])

    def _row_group(self, file: str, number: int) -> Any:
        pyarrow, _ = modules()
        try:
            with opened(file) as reader:
                column = reader.read_row_group(number, columns=[self.columns.encoded], use_threads=False).column(0)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise OSError(f"row group {number} cannot be read ({_line(error)})") from error
        if "." not in self.columns.encoded:
            return column
        return pyarrow.chunked_array([chunk.flatten()[0] for chunk in column.chunks])

    def name(self, index: int) -> str:
        """Return the file, and the row in its row group."""
        _, file, number, row = self._place(index)
        return f"{self.files[file]}:row {row} of row group {number}"


def _row_groups(files: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Yield the file, the number in it and the rows of each row group."""
    for place, file in enumerate(files):
        with opened(file) as reader:
            found = reader.metadata
            yield from ((place, number, found.row_group(number).num_rows) for number in range(found.num_row_groups))
