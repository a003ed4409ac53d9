"""Images in tar archives: ImageNet's own tars of tars, and shards in WebDataset's layout, here or elsewhere."""

import glob
import io
import itertools
import json
import os
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from effnet_train.data.backends import BACKENDS
from effnet_train.data.datasets import Data, assemble, check_counts
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import IMAGE_SUFFIXES
from effnet_train.data.tar_index import Entry, TarIndex, default_cache, members, open_index

_ATTEMPTS = 6
_FIRST_WAIT_S = 0.25
_BRACES = re.compile(r"\{([^{}]*)\}")
_SYNSET = re.compile(r"n\d{8}")


class RemoteError(ValueError):
    """A remote read that failed again and again: not a corrupt image, which `data.on_error=skip` would pass over."""


class TarSource:
    """The images of an index: each is one read at its place in its archive, a local file or one of fsspec's.

    What is open belongs to a process; a worker that gets the source opens archives anew.
    """

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        self.classes = index.classes
        self._open: dict[int, int] = {}  # file descriptors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the image's bytes and its class number. Raises OSError, or RemoteError after all attempts."""
        entry = self.index[index]
        archive = self.index.archives[entry.archive]
        if is_remote(archive):
            data = retried(
                archive, lambda: _remote(archive).cat_file(archive, entry.offset, entry.offset + entry.length)
            )
        else:
            data = os.pread(self._file(entry.archive), entry.length, entry.offset)
        if len(data) < entry.length:
            raise OSError(f"{archive} ends within {entry.name}: it has become shorter")
        return data, entry.label

    def name(self, index: int) -> str:
        """Return the archive and the name in it."""
        entry = self.index[index]
        return f"{self.index.archives[entry.archive]}:{entry.name}"

    def _file(self, archive: int) -> int:
        if archive not in self._open:
            self._open[archive] = os.open(self.index.archives[archive], os.O_RDONLY)
        return self._open[archive]

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def is_remote(name: str) -> bool:
    """Say whether a name is a URL (http://, s3://, ...) instead of a path."""
    return "://" in name


def _remote(url: str) -> Any:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        raise ImportError(
            f"{url.partition('://')[0]}:// needs a package more ({error}): pip install 'effnet-train[remote]'"
        ) from error


def retried(what: str, read: Callable[[], Any]) -> Any:
    """Return what `read` returns, trying again after ever longer waits where it fails.

    Raises RemoteError naming the last reason after all attempts; FileNotFoundError and PermissionError at once.
    """
    wait = _FIRST_WAIT_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:  # each file system has errors of its own
            if _is_final(error):
                raise
            if attempt == _ATTEMPTS:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise RemoteError(f"cannot read {what} after {_ATTEMPTS} attempts ({reason})") from error
        # Many processes that failed together should not come back together.
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait *= 2


def _is_final(error: Exception) -> bool:
    """Say whether another attempt would find the same."""
    if isinstance(error, FileNotFoundError):
        # fsspec's HTTP says so of whatever fails; what it was stands behind.
        status = getattr(error.__cause__, "status", None)
        return status in (None, 404, 410)
    return isinstance(error, PermissionError | ImportError | ValueError)


def imagenet_tars(
    root: str,
    *,
    preprocess: Preprocess,
    train: str = "ILSVRC2012_img_train.tar",
    val: str = "ILSVRC2012_img_val.tar",
    devkit: str = "ILSVRC2012_devkit_t12.tar.gz",
    cache: str | None = None,
    minival: int = 0,
    on_error: str = "raise",
    backend: str = BACKENDS[0],
    expected: Mapping[str, int] | None = None,
) -> Data:
    """Read ImageNet (ILSVRC 2012) from the archives as they are distributed, unpacking nothing.

    The training archive holds one tar per synset; the labels of the validation images come from the devkit, whose
    class numbers are mapped to sorted synsets. Raises FileNotFoundError, ValueError.
    """
    paths = [os.path.join(root, name) for name in (train, val, devkit)]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"data.root={root}: {path} does not exist: put ImageNet's archives there")
    folder = Path(cache) if cache else default_cache()
    training = TarSource(
        open_index(paths[:1], _local_state, lambda: _tar_of_tars(paths[0]), kind="tar of tars", cache=folder)
    )
    # The devkit counts too: its labels are in the index.
    validation = TarSource(
        open_index(paths[1:], _local_state, lambda: _labelled_by_devkit(*paths[1:]), kind="imagenet val", cache=folder)
    )
    check_counts(root, [training, validation], expected)
    return assemble(training, validation, preprocess=preprocess, minival=minival, on_error=on_error, backend=backend)


def _local_state(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _tar_of_tars(path: str) -> tuple[list[str], Iterator[Entry]]:
    with open(path, "rb") as file:
        inner = sorted((Path(name).stem, offset) for name, offset, _ in members(file, path) if name.endswith(".tar"))
    if not inner:
        raise ValueError(f"{path} holds no .tar for each class: it should be ImageNet's training archive")

    def entries() -> Iterator[Entry]:
        from tqdm import tqdm

        with open(path, "rb") as file:
            for label, (synset, start) in enumerate(tqdm(inner, unit="class", disable=None)):
                for name, offset, length in sorted(members(file, f"{path}:{synset}.tar", start)):
                    yield Entry(0, offset, length, label, f"{synset}.tar/{name}")

    return [synset for synset, _ in inner], entries()


def _labelled_by_devkit(path: str, devkit: str) -> tuple[list[str], Iterator[Entry]]:
    synsets = validation_synsets(devkit)
    classes = sorted(set(synsets))
    number = {synset: label for label, synset in enumerate(classes)}
    with open(path, "rb") as file:
        found = sorted(members(file, path))
    if len(found) != len(synsets):
        raise ValueError(f"{path} holds {len(found)} images, {devkit} labels of {len(synsets)}: fetch both again")
    return classes, (
        Entry(0, offset, length, number[synset], name)
        for (name, offset, length), synset in zip(found, synsets, strict=True)
    )


def validation_synsets(devkit: str) -> list[str]:
    """Return the synset of each validation image, in the order of their names, from ImageNet's devkit (.tar.gz).

    Raises ValueError where the devkit is another one, ImportError where SciPy, which reads MATLAB files, is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{devkit} holds MATLAB files: pip install 'effnet-train[datasets]'") from error
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                    file = tar.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
        meta = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        synset = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
        numbers = contents["ILSVRC2012_validation_ground_truth.txt"].split()
        return [synset[int(number)] for number in numbers]
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{devkit} is not ImageNet's devkit of 2012, tasks 1 and 2 ({error!r})") from error


def shards(
    root: str,
    *,
    train: str,
    val: str,
    preprocess: Preprocess,
    cache: str | None = None,
    minival: int = 0,
    on_error: str = "raise",
    backend: str = BACKENDS[0],
    expected: Mapping[str, int] | None = None,
) -> Data:
    """Read WebDataset's layout: tar archives of `KEY.jpg` (.png, .webp, ...) and `KEY.cls`, a class number as text.

    `train` and `val` are names below `root`, a folder or a URL, with braces (`train-{0000..0146}.tar`) or, in a folder,
    wildcards. Class names come from `classes.txt` there, a line each; without it they are the numbers. Raises
    FileNotFoundError, ValueError, RemoteError.
    """
    folder = Path(cache) if cache else default_cache()
    sources = [_shards(root, pattern, folder) for pattern in (train, val)]
    names = class_names(root, max(len(source.classes) for source in sources))
    for source in sources:
        source.classes = names
    check_counts(root, sources, expected)
    return assemble(*sources, preprocess=preprocess, minival=minival, on_error=on_error, backend=backend)


def _shards(root: str, pattern: str, cache: Path) -> TarSource:
    archives = [path for text in expand(pattern) for path in _found(root, text)]
    state = _remote_state if is_remote(root) else _local_state
    return TarSource(open_index(archives, state, lambda: _labelled_beside(archives), kind="webdataset", cache=cache))


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern with braces means: `{0000..0146}` counts, `{a,b}` lists."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, dots, last = found[1].partition("..")
    if dots:
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"{pattern}: {{{found[1]}}} must be two whole numbers, as {{0000..0146}}")
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return list(
        itertools.chain.from_iterable(
            expand(pattern[: found.start()] + text + pattern[found.end() :]) for text in choices
        )
    )


def _found(root: str, name: str) -> list[str]:
    if is_remote(root):
        return [f"{root.rstrip('/')}/{name}"]
    path = os.path.join(root, name)
    found = sorted(glob.glob(path)) if glob.has_magic(name) else [path]
    if not found or not os.path.isfile(found[0]):
        raise FileNotFoundError(f"data.root={root}: there is no {name}: set data.root, data.train and data.val")
    return found


def _remote_state(url: str) -> Any:
    info = retried(url, lambda: _remote(url).info(url))
    return [info.get("size"), str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")]


def _opened(archive: str) -> Any:
    return retried(archive, lambda: _remote(archive).open(archive, "rb")) if is_remote(archive) else open(archive, "rb")


def _labelled_beside(archives: Sequence[str]) -> tuple[list[str], list[Entry]]:
    found: list[Entry] = []
    for number, archive in enumerate(archives):
        found += retried(archive, partial(_one_shard, number, archive))
    if not found:
        raise ValueError(f"{archives[0]} and the others hold no pairs of KEY.jpg and KEY.cls")
    most = 1 + max(entry.label for entry in found)
    return [str(label) for label in range(most)], found


def _one_shard(number: int, archive: str) -> list[Entry]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    with _opened(archive) as file:
        listed = list(members(file, archive))
        for name, offset, length in listed:
            key, _, suffix = name.rpartition("/")[2].partition(".")
            key = name[: len(name) - len(suffix) - 1] if suffix else name
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                images[key] = (name, offset, length)
            elif suffix in ("cls", "json"):
                file.seek(offset)
                labels[key] = _label(file.read(length), suffix, f"{archive}:{name}")
    lacking = sorted(images.keys() - labels.keys())
    if lacking:
        raise ValueError(f"{archive}: {len(lacking)} images have no .cls beside them, the first {lacking[0]}")
    return [Entry(number, offset, length, labels[key], name) for key, (name, offset, length) in images.items()]


def _label(data: bytes, suffix: str, name: str) -> int:
    try:
        value = json.loads(data)["label"] if suffix == "json" else int(data)
        if not isinstance(value, int) or value < 0:
            raise ValueError(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds no class number ({data[:20]!r})") from error
    return value


def class_names(root: str, count: int) -> tuple[str, ...]:
    """Return the names in `root`'s classes.txt, or numbers below `count` without one. Raises ValueError for too few."""
    path = f"{root.rstrip('/')}/classes.txt"
    try:
        with _opened(path) as file:
            names = tuple(line.strip() for line in file.read().decode().splitlines() if line.strip())
    except FileNotFoundError:
        return tuple(map(str, range(count)))
    if len(names) < count:
        raise ValueError(f"{path} names {len(names)} classes, the labels go up to {count - 1}")
    return names
