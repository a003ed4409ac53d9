"""WebDataset's layout: what lies in a shard, which class an image is of, and how the classes are called."""

import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from effnet_train.data.remote import WHOLE_ONLY, at_once, file_system, is_remote, listed, retried
from effnet_train.data.sources import IMAGE_SUFFIXES
from effnet_train.data.tar_index import Entry, members

_BRACES = re.compile(r"\{([^{}]*)\}")
_INDEX_SUFFIX = ".index.json"
_INDEX_VERSION = 1
_LABEL_KEYS = ("label", "cls")


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


def find(root: str, pattern: str) -> list[str]:
    """Return the shards that a pattern below `root`, a folder or a URL, means. Raises FileNotFoundError."""
    return [path for name in expand(pattern) for path in _matching(root, name)]


def _matching(root: str, name: str) -> list[str]:
    path = f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, name)
    if not glob.has_magic(name):
        if is_remote(root) or os.path.isfile(path):
            return [path]
    elif found := listed(path) if is_remote(root) else sorted(glob.glob(path)):
        return found
    hint = ", with braces (train-{0000..0146}.tar) where a server does not list its files" if is_remote(root) else ""
    raise FileNotFoundError(f"data.root={root}: there is no {name}: set data.root, data.train and data.val{hint}")


def labelled(
    sizes: Mapping[str, int | None], local: Callable[[str], str] | None = None, *, needed: bool = True
) -> tuple[list[str], list[Entry]]:
    """Return class names, which are numbers, and the images of shards, given with their sizes in bytes.

    Where labels are not `needed`, an image without one is of class 0.

    What `prepare` writes has an index beside each shard. Other shards are read for it, and where they are remote that
    is all of them: `local` then gives the name of a whole copy. Raises ValueError, RemoteError.
    """
    from tqdm import tqdm

    archives = list(sizes)
    one = partial(_one_shard, local=local, needed=needed)
    numbered = [(number, archive, size) for number, (archive, size) in enumerate(sizes.items())]
    shards = at_once(one, numbered) if is_remote(archives[0]) else map(one, numbered)
    found = list(itertools.chain.from_iterable(tqdm(shards, total=len(archives), unit="shard", disable=None)))
    if not found:
        raise ValueError(
            f"{archives[0]} and the others hold no pairs of KEY.jpg and KEY.cls: set data.train and data.val to others"
        )
    most = 1 + max(entry.label for entry in found)
    return [str(label) for label in range(most)], found


def _one_shard(numbered: tuple[int, str, int | None], local: Callable[[str], str] | None, needed: bool) -> list[Entry]:
    number, archive, size = numbered
    known = _indexed(archive, number, size)
    if known is not None:
        return known
    path = local(archive) if local else archive
    return retried(archive, partial(_scan, number, archive, path, needed))


def _scan(number: int, archive: str, path: str, needed: bool) -> list[Entry]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, tuple[str, bytes]] = {}
    with opened(path) as file:
        if is_remote(path) and not _gives_parts(file):
            raise ValueError(f"{archive}: {WHOLE_ONLY}")
        for name, offset, length in list(members(file, archive)):
            key, suffix = split_name(name)
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                if key in images:
                    raise ValueError(f"{archive}: {images[key][0]} and {name} are two images of one sample")
                images[key] = (name, offset, length)
            elif suffix == "cls" or (suffix == "json" and key not in labels):
                file.seek(offset)
                labels[key] = (name, file.read(length))
    lacking = sorted(images.keys() - labels.keys())
    if lacking and needed:
        raise ValueError(
            f"{archive}: {len(lacking)} images have no .cls beside them, the first {lacking[0]}: write the shard again "
            "with KEY.cls, a class number, for each KEY.jpg"
        )
    alone = sorted(key for key, (name, _) in labels.items() if key not in images and name.endswith(".cls"))
    if alone:
        raise ValueError(
            f"{archive}: {len(alone)} labels have no image beside them ({', '.join(IMAGE_SUFFIXES)}), the first "
            f"{labels[alone[0]][0]}"
        )
    return [
        Entry(number, offset, length, _label(*labels[key], archive) if needed else 0, name)
        for key, (name, offset, length) in images.items()
    ]


def split_name(name: str) -> tuple[str, str]:
    """Return the key and the suffix of a file in a shard: the suffix begins at the first dot behind the folders."""
    suffix = name.rpartition("/")[2].partition(".")[2]
    return name.removesuffix(f".{suffix}"), suffix


def _label(name: str, data: bytes, archive: str) -> int:
    try:
        value = json.loads(data) if name.endswith(".json") else int(data)
        if isinstance(value, dict):
            value = next(value[key] for key in _LABEL_KEYS if key in value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(value)
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{archive}:{name} holds no class number ({data[:20]!r})") from error
    return value


def index_name(archive: str) -> str:
    """Return the name of the index that lies beside a shard."""
    return archive.removesuffix(".tar") + _INDEX_SUFFIX


def index_bytes(entries: Sequence[Entry], size: int) -> bytes:
    """Return the contents of an index: the images of a shard of `size` bytes."""
    images = [[entry.offset, entry.length, entry.label, entry.name] for entry in entries]
    described = {"version": _INDEX_VERSION, "bytes": size, "images": images}
    return json.dumps(described, separators=(",", ":")).encode() + b"\n"


def _indexed(archive: str, number: int, size: int | None) -> list[Entry] | None:
    """Return a shard's images by the index beside it, or None where there is none of this very shard."""
    data = _read(index_name(archive))
    if data is None:
        return None
    try:
        found = json.loads(data)
        entries = [Entry(number, *image) for image in found["images"]]
        known = found["version"] == _INDEX_VERSION and found["bytes"] == size and all(map(_is_plain, entries))
    except (ValueError, KeyError, TypeError):  # of another program, or damaged: the shard itself will tell
        return None
    return entries if known else None


def _is_plain(entry: Entry) -> bool:
    numbers = (entry.offset, entry.length, entry.label)
    return all(isinstance(value, int) and value >= 0 for value in numbers) and isinstance(entry.name, str)


def _gives_parts(file: Any) -> bool:
    try:
        file.seek(1)
        file.seek(0)
    except ValueError:
        return False
    return True


def opened(name: str) -> Any:
    """Open a file to read, here or elsewhere."""
    return retried(name, lambda: file_system(name).open(name, "rb")) if is_remote(name) else open(name, "rb")


def _read(name: str) -> bytes | None:
    """Return what a small file holds, or None where it is absent."""
    try:
        if is_remote(name):
            data: bytes = retried(name, lambda: file_system(name).cat_file(name))
            return data
        with open(name, "rb") as file:
            return file.read()
    except (FileNotFoundError, PermissionError) as error:
        # A store that may not be listed denies what is absent.
        if isinstance(error, PermissionError) and not is_remote(name):
            raise
        return None


def class_names(root: str, count: int) -> tuple[str, ...]:
    """Return the names in `root`'s classes.txt or classes.json, else numbers below `count`.

    The text has a name a line; the JSON is a list of names, or gives a name for each number or a number for each name.
    Raises ValueError for too few.
    """
    for file, names_in in (("classes.txt", _lines), ("classes.json", _named)):
        path = f"{root.rstrip('/')}/{file}"
        data = _read(path)
        if data is None:
            continue
        try:
            names = names_in(data.decode())
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} holds no names of classes, from 0 on without a gap ({error}): mend or remove it"
            ) from error
        if len(names) < count:
            raise ValueError(
                f"{path} names {len(names)} classes, the labels go up to {count - 1}: add the names, or remove it"
            )
        return names
    return tuple(map(str, range(count)))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _named(text: str) -> tuple[str, ...]:
    found = json.loads(text)
    if isinstance(found, dict):
        pairs = [(value, key) if isinstance(value, int) else (int(key), value) for key, value in found.items()]
        if sorted(number for number, _ in pairs) != list(range(len(pairs))):
            raise ValueError("numbers are missing, or there twice")
        found = [name for _, name in sorted(pairs)]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise TypeError("neither a list of names nor names and numbers")
    return tuple(found)
