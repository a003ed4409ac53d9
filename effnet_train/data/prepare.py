"""Write a data set's images as shards or folders, in pieces: what was finished is not done again."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from PIL import Image

from effnet_train.data.decode import DecodeError
from effnet_train.data.manifest import MANIFEST
from effnet_train.data.parallel import map_ordered
from effnet_train.data.pieces import (
    Options,
    Piece,
    cut,
    member,
    member_size,
    padded,
    shrink,
    starts_by_bytes,
    suffix_of,
)
from effnet_train.data.shard_layout import index_bytes, index_name
from effnet_train.data.sources import IMAGE_SUFFIXES, Source
from effnet_train.data.tar_index import Entry

_VERSION = 2
_SIZED = 100  # images whose sizes are found out at a time
_JPEG_SUFFIXES = (".jpg", ".jpeg")


def write(
    splits: Mapping[str, Source],
    output: Path,
    options: Options,
    *,
    source: Mapping[str, Any],
    on_error: str = "raise",
    workers: int = 0,
) -> dict[str, Any]:
    """Write the splits' images to the folder `output` and return its manifest; go on where a former call ended.

    Pieces are written under temporary names, synced and renamed; the manifest lists the finished ones with their number
    of images, bytes and SHA-256. `source` describes where the images come from. With `on_error` `skip` an image that
    cannot be read is left out, and listed. Raises ValueError where `output` holds something else.
    """
    classes = next(iter(splits.values())).classes
    if options.to == "folder":
        _check_folder_names(classes)
    wanted = {
        "version": _VERSION,
        "options": asdict(options),
        "source": dict(source),
        "images": {name: len(images) for name, images in splits.items()},
        "classes": list(classes),
    }
    output.mkdir(parents=True, exist_ok=True)
    writer = _Writer(splits, output, options, on_error)
    with _locked(output), _full_disk_named(output), _nothing_unfinished(output):
        manifest = _started(output, wanted)
        if options.to == "shards" and options.megabytes is not None and "starts" not in manifest:
            manifest["starts"] = {name: _starts(writer, name, workers) for name in splits}
            _replace(output / MANIFEST, _json(manifest))
        starts = manifest.get("starts", {})
        pieces = [
            piece for name, images in splits.items() for piece in cut(name, len(images), options, starts.get(name))
        ]
        todo = [piece for piece in pieces if not _is_done(output, manifest["pieces"].get(piece.name), options)]
        _write_pieces(writer, todo, pieces, manifest, output, workers)
        if options.to == "folder":
            _check_every_file(output, manifest)
        manifest["complete"] = True
        _replace(output / MANIFEST, _json(manifest))
    return manifest


@contextmanager
def _full_disk_named(output: Path) -> Iterator[None]:
    """Name the folder in the error of a full disk, which writing to a file gives without a name."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(error.errno, error.strerror, str(output)) from error


@contextmanager
def _nothing_unfinished(output: Path) -> Iterator[None]:
    """Remove what was not finished, of a former process that was killed, and of this one where it ends early."""

    def clear() -> None:
        for left in output.glob(".*.tmp"):
            left.unlink()

    clear()
    try:
        yield
    finally:
        clear()


def _starts(writer: "_Writer", split: str, workers: int) -> list[int]:
    """Return where the shards of a split begin that keep to a size: all images are read once to find out."""
    from tqdm import tqdm

    count = len(writer.splits[split])
    # In the order in which they will stand.
    chunks = list(cut(split, count, writer.options, range(0, count, _SIZED)))
    with (
        tqdm(total=count, desc=f"sizes of {split}", unit="img", disable=None, file=sys.stderr) as bar,
        closing(map_ordered(writer.sizes, chunks, workers=workers)) as found,
    ):

        def sizes() -> Iterator[int]:
            for chunk in found:
                yield from chunk
                bar.update(len(chunk))

        return starts_by_bytes(sizes(), writer.options)


def _write_pieces(
    writer: "_Writer",
    todo: list[Piece],
    pieces: list[Piece],
    manifest: dict[str, Any],
    output: Path,
    workers: int,
) -> None:
    from tqdm import tqdm

    total, left = (sum(len(piece.indices) for piece in some) for some in (pieces, todo))
    with (
        tqdm(total=total, initial=total - left, unit="img", disable=None, file=sys.stderr) as bar,
        # Closed whatever happens, so that no worker writes any more when this returns.
        closing(map_ordered(writer, todo, workers=workers)) as records,
    ):
        for piece, record in zip(todo, records, strict=True):
            manifest["pieces"][piece.name] = record
            _replace(output / MANIFEST, _json(manifest))
            bar.update(len(piece.indices))


def _is_done(output: Path, record: Mapping[str, Any] | None, options: Options) -> bool:
    if record is None or options.to == "folder":
        return record is not None
    file = output / record["file"]
    return file.is_file() and file.stat().st_size == record["bytes"] and Path(index_name(str(file))).is_file()


class _Writer:
    """Writes a piece, in a worker."""

    def __init__(self, splits: Mapping[str, Source], output: Path, options: Options, on_error: str) -> None:
        self.splits, self.output, self.options, self.on_error = splits, output, options, on_error

    def __call__(self, piece: Piece) -> dict[str, Any]:
        skipped: list[str] = []
        put = self._shard if self.options.to == "shards" else self._files
        return {**put(piece, skipped), **({"skipped": skipped} if skipped else {})}

    def sizes(self, piece: Piece) -> list[int]:
        """Return the bytes that each of a piece's images takes in a shard, 0 of one that is left out."""
        found = [0] * len(piece.indices)
        for place, name, content, label in self._samples(piece, []):
            key, suffix = _key(name)
            # As if the key were there already: it may be, in some shard.
            members = ((_repeated(key, place) + suffix, content), (f"{_repeated(key, place)}.cls", str(label).encode()))
            found[place - piece.start] = sum(member_size(member(*each)) for each in members)
        return found

    def _samples(self, piece: Piece, skipped: list[str]) -> Iterator[tuple[int, str, bytes, int]]:
        """Yield place, file name, content and label of each image."""
        source = self.splits[piece.split]
        for place, index in enumerate(piece.indices.tolist(), start=piece.start):
            try:
                data, label = source.read(index)
                content, suffix = self._content(data, source.name(index))
            except (DecodeError, OSError) as error:
                text = f"{source.name(index)}: {error}"
                if self.on_error != "skip":
                    raise ValueError(
                        f"cannot read the image {text}; mend it, or set data.on_error=skip to leave it out"
                    ) from error
                skipped.append(text)
                continue
            yield place, _file_name(source.name(index), index, suffix), content, label

    def _content(self, data: bytes | Image.Image, name: str) -> tuple[bytes, str]:
        """Return what to write, and the suffix of a file of it."""
        small = shrink(data, self.options) if self.options.resize is not None else None
        suffix = os.path.splitext(name)[1]
        if isinstance(data, bytes) and suffix.lower() not in IMAGE_SUFFIXES:  # a row of a table, say
            suffix = suffix_of(data)
        if small is not None:
            return small, suffix if suffix.lower() in _JPEG_SUFFIXES else ".jpg"
        if isinstance(data, bytes):
            return data, suffix
        stream = io.BytesIO()
        data.save(stream, "PNG")  # nothing is lost of what its source had decoded
        return stream.getvalue(), ".png"

    def _shard(self, piece: Piece, skipped: list[str]) -> dict[str, Any]:
        final = self.output / f"{piece.name}.tar"
        entries: list[Entry] = []
        with _renamed(final) as file:
            hashed = _Hashed(file)
            # A stream: no place in it is visited twice, so that the hash is of what lies on the disk.
            with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                keys: set[str] = set()
                for place, name, content, label in self._samples(piece, skipped):
                    key, suffix = _key(name)
                    while key in keys:
                        key = _repeated(key, place)
                    keys.add(key)
                    _add(tar, f"{key}{suffix}", content)
                    entries.append(Entry(0, tar.offset - padded(len(content)), len(content), label, f"{key}{suffix}"))
                    _add(tar, f"{key}.cls", str(label).encode())
            index = index_bytes(entries, hashed.count)
            with _renamed(Path(index_name(str(final)))) as beside:
                beside.write(index)
        return {
            "file": final.name,
            "images": len(entries),
            "bytes": hashed.count,
            "sha256": hashed.sha256.hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }

    def _files(self, piece: Piece, skipped: list[str]) -> dict[str, Any]:
        """Write files into their class folders; the piece's hash is of their contents, one after another."""
        classes = self.splits[piece.split].classes
        images, count, sha256 = 0, 0, hashlib.sha256()
        for _, name, content, label in self._samples(piece, skipped):
            folder = self.output / piece.split / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            images, count = images + 1, count + len(content)
            sha256.update(content)
        os.sync()  # once a piece: a million files synced one by one would take hours
        return {"images": images, "bytes": count, "sha256": sha256.hexdigest()}


def _file_name(name: str, index: int, suffix: str) -> str:
    """Return the file name in a source's name of an image: behind folders, an archive's name, a parquet file's row."""
    last = re.split(r"/|\.tar:|\.parquet:row \d+, ", name)[-1]
    stem, former = os.path.splitext(last)
    return f"{stem}{suffix}" if former.lower() in IMAGE_SUFFIXES else f"{index:06d}{suffix}"


def _key(name: str) -> tuple[str, str]:
    """Return a sample's key in a shard, the file's name without dots, as a key ends at the first, and the suffix."""
    stem, suffix = os.path.splitext(name)
    return stem.replace(".", "_"), suffix.lower().replace(".jpeg", ".jpg")


def _repeated(key: str, place: int) -> str:
    """Return another key for a name that is in the shard already."""
    return f"{key}-{place:06d}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(member(name, content), io.BytesIO(content))


class _Hashed:
    """Counts and hashes what is written to a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.count += len(data)
        return self._file.write(data)


@contextmanager
def _renamed(final: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that gets its name when all of it lies on the disk."""
    # Of this process alone: one that is being killed may still write its own.
    unfinished = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, final)
    finally:
        unfinished.unlink(missing_ok=True)


def _replace(file: Path, text: str) -> None:
    with _renamed(file) as stream:
        stream.write(text.encode())


def _json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder; the system lets go of it when this one ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output={folder} is being written by another process: wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _started(output: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest that lies in `output`, or begin one. Raises ValueError where it is of something else."""
    file = output / MANIFEST
    if not file.exists():
        others = sorted(entry.name for entry in output.iterdir() if not entry.name.endswith(".tmp"))
        if others and others != ["classes.txt"]:
            raise ValueError(f"output={output} holds {others[0]} and no {MANIFEST}: choose an empty folder")
        # Before the manifest: where that is, all else is.
        _replace(output / "classes.txt", "".join(f"{name}\n" for name in wanted["classes"]))
        _replace(file, _json({**wanted, "complete": False, "pieces": {}}))
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        former = {key: manifest[key] for key in (*wanted, "pieces")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or of another program ({error!r}): choose another output=") from error
    wanted = json.loads(json.dumps(wanted))
    differing = [text for key, value in wanted.items() for text in _differences(key, former[key], value)]
    if differing:
        raise ValueError(
            f"output={output} holds other images: {'; '.join(differing)}. Give the former values to go on, or choose "
            "another output="
        )
    return manifest


def _differences(key: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(was.keys() | now.keys())
        return [text for name in names for text in _differences(name, was.get(name), now.get(name))]
    if was == now:
        return []
    return ["its classes are others"] if key == "classes" else [f"{key} was {was!r}, now {now!r}"]


def _check_folder_names(classes: tuple[str, ...]) -> None:
    for name in classes:
        if not name or name[0] == "." or "/" in name or "\0" in name:
            raise ValueError(f"the class {name!r} cannot be a folder's name: to=shards takes it")


def _check_every_file(output: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where files are fewer than images: two of a class had the same name."""
    for split in manifest["images"]:
        written = sum(record["images"] for name, record in manifest["pieces"].items() if name.startswith(f"{split}-"))
        found = sum(1 for _, _, files in os.walk(output / split) for _ in files)
        if found != written:
            raise ValueError(
                f"output={output}: {written:,} images of {split} have become {found:,} files: where two images of a "
                "class have the same name, to=shards keeps both; else something else changes this folder"
            )


def summary_lines(output: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Word what was written for people."""
    lines = []
    for split in manifest["images"]:
        records = [record for name, record in manifest["pieces"].items() if name.startswith(f"{split}-")]
        images, count = (sum(record[key] for record in records) for key in ("images", "bytes"))
        where = f"{len(records):,} shards" if manifest["options"]["to"] == "shards" else str(output / split)
        lines.append(f"{split}: {images:,} images in {where}, {count / 1e9:,.3f} GB")
        lines += [f"  left out: {text}" for record in records for text in record.get("skipped", [])]
    return lines
