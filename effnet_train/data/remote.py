"""Files elsewhere (http://, s3://, ...) through fsspec: read with patience, or copied here whole, once a machine."""

import errno
import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

WHOLE_ONLY = "its server gives no parts of files: set data.shard_cache=, a folder for whole copies"
_ATTEMPTS = 6
_FIRST_WAIT_S = 0.25
_SILENCE_S = 60.0  # after which a connection counts as broken
_AT_ONCE = 8  # connections, where many files are asked for

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteError(ValueError):
    """A remote read that failed again and again: not a corrupt image, which `data.on_error=skip` would pass over."""


def is_remote(name: str) -> bool:
    """Say whether a name is a URL (http://, s3://, ...) instead of a path."""
    return "://" in name


def file_system(url: str) -> Any:
    """Return fsspec's file system of a URL. Raises ImportError naming the extra."""
    protocol = url.partition("://")[0]
    try:
        import fsspec

        if protocol.partition("::")[0] not in fsspec.available_protocols():
            raise ValueError(f"{url}: {protocol}:// is not known: give a folder, or a URL as https://... or s3://...")
        return fsspec.core.url_to_fs(url, **_options(url))[0]
    except ImportError as error:
        raise ImportError(
            f"{protocol}:// needs a package more ({error}): pip install 'effnet-train[remote]'"
        ) from error


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # Its own limit is five minutes for all of a file, which a whole shard may well take.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE_S)}}


def retried(what: str, read: Callable[[], Result], *, doing: str = "read") -> Result:
    """Return what `read` returns, trying again after ever longer waits where it fails; `doing` is for messages.

    Raises RemoteError naming the last reason after all attempts; at once FileNotFoundError, PermissionError, and
    OSError of a full disk.
    """
    wait = _FIRST_WAIT_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:  # each file system has errors of its own
            if _is_denied(error):
                raise PermissionError(f"cannot {doing} {what}: access denied ({error}){_credentials(what)}") from error
            if _is_final(error):
                raise
            if attempt == _ATTEMPTS:
                first = _connection_error(error) or error
                reason = f"{type(first).__name__}: {first}".splitlines()[0]
                raise RemoteError(f"cannot {doing} {what} after {_ATTEMPTS} attempts ({reason})") from error
        # Many processes that failed together should not come back together.
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait *= 2
    raise AssertionError


def _is_denied(error: Exception) -> bool:
    no_keys = "CredentialsError" in type(error).__name__  # botocore's
    return isinstance(error, PermissionError) or no_keys or _status(error) in (401, 403)


def _is_final(error: Exception) -> bool:
    """Say whether another attempt would find the same."""
    if isinstance(error, FileNotFoundError):
        return _status(error) in (None, 404, 410) and _connection_error(error) is None
    return isinstance(error, ImportError | ValueError) or getattr(error, "errno", None) == errno.ENOSPC


def _status(error: BaseException) -> int | None:
    """Return the status of HTTP; fsspec says FileNotFoundError of whatever fails, and what it was stands behind."""
    status: int | None = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    return status


def _connection_error(error: BaseException) -> BaseException | None:
    """Return what broke a connection, where that is what fsspec's FileNotFoundError hides."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    # Of HTTP's errors those without a status.
    broken = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp.")
    return cause if broken and _status(error) is None and not isinstance(cause, FileNotFoundError) else None


def _credentials(url: str) -> str:
    if not url.startswith("s3://"):
        return ""
    return (
        ": give AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for a store that is not "
        "Amazon's, FSSPEC_S3_ANON=true for a public bucket)"
    )


def at_once(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in the items' order, with several connections open at a time."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def state(url: str) -> list[Any]:
    """Return what tells a file from a changed one: its size (None: unknown), and its tag or time.

    Raises FileNotFoundError of the URL, PermissionError, RemoteError.
    """
    try:
        info = retried(url, lambda: file_system(url).info(url))
    except FileNotFoundError as error:
        raise FileNotFoundError(url) from error
    return [info.get("size"), str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")]


def listed(pattern: str) -> list[str]:
    """Return the URLs that a pattern with wildcards means, sorted; none where its server does not list files."""
    remote = file_system(pattern)
    return sorted(remote.unstrip_protocol(name) for name in retried(pattern, lambda: remote.glob(pattern)))


def read_part(url: str, offset: int, length: int) -> bytes:
    """Return a part of a file. Raises RemoteError, also where it cannot be found any more, or has become shorter."""
    if not length:
        return b""  # which no server can be asked for

    def read() -> bytes:
        data: bytes = file_system(url).cat_file(url, start=offset, end=offset + length)
        if len(data) < length:  # a server that tells no length may be cut off unnoticed
            raise OSError(f"{len(data):,} bytes of {length:,} came")
        return data

    try:
        data = retried(url, read)
    except OSError as error:  # it would count as a corrupt image
        raise RemoteError(f"cannot read {url} ({type(error).__name__}: {error})") from error
    if len(data) > length:
        raise RemoteError(f"{url}: {WHOLE_ONLY}")
    return data


@dataclass(frozen=True)
class Copies:
    """Whole copies of remote files in a folder of this machine, made when one is first asked for.

    `states` are those of the files: a changed file has another copy. Of several processes that want a file, one
    fetches and the others wait.
    """

    folder: Path
    states: Mapping[str, Sequence[Any]]

    def path(self, url: str) -> str:
        """Return where the copy of a file lies. Raises RemoteError, or ValueError where it cannot be written."""
        size, _ = self.states[url]
        name = hashlib.sha256("\0".join(map(str, (url, *self.states[url]))).encode()).hexdigest()[:16]
        copy = self.folder / f"{name}-{url.rpartition('/')[2]}"
        if not copy.exists():
            try:
                self._fetch(url, copy, size)
            except RemoteError:
                raise
            except OSError as error:  # it would count as a corrupt image
                raise self._failed(url, size, error) from error
        return str(copy)

    def _fetch(self, url: str, copy: Path, size: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(copy.with_name(f".{copy.name}.tmp")) as unfinished:
            if copy.exists():  # another process was quicker
                unfinished.unlink(missing_ok=True)
                return
            os.truncate(unfinished, 0)  # what a process that was killed has left takes no room
            if size is not None and size > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(unfinished))
            try:
                retried(url, lambda: _download(url, unfinished, size))
            except BaseException:
                os.truncate(unfinished, 0)  # and not removed: others wait for this very file
                raise
            os.replace(unfinished, copy)

    def _failed(self, url: str, size: int | None, error: OSError) -> ValueError:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(self.folder).free
            return ValueError(
                f"data.shard_cache={self.folder} has {free / 1e9:.1f} GB free, and a copy of {url} takes "
                f"{(size or 0) / 1e9:.1f} GB: choose another place, or null to read over the network"
            )
        if error.filename is not None and str(error.filename).startswith(str(self.folder)):
            return ValueError(
                f"cannot write to data.shard_cache={self.folder} ({error.strerror}): choose another place"
            )
        return RemoteError(f"cannot read {url} ({type(error).__name__}: {error})")


@contextmanager
def _locked(file: Path) -> Iterator[Path]:
    """Hold a file alone; the system lets go of it when this process ends, and what lies in it is written over."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(descriptor)


def _download(url: str, file: Path, size: int | None) -> None:
    """Write all of a remote file into a file that is there, and see that its length is right."""
    file_system(url).get_file(url, str(file))
    with file.open("rb") as written:
        os.fsync(written.fileno())
        found = os.fstat(written.fileno()).st_size
    if size is not None and found != size:
        raise OSError(f"{found:,} bytes of {size:,} came")
