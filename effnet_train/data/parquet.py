"""Images in parquet files, as the Hugging Face hub holds them: copied once to where each can be read by itself."""

import hashlib
import os
import secrets
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Unpack

import numpy as np

from effnet_train.data.archives import TarSource
from effnet_train.data.caches import alone
from effnet_train.data.datasets import Common, Data, assemble
from effnet_train.data.parquet_files import (
    Columns,
    ParquetSource,
    columns,
    described_classes,
    find,
    located,
    opened,
    read_labels,
    values,
)
from effnet_train.data.shard_layout import class_names
from effnet_train.data.tar_index import Entry, TarIndex, default_cache, open_index


def parquet(
    root: str,
    *,
    train: str,
    val: str,
    columns: Mapping[str, str | None] | None = None,
    copy: bool = True,
    cache: str | None = None,
    **common: Unpack[Common],
) -> Data:
    """Read parquet files of images and labels: a folder's, or those of the hub's `hub:owner/name[@revision]`.

    `train` and `val` are words in the files' names, or patterns (`parquet_files.find`); `columns` names those of
    `image` and `label` where they are not plain to see. Class names come from the files, from `classes.txt`,
    `classes.json` or `README.md` (`dataset_info`) beside them, or are the numbers. `copy`: the encoded images are
    copied to `cache` once, since parquet gives whole row groups only. Raises FileNotFoundError, ValueError.
    """
    chosen = {role: name for role, name in (columns or {}).items() if name is not None}
    unknown = sorted(chosen.keys() - {"image", "label"})
    if unknown:
        raise ValueError(f"data.columns.{unknown[0]} is not known: columns are image and label")
    folder = Path(cache) if cache else default_cache()
    place = located(root, train, val)
    splits = [find(place, split) for split in (train, val)]
    sources = [copied(files, chosen, folder) if copy else direct(files, chosen) for files in splits]
    if all(name.isdecimal() for source in sources for name in source.classes):
        names = _names_beside(place, splits[0][0], chosen, max(len(source.classes) for source in sources))
        for source in sources:
            source.classes = names
    return assemble(root, *sources, **common)


def _names_beside(place: str, file: str, chosen: Mapping[str, str], count: int) -> tuple[str, ...]:
    names = class_names(place, count)
    if names == tuple(map(str, range(count))):
        names = described_classes(place, file, columns(file, chosen).label) or names
    if len(names) < count:
        raise ValueError(
            f"{place}/README.md names {len(names)} classes, the labels go up to {count - 1}: give all names in a "
            "classes.txt there, one a line"
        )
    return names


def direct(files: Sequence[str], chosen: Mapping[str, str]) -> ParquetSource:
    """Return the images of `files`, read where they lie."""
    found = columns(files[0], chosen)
    return ParquetSource(files, found, *read_labels(files, found.label, found.classes))


class CopySource(TarSource):
    """Images copied out of parquet files; names are those of the files."""

    def __init__(self, index: TarIndex, files: Sequence[str]) -> None:
        super().__init__(index)
        self.files = tuple(files)

    def _path(self, archive: int) -> str:
        return self.files[archive]


def copied(files: Sequence[str], chosen: Mapping[str, str], cache: Path) -> CopySource:
    """Return the images of `files` from copies in `cache`, which are made where they are absent or of another state.

    A copy is the encoded images of a file one after another, and beside it where each ends. What was copied when a
    process was interrupted is there for the next. Raises ValueError, OSError.
    """
    role = f"parquet {sorted(chosen.items())}"
    copies = [cache / "parquet" / _digest(file, role) for file in files]

    def missing() -> list[tuple[str, Path]]:
        return [(file, copy) for file, copy in zip(files, copies, strict=True) if _ends(file, copy) is None]

    if missing():  # else nothing needs to be written
        with alone(cache, "parquet") as held:
            if held:
                for left in (cache / "parquet").glob(".*"):  # by a process that was killed
                    left.unlink()
            still = missing()  # another process may have copied meanwhile
            if still:
                _copy_all(still, chosen, cache)
    index = open_index(files, _state, lambda: _entries(files, copies, chosen), kind=role, cache=cache)
    return CopySource(index, [f"{copy}.images" for copy in copies])


def _digest(file: str, role: str) -> str:
    return hashlib.sha256(f"{role}\0{os.path.abspath(file)}".encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _state(file: str) -> list[int]:
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns]


def _ends(file: str, copy: Path) -> np.ndarray | None:
    """Return where the images end in a copy, or None where there is none of this state of the file."""
    try:
        with np.load(f"{copy}.npz") as found:
            state, ends = found["state"].tolist(), found["ends"]
        size = int(ends[-1]) if len(ends) else 0
        return ends if state == _state(file) and os.path.getsize(f"{copy}.images") == size else None
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _copy_all(missing: Sequence[tuple[str, Path]], chosen: Mapping[str, str], cache: Path) -> None:
    from tqdm import tqdm

    found = columns(missing[0][0], chosen)
    sizes = [_encoded_size(file, found.encoded) for file, _ in missing]
    free = shutil.disk_usage(cache).free
    if sum(sizes) > free:
        raise ValueError(
            f"data.cache={cache} has {free / 1e9:.1f} GB free, and the copy of {missing[0][0]} and "
            f"{len(missing) - 1} more takes {sum(sizes) / 1e9:.1f} GB: choose another place, or data.copy=false, "
            "which is slow in random order"
        )
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="copying out of parquet, once", disable=None) as bar:
        for (file, copy), size in zip(missing, sizes, strict=True):
            _copy(file, copy, found)
            bar.update(size)


def _encoded_size(file: str, column: str) -> int:
    with opened(file) as reader:
        groups = [reader.metadata.row_group(number) for number in range(reader.metadata.num_row_groups)]
    chunks = (group.column(place) for group in groups for place in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _copy(file: str, copy: Path, found: Columns) -> None:
    """Copy a file's images. The list of their ends is written last: without it there is no copy."""
    state = _state(file)
    lengths, held = array("q"), 0

    def write(stream: IO[bytes]) -> None:
        nonlocal held
        for piece in values(file, found.encoded, rows=100):
            held += len(piece) - piece.null_count
            for value in piece:
                data = value.as_buffer() if value.is_valid else b""  # no image: so it will be reported
                stream.write(data)
                lengths.append(len(data))

    copy.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{copy}.npz").unlink(missing_ok=True)
    _replace(f"{copy}.images", write)
    if lengths and not held:
        raise ValueError(
            f"{file}: the column {found.encoded} is empty, the images are elsewhere: write the data set with its "
            "images embedded, as datasets' push_to_hub does"
        )
    ends = np.cumsum(np.frombuffer(lengths, dtype=np.int64))
    _replace(f"{copy}.npz", lambda stream: np.savez(stream, state=np.array(state), ends=ends))


def _replace(name: str, write: Any) -> None:
    # Not by tempfile, whose files are for their owner alone: a cache may serve several people.
    unfinished = Path(name).with_name(f".{os.path.basename(name)}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, name)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _entries(
    files: Sequence[str], copies: Sequence[Path], chosen: Mapping[str, str]
) -> tuple[tuple[str, ...], Iterator[Entry]]:
    found = columns(files[0], chosen)
    labels, classes = read_labels(files, found.label, found.classes)

    def entries() -> Iterator[Entry]:
        rows = iter(labels)
        for number, (file, copy) in enumerate(zip(files, copies, strict=True)):
            ends = _ends(file, copy)
            assert ends is not None
            paths = (value.as_py() for piece in values(file, found.path) for value in piece) if found.path else iter(())
            start = 0
            for row, end in enumerate(ends.tolist()):
                path = next(paths, None)
                yield Entry(number, start, end - start, int(next(rows)), f"row {row}" + (f", {path}" if path else ""))
                start = end

    return classes, entries()
