"""What `effnet-data` wrote into a folder, by the manifest there: whether all of it is there, and as it was."""

import fnmatch
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effnet_train.data.shard_layout import index_name

MANIFEST = "manifest.json"
_KEYS = {"version", "options", "images", "pieces", "complete"}


def check_whole(root: str, splits: Mapping[str, str]) -> None:
    """Check that a conversion to `root` has ended and that none of its shards is gone.

    `splits` gives what data.train and data.val are. Without wildcards they name each shard, and what they do not name
    may be absent. Raises ValueError.
    """
    manifest = _manifest(Path(root))
    if manifest is None:
        return
    shards = manifest["options"]["to"] == "shards"
    wild = {key: pattern for key, pattern in splits.items() if glob.has_magic(pattern)} if shards else splits
    if wild and not manifest["complete"]:
        raise ValueError(
            f"data.root={root} is not complete: effnet-data has not ended its work there. The same command goes on; to "
            f"read what there is all the same, {_all_the_same(shards)}"
        )
    for key, pattern in wild.items() if shards else ():
        for file, size in _files(manifest):
            found = Path(root, file)
            if fnmatch.fnmatchcase(file, pattern) and not (found.is_file() and found.stat().st_size == size):
                raise ValueError(
                    f"data.root={root} is not complete: {found} is missing, or of another size than {MANIFEST} says. "
                    f"Copy it again; to read what there is all the same, {_all_the_same(shards, key)}"
                )


def _all_the_same(shards: bool, key: str = "train") -> str:
    pattern = f"give data.{key} without wildcards, as {key}-{{000000..000041}}.tar"
    return pattern if shards else f"move {MANIFEST} away"


def damaged(folder: Path) -> list[str]:
    """Return what differs from the manifest in a folder of shards, a line each; none where there is no manifest."""
    try:
        manifest = _manifest(folder)
    except ValueError as error:
        return [str(error)]
    if manifest is None:
        return []
    ended = (
        []
        if manifest["complete"]
        else [f"{folder / MANIFEST}: not complete: run the same effnet-data again, which goes on"]
    )
    return ended + list(_changed(folder, manifest))


def _changed(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for record in manifest["pieces"].values():
        if "file" in record:
            file = folder / record["file"]
            for name, digest in ((file, record["sha256"]), (Path(index_name(str(file))), record["index_sha256"])):
                if not name.is_file():
                    yield f"{name}: missing"
                elif _sha256(name) != digest:
                    yield f"{name}: not what was written"


def _files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    return ((record["file"], record["bytes"]) for record in manifest["pieces"].values() if "file" in record)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a folder, or None where there is none of ours. Raises ValueError where it is damaged."""
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}): copy it again, or move it away") from error
    return found if isinstance(found, dict) and found.keys() >= _KEYS else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
