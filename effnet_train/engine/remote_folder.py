"""A run's folder elsewhere (s3://, gs://, ... through fsspec), for machines whose own disks do not last."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from effnet_train.data.remote import RemoteError, file_system, is_remote, retried

_EVENTS = "*/events.out.tfevents.*"  # TensorBoard's
# Where a file needs a folder to lie in. Of stores the same call would make a bucket.
_WITH_FOLDERS = ("file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "arrow_hdfs")


class RemoteFolder:
    """The folder `url`, which is given what lies in the folder `local`; names are relative to either.

    Raises ValueError, or ImportError naming the extra.
    """

    def __init__(self, local: Path, url: str) -> None:
        if not is_remote(url):
            raise ValueError(f"checkpoint.remote={url} is no URL: give s3://bucket/folder, gs://..., or null for none")
        self.local = local
        self.url = f"{url.rstrip('/')}/{local.name}"
        try:
            self._system: Any = file_system(self.url)
        except ValueError as error:
            raise ValueError(f"checkpoint.remote={url}: {error}") from error
        self._put: dict[str, tuple[int, int]] = {}  # size and time of what was put
        self._made: set[str] = set()  # folders; once: a mount that has gone must not become a folder here

    def names(self) -> list[str]:
        """Return what files there are, but hidden ones; none where there is no such folder."""
        self._system.invalidate_cache()  # another machine may have written there
        root = self._system._strip_protocol(self.url).rstrip("/") + "/"
        with named(self.url):
            found = retried(self.url, lambda: self._system.find(root))
        names = (name.removeprefix(root) for name in found if name.startswith(root))
        return sorted(name for name in names if ".." not in name.split("/") and not name.startswith("."))

    def put(self, names: Sequence[str]) -> None:
        """Write files there, in this order, that are not there as they are now. Stores show an object when it is whole.

        Raises OSError, or RemoteError after some attempts.
        """
        for name in names:
            try:
                status = (self.local / name).stat()
            except FileNotFoundError:  # its writer has replaced or removed it
                continue
            state = status.st_size, status.st_mtime_ns
            if self._put.get(name) != state:
                source, target = str(self.local / name), self._target(name)
                retried(target, partial(self._system.put_file, source, target), doing="write")
                self._put[name] = state

    def _target(self, name: str) -> str:
        """Return where to write a file, having made the folder for it."""
        target = f"{self.url}/{name}"
        parent = target.rpartition("/")[0]
        if parent not in self._made and self.url.partition("://")[0] in _WITH_FOLDERS:
            with named(self.url):
                retried(parent, lambda: self._system.makedirs(parent, exist_ok=True), doing="make")
            self._made.add(parent)
        return target

    def read(self, name: str, *, patient: bool = True) -> bytes | None:
        """Return what a small file there holds, None where there is none; one attempt only where not `patient`."""
        source = f"{self.url}/{name}"
        self._system.invalidate_cache()

        def read() -> bytes:
            data: bytes = self._system.cat_file(source)
            return data

        with named(self.url):
            try:
                return retried(source, read) if patient else read()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes, *, patient: bool = True) -> None:
        """Write a small file there. Raises FileNotFoundError, with a remedy, where there is no such place."""
        target = self._target(name)
        write = partial(self._system.pipe_file, target, data)
        with named(self.url):
            if patient:
                retried(target, write, doing="write")
            else:
                write()

    def get(self, name: str, folder: Path) -> None:
        """Fetch a file into another folder. Raises OSError, or RemoteError after some attempts."""
        path, source = folder / name, f"{self.url}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        retried(source, lambda: self._system.get_file(source, str(path)))
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def remove(self, name: str) -> None:
        """Remove a file there."""
        retried(f"{self.url}/{name}", lambda: self._system.rm_file(f"{self.url}/{name}"), doing="remove")
        self._put.pop(name, None)

    def beside(self) -> list[str]:
        """Return the names of what lies in the local folder beside the checkpoints: configuration, faults, logs."""
        return sorted(str(path.relative_to(self.local)) for path in beside(self.local))


def beside(folder: Path) -> list[Path]:
    """Return the files of a run's folder that are no checkpoints, nor unfinished."""
    files = [path for pattern in ("*", _EVENTS) for path in folder.glob(pattern) if path.is_file()]
    return [path for path in files if not path.name.startswith(".") and path.suffix not in (".pt", ".tmp")]


@contextmanager
def named(url: str) -> Iterator[None]:
    """Have a place that is not there, or not to be reached, called by its key, with a remedy."""
    try:
        yield
    except RemoteError as error:
        raise RemoteError(
            f"checkpoint.remote={url}: {error}: try again when it can be reached, or give null for none"
        ) from error
    except FileNotFoundError as error:  # stores need no folders, but buckets
        raise FileNotFoundError(
            f"checkpoint.remote={url}: there is no such place ({error}); give a bucket that is there, or null for none"
        ) from error
