"""An index of what lies where in tar archives: made once, kept on disk, and shared by all processes that read."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effnet_train.data.caches import alone

_VERSION = 1
_ENTRY = np.dtype([("offset", "<i8"), ("length", "<i8"), ("archive", "<i4"), ("label", "<i4")])


class Entry(NamedTuple):
    """An image in an archive: which archive, where, how long, and what it is called; `label` is its class number."""

    archive: int
    offset: int
    length: int
    label: int
    name: str


def default_cache() -> Path:
    """Return where indices are kept unless told otherwise, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effnet_train" / "indices"


@dataclass
class TarIndex:
    """An index in `folder`: its arrays are mapped, not read, and another process maps the same memory."""

    folder: Path
    archives: tuple[str, ...]
    classes: tuple[str, ...]
    _arrays: tuple[np.ndarray, np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def _mapped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._arrays is None:
            self._arrays = _load(self.folder)
        return self._arrays

    def __len__(self) -> int:
        return len(self._mapped()[0])

    def __getitem__(self, index: int) -> Entry:
        entries, ends, letters = self._mapped()
        entry = entries[index]
        start = int(ends[index - 1]) if index else 0
        name = os.fsdecode(letters[start : int(ends[index])].tobytes())
        return Entry(int(entry["archive"]), int(entry["offset"]), int(entry["length"]), int(entry["label"]), name)


def _load(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    entries, ends, letters = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("entries", "ends", "letters"))
    return entries, ends, letters


def open_index(
    archives: Sequence[str],
    state: Callable[[str], Any],
    make: Callable[[], tuple[Sequence[str], Iterable[Entry]]],
    *,
    kind: str,
    cache: Path,
) -> TarIndex:
    """Return the index of `archives` from the cache, or make it.

    `state` gives what tells an archive from a changed one (size and time); `make` returns class names and entries;
    `kind` says how entries were made of the archives. Of several processes one makes it and the others wait. Raises
    OSError where the cache cannot be written.
    """
    description = {"version": _VERSION, "kind": kind, "archives": {name: state(name) for name in archives}}
    description = json.loads(json.dumps(description))  # as it comes out of the file
    digest = hashlib.sha256("\0".join((kind, *archives)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    folder = cache / digest
    found = _made(folder, description)
    if found is None:
        with alone(cache, digest) as held:
            if held:
                for left in cache.glob(f".{digest}-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                found = _made(folder, description)  # by another process, meanwhile
            if found is None:
                print(f"indexing {len(archives)} archives, once: {archives[0]} ...", file=sys.stderr, flush=True)
                classes, entries = make()
                found = {**description, "classes": list(classes)}
                arrays = _arrays(entries)
                try:
                    _write(folder, found, arrays)
                except OSError as error:
                    raise OSError(
                        f"cannot write the index to {cache} ({error.strerror or error}): choose another place with "
                        "data.cache=..."
                    ) from error
    return TarIndex(folder, tuple(archives), tuple(found["classes"]))


def _made(folder: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an index in the folder says of itself, or None where there is none of this description."""
    try:
        found = json.loads((folder / "index.json").read_text())
        _load(folder)
    except (OSError, ValueError, EOFError):
        return None
    same = isinstance(found, dict) and {key: found.get(key) for key in description} == description
    return found if same else None


def _arrays(entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    numbers, lengths, letters = array("q"), array("q"), bytearray()
    for entry in entries:
        numbers.extend((entry.offset, entry.length, entry.archive, entry.label))
        name = os.fsencode(entry.name)
        lengths.append(len(name))
        letters += name
    columns = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4)
    table = np.empty(len(columns), dtype=_ENTRY)
    for column, key in enumerate(("offset", "length", "archive", "label")):
        table[key] = columns[:, column]
    ends = np.cumsum(np.frombuffer(lengths, dtype=np.int64))
    return {"entries": table, "ends": ends, "letters": np.frombuffer(letters, dtype=np.uint8)}


def _write(folder: Path, found: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an index beside and rename it: it is whole, or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose folders are for their owner alone: a cache may serve several people.
    unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    old = unfinished.with_name(f"{unfinished.name}-old")
    try:
        unfinished.mkdir()
        for name, values in arrays.items():
            np.save(unfinished / f"{name}.npy", values)
        (unfinished / "index.json").write_text(json.dumps(found))
        with suppress(FileNotFoundError):  # of a former state of the archives; who has it mapped keeps it
            os.replace(folder, old)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if _made(folder, dict(found)) is None:  # else another process was quicker, with the same
                raise
    finally:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)


def members(file: Any, name: str, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset in the file and length of each regular file in the tar that begins at `start`.

    Only headers are read, and none is kept. Raises ValueError naming the archive where it is no tar, or ends too soon.
    """
    try:
        file.seek(start)
        with tarfile.TarFile(fileobj=_From(file, start)) as tar:  # type: ignore[arg-type]
            size = _size(file)
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                offset = start + member.offset_data
                if offset + member.size > size:
                    raise tarfile.ReadError(f"{member.name} goes on behind its end")
                yield member.name, offset, member.size
            # Behind the first file, tarfile takes a header that is damaged, or cut off, for the end.
            file.seek(start + tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"at {start + tar.offset:,} stands neither a file nor the mark of its end")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{name} is no tar archive, or a truncated one ({error}): fetch it again") from error


def _size(file: Any) -> int:
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return int(size)


class _From:
    """A file as if it began at `start`: a tar within a tar."""

    def __init__(self, file: Any, start: int) -> None:
        self._file, self._start = file, start

    def read(self, count: int = -1) -> bytes:
        data: bytes = self._file.read(count)
        return data

    def tell(self) -> int:
        return int(self._file.tell()) - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset += self._start
        return int(self._file.seek(offset, whence)) - self._start
