"""Read every image of a data set and say what is wrong with it."""

import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from effnet_train.data.decode import DecodeError, decode
from effnet_train.data.parallel import map_ordered
from effnet_train.data.sources import Source

_CHUNK = 32  # images in a piece of work
_DIGEST_BYTES = 16
_ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 2 to 8 mirrored or turned, others mean nothing
_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg"), ("JPEG", "MPO")),  # MPO: a JPEG with more pictures behind it, as cameras write
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".ppm",), ("PPM",)),
    **{f".{name}": (name.upper(),) for name in ("png", "bmp", "webp")},
}
# What is found, in the order of the report. Of all but the first three the report names the images.
KINDS: Mapping[str, str] = {
    "damaged": "shards that differ from their manifest",
    "counts": "other numbers than expected",
    "empty": "classes without images",
    "unreadable": "images that cannot be decoded, or end too soon",
    "tiny": "tiny images",
    "across": "images that are in train and in val",
    "contradicting": "identical images of different classes",
    "repeated": "identical images of one class",
    "disguised": "files of another format than their name says",
    "cmyk": "CMYK images",
    "rotated": "images whose EXIF orientation is not applied",
}
# Nothing of these keeps a run from its result. ImageNet itself has one PNG called JPEG and 22 CMYK images.
NOTES = ("repeated", "disguised", "cmyk", "rotated")


class Inspected(NamedTuple):
    """What one image is; where `error` says why it cannot be decoded, only its length in bytes and digest are known."""

    label: int
    length: int
    digest: bytes
    format: str | None = None
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    error: str | None = None


def inspect(data: bytes | Image.Image, label: int) -> Inspected:
    """Decode an image whole and tell what it is; of one that its source has decoded, the digest is of its pixels."""
    content = data if isinstance(data, bytes) else repr((data.mode, data.size)).encode() + data.tobytes()
    known = Inspected(label, len(data) if isinstance(data, bytes) else 0, _digest(content))
    try:
        width, height = decode(data).size
    except DecodeError as error:
        return known._replace(error=str(error))
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    orientation = image.getexif().get(_ORIENTATION, 1)
    if image.format == "JPEG" and isinstance(data, bytes) and not _has_end(data):
        # Decoders put up with the loss of a few bytes at the end, and make the rest of the picture up.
        known = known._replace(error="ends without JPEG's end marker: truncated")
    return known._replace(format=image.format, mode=image.mode, size=(width, height), orientation=orientation)


def _has_end(data: bytes) -> bool:
    """Say whether a JPEG's end marker follows its last scan: a thumbnail has one before, and rubbish may come after."""
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class _Inspect:
    """Inspects the images of a range, in a worker."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, indices: range) -> list[Inspected]:
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Inspected:
        try:
            data, label = self.source.read(index)
        except OSError as error:
            return Inspected(-1, 0, b"", error=str(error))
        return inspect(data, label)


def inspected(source: Source, *, workers: int, title: str) -> Iterator[Inspected]:
    """Yield what each image of a source is, in order, with a bar on standard error where that is a terminal."""
    from tqdm import tqdm

    ranges = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    with tqdm(total=len(source), desc=title, unit="img", disable=None, file=sys.stderr) as bar:
        for chunk in map_ordered(_Inspect(source), ranges, workers=workers):
            yield from chunk
            bar.update(len(chunk))


def verify(
    splits: Mapping[str, Source], *, expected: Mapping[str, int] | None, min_side: int, workers: int
) -> dict[str, Any]:
    """Read every image of the splits; return the report: `splits`, `problems` and `notes`, plain values for JSON.

    `expected` is what a complete copy holds (classes, train, val). Problems and notes are lists by kind, see `KINDS`
    and `NOTES`; a side of less than `min_side` pixels makes an image tiny. Identical are images of the same bytes.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    summaries, digests, labels = {}, {}, {}
    for split, source in splits.items():
        summaries[split], digests[split], labels[split] = _verify_split(
            source, found, min_side=min_side, workers=workers, title=split
        )
        counts = summaries[split]["per_class"]
        if any(counts.values()):
            found["empty"] += [f"{split}: {name}" for name, count in counts.items() if not count]
    classes = next(iter(splits.values())).classes
    numbers = {"classes": len(classes), **{split: len(source) for split, source in splits.items()}}
    found["counts"] = [
        f"{key}: {count:,} expected, {numbers[key]:,} found"
        for key, count in (expected or {}).items()
        if key in numbers and numbers[key] != count
    ]
    _find_identical(splits, digests, labels, found)
    return {
        "classes": len(classes),
        "splits": summaries,
        "problems": {kind: rows for kind, rows in found.items() if rows and kind not in NOTES},
        "notes": {kind: rows for kind, rows in found.items() if rows and kind in NOTES},
    }


def _verify_split(
    source: Source, found: dict[str, list[Any]], *, min_side: int, workers: int, title: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Add to what is found; return the split's summary, and each image's digest (N, 16) uint8 and label (N,)."""
    digests, labels = np.zeros((len(source), _DIGEST_BYTES), np.uint8), np.full(len(source), -1)
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    total = 0
    for index, image in enumerate(inspected(source, workers=workers, title=title)):
        total += image.length
        labels[index] = image.label
        if image.digest:
            digests[index] = np.frombuffer(image.digest, np.uint8)
        if image.error is not None:
            found["unreadable"].append(f"{source.name(index)}: {image.error}")
        if image.format is not None:
            formats[image.format] += 1
        if image.mode:
            modes[image.mode] += 1
            for kind, what in _oddities(source.name(index), image, min_side):
                found[kind].append(f"{source.name(index)}: {what}")
    per_class = np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist()
    summary = {
        "images": len(source),
        "bytes": total,
        "formats": dict(formats.most_common()),
        "modes": dict(modes.most_common()),
        # Of the images' digests in order: two copies that agree in it hold the same bytes in the same order.
        "digest": hashlib.blake2b(digests.tobytes(), digest_size=_DIGEST_BYTES).hexdigest(),
        "per_class": dict(zip(source.classes, per_class, strict=True)),
    }
    return summary, digests, labels


def _oddities(name: str, image: Inspected, min_side: int) -> Iterator[tuple[str, str]]:
    width, height = image.size
    if min(width, height) < min_side:
        yield "tiny", f"{width} x {height}"
    formats = _FORMATS.get(os.path.splitext(name)[1].lower())
    if formats and image.format and image.format not in formats:
        yield "disguised", image.format
    if image.mode == "CMYK":
        yield "cmyk", image.format or image.mode
    if image.orientation in range(2, 9):
        yield "rotated", f"orientation {image.orientation}"


def _find_identical(
    splits: Mapping[str, Source],
    digests: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    found: dict[str, list[Any]],
) -> None:
    """Add the groups of images of the same bytes to what is found, each a list of names."""
    every = np.concatenate(list(digests.values())).view(f"V{_DIGEST_BYTES}").reshape(-1)
    label = np.concatenate(list(labels.values()))
    starts = np.cumsum([0, *(len(source) for source in splits.values())])
    read = np.flatnonzero(every != np.zeros(_DIGEST_BYTES, np.uint8).view(every.dtype)[0])
    order = read[np.argsort(every[read], kind="stable")]
    same = np.concatenate([[False], every[order[1:]] == every[order[:-1]], [False]])
    # Runs of equal neighbours: a run begins where the next is the same and the one before was not.
    firsts, lasts = np.flatnonzero(same[1:] & ~same[:-1]), np.flatnonzero(same[:-1] & ~same[1:])
    names = list(splits)
    for first, last in zip(firsts, lasts, strict=True):
        group = order[first : last + 1]
        parts = np.searchsorted(starts, group, side="right") - 1
        members = [splits[names[part]].name(int(i - starts[part])) for part, i in zip(parts, group, strict=True)]
        kind = "repeated" if len(set(label[group].tolist())) == 1 else "contradicting"
        found["across" if len(set(parts.tolist())) > 1 else kind].append(members)


def report_lines(report: Mapping[str, Any], *, shown: int = 5) -> list[str]:
    """Word a report for people, with the first `shown` of each kind."""
    lines = []
    for split, summary in report["splits"].items():
        counts: Sequence[int] = list(summary["per_class"].values())
        formats = ", ".join(f"{count:,} {name}" for name, count in summary["formats"].items())
        lines.append(
            f"{split}: {summary['images']:,} images, {summary['bytes'] / 1e9:,.3f} GB, {len(counts):,} classes of "
            f"{min(counts):,} to {max(counts):,}; {formats or 'no files'}; digest {summary['digest']}"
        )
    for what in ("problems", "notes"):
        for kind, rows in report[what].items():
            lines.append(f"{what[:-1]}: {len(rows):,} {KINDS[kind]} ({kind})")
            lines += [f"  {row if isinstance(row, str) else ' = '.join(row)}" for row in rows[:shown]]
            lines += [f"  ... and {len(rows) - shown:,} more"] if len(rows) > shown else []
    lines.append("no problems" if not report["problems"] else f"problems: {', '.join(report['problems'])}")
    return lines
