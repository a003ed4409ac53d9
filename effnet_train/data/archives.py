"""Images in tar archives: ImageNet's own tars of tars, and shards in WebDataset's layout, here or elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from effnet_train.data import remote
from effnet_train.data.backends import BACKENDS, check_backend
from effnet_train.data.datasets import Common, Data, assemble, check_on_error
from effnet_train.data.ilsvrc import validation_synsets
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.remote import Copies, is_remote
from effnet_train.data.shard_layout import class_names, find, labelled
from effnet_train.data.sources import Source, find_files
from effnet_train.data.tar_index import Entry, TarIndex, default_cache, members, open_index

_MOST_OPEN = 500  # files of a process, which by default may have 1,024


class TarSource:
    """The images of an index: each is one read at its place in its archive, a local file or one of fsspec's.

    With `copies`, a remote archive is read from its local copy. What is open belongs to a process; a worker that gets
    the source opens archives anew.
    """

    def __init__(self, index: TarIndex, copies: Copies | None = None) -> None:
        self.index, self.copies = index, copies
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
        if is_remote(archive) and self.copies is None:
            data = remote.read_part(archive, entry.offset, entry.length)
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
            opened = os.open(self._path(archive), os.O_RDONLY)
            if len(self._open) == _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[archive] = opened
        return self._open[archive]

    def _path(self, archive: int) -> str:
        name = self.index.archives[archive]
        return self.copies.path(name) if self.copies else name

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def imagenet_tars(
    root: str,
    *,
    train: str = "ILSVRC2012_img_train.tar",
    val: str = "ILSVRC2012_img_val.tar",
    val_labels: str = "ILSVRC2012_devkit_t12.tar.gz",
    cache: str | None = None,
    **common: Unpack[Common],
) -> Data:
    """Read ImageNet (ILSVRC 2012) from the archives as they are distributed, unpacking nothing.

    The training archive holds one tar per synset; the labels of the validation images come from the devkit or a text
    file, see `ilsvrc.validation_synsets`. Raises FileNotFoundError, ValueError.
    """
    paths = [os.path.join(root, name) for name in (train, val, val_labels)]
    for path in paths:
        if not os.path.isfile(path):
            hint = "" if path != paths[2] else ", or set data.val_labels= to a text file of their labels"
            raise FileNotFoundError(f"data.root={root}: {path} does not exist: put ImageNet's archives there{hint}")
    folder = Path(cache) if cache else default_cache()
    training = TarSource(
        open_index(paths[:1], _local_state, lambda: _tar_of_tars(paths[0]), kind="tar of tars", cache=folder)
    )
    # What holds the labels counts too: they are in the index.
    validation = TarSource(
        open_index(paths[1:], _local_state, lambda: _labelled_in_order(*paths[1:]), kind="imagenet val", cache=folder)
    )
    return assemble(root, training, validation, **common)


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


def _labelled_in_order(path: str, labels: str) -> tuple[list[str], Iterator[Entry]]:
    synsets = validation_synsets(labels)
    classes = sorted(set(synsets))
    number = {synset: label for label, synset in enumerate(classes)}
    with open(path, "rb") as file:
        found = sorted(members(file, path))
    if len(found) != len(synsets):
        raise ValueError(f"{path} holds {len(found)} images, {labels} labels of {len(synsets)}: fetch both again")
    return classes, (
        Entry(0, offset, length, number[synset], name)
        for (name, offset, length), synset in zip(found, synsets, strict=True)
    )


def shards(
    root: str,
    *,
    train: str,
    val: str,
    cache: str | None = None,
    shard_cache: str | None = None,
    **common: Unpack[Common],
) -> Data:
    """Read WebDataset's layout: tar archives of `KEY.jpg` (.png, .webp, ...) and `KEY.cls`, a class number as text.

    `train` and `val` are names below `root`, a folder or a URL, with braces (`train-{0000..0146}.tar`) or wildcards.
    Class names come from `classes.txt` or `classes.json` there, else they are the numbers. With `shard_cache`, a folder
    of this machine, shards at a URL are copied there, whole, each when it is first read. Raises FileNotFoundError,
    ValueError, RemoteError.
    """
    if shard_cache is not None and not is_remote(root):
        raise ValueError(
            f"data.shard_cache={shard_cache} is for shards at a URL, and data.root={root} is a folder: set null"
        )
    folder = Path(cache) if cache else default_cache()
    sources = [_shards(root, pattern, folder, shard_cache) for pattern in (train, val)]
    names = class_names(root, max(len(source.classes) for source in sources))
    for source in sources:
        source.classes = names
    return assemble(root, *sources, **common)


def unlabelled(
    root: str,
    *,
    preprocess: Preprocess,
    shards: str | None = None,
    cache: str | None = None,
    shard_cache: str | None = None,
    on_error: str = "raise",
    backend: str = BACKENDS[0],
) -> Data:
    """Read images of which nobody says what they are: all below the folder `root`, or those of tars there.

    `shards` names these tars, as `train` does those of labelled ones. Both splits are all images, of no class.
    Raises FileNotFoundError, ValueError.
    """
    check_on_error(on_error)
    check_backend(backend)
    source: Source
    if shards is None:
        if not os.path.isdir(root):
            raise FileNotFoundError(
                f"data.root={root} does not exist: set it to a folder of images, or of data.shards="
            )
        source = find_files([root])
    else:
        source = _shards(root, shards, Path(cache) if cache else default_cache(), shard_cache, labels=False)
        source.classes = ()
    return Data(source, source, None, preprocess, on_error, backend)


def _shards(root: str, pattern: str, cache: Path, shard_cache: str | None, *, labels: bool = True) -> TarSource:
    archives = find(root, pattern)
    try:
        found = remote.at_once(remote.state, archives) if is_remote(root) else map(_local_state, archives)
        states: dict[str, list[Any]] = dict(zip(archives, found, strict=True))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.root={root}: there is no {error}: set data.root, data.train and data.val"
        ) from error
    sizes = {archive: state[0] for archive, state in states.items()}
    copies = Copies(Path(shard_cache), states) if shard_cache and is_remote(root) else None
    index = open_index(
        archives,
        states.__getitem__,
        lambda: labelled(sizes, copies.path if copies else None, needed=labels),
        kind="webdataset" if labels else "images",
        cache=cache,
    )
    return TarSource(index, copies)
