"""Folders for what is made once, by one process at a time."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(cache: Path, name: str) -> Iterator[bool]:
    """Make something in the folder `cache` while other processes wait with the same `name`; tell whether they do.

    They do not where the file system has no locks. The system takes a lock from a process that ends, however it ends.
    Raises OSError naming `data.cache` where something in the folder cannot be written.
    """
    lock = cache / f"{name}.lock"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield _locked(descriptor, lock)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(cache)):
            raise
        raise OSError(
            f"cannot write to {cache} ({error.strerror}): choose another place with data.cache=..."
        ) from error


def _locked(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for the process that holds {lock}", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
