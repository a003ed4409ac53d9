"""Files that a command writes at its end: what keeps it from that is told before the work, by their key."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_file(key: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Check that a file can be written, by trying, and that it has one of `suffixes` where they are given.

    Raises FileNotFoundError where there is no folder for it, ValueError.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{key}={path}: its folder does not exist, make it first")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{key}={path} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_dir():
        raise ValueError(f"{key}={path} is a folder: give a file in it")
    new = not path.exists()
    with writing(key, path):
        path.open("ab").close()
        if new:
            path.unlink()


def check_folder(key: str, path: Path) -> None:
    """Check that a folder is there or can be made; nothing is. Raises ValueError."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{key}={path} cannot be made, as {there} is a file: choose another place")


def make_place(key: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Make the folder of a file where there is none, and check the file as `check_file` does. Raises ValueError."""
    check_folder(key, path.parent)
    with writing(key, path):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_file(key, path, suffixes)


def results_file(output: str | None) -> Path | None:
    """Return where `output=` asks for results, a place that has been made, or None. Raises ValueError."""
    if not output:
        return None
    make_place("output", Path(output))
    return Path(output)


def write_results(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write results as JSON, where they are asked for. Raises ValueError."""
    if file:
        with writing("output", file):
            file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {file}")


@contextmanager
def writing(key: str, path: Path) -> Iterator[None]:
    """Tell an OSError by the key. Raises ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be written ({error.strerror or error}): choose another place") from error
