"""A teacher's probabilities of all images of a source, piece by piece; then the pseudo-labels chosen from them."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from effnet_train.data.datasets import Data
from effnet_train.data.loader import Batch, eval_batches
from effnet_train.data.preprocess import normalize
from effnet_train.data.pseudo import CHOSEN, MANIFEST, SOFT, select
from effnet_train.data.sources import Source, Subset
from effnet_train.distributed import Session
from effnet_train.engine.checkpoint import write_atomically, write_bytes
from effnet_train.engine.evaluate import autocast

_PIECES = "scores"


def pieces(num_images: int, size: int) -> list[range]:
    """Return the images of each piece: `size` of them, of the last what is left."""
    return [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def piece_path(folder: Path, number: int) -> Path:
    """Return where a piece's probabilities lie: float16 (images, classes), a row of zeros for what has none."""
    return folder / _PIECES / f"{number:06d}.npy"


def score_pieces(
    score: Callable[[Batch], np.ndarray],
    source: Source,
    data: Data,
    folder: Path,
    *,
    size: int,
    batch_size: int,
    workers: int,
    session: Session,
) -> int:
    """Write the probabilities of all pieces that are not there yet; return how many of them this rank wrote.

    `score` gives those of a batch, (N, classes) float16; `data` says how its pixels are made. No batch spans two
    pieces: neither ranks nor interruptions change a bit.
    """
    assert size % batch_size == 0
    found = pieces(len(source), size)
    # Rank 0 looks once for all: others might see already what one of them has just written.
    lacking = [number for number in range(len(found)) if not piece_path(folder, number).exists()]
    mine = session.broadcast(lacking)[session.rank :: session.world_size]
    indices = np.concatenate([np.arange(0), *(np.asarray(found[number]) for number in mine)])
    subset = Subset(source, indices)
    batches = eval_batches(subset, data, batch_size=batch_size, workers=workers, device=session.device)
    start = 0
    for number in mine:
        rows: list[np.ndarray] = []
        while sum(map(len, rows)) < len(found[number]):
            batch = next(batches)
            count = min(batch_size, len(indices) - start)
            shares = score(batch)
            rows.append(np.zeros((count, shares.shape[1]), dtype=np.float16))
            rows[-1][batch.keys.numpy() - start] = shares
            start += count
        write_atomically(piece_path(folder, number), partial(np.save, arr=np.concatenate(rows)))
    return len(mine)


@torch.inference_mode()
def probabilities(model: nn.Module, batch: Batch, data: Data, *, precision: str, device: torch.device) -> np.ndarray:
    """Return the probabilities (N, classes) float16 of a batch; zeros where the logits are not finite."""
    images = normalize(batch.images.to(device, non_blocking=True), data.preprocess.mean, data.preprocess.std)
    with autocast(device, precision):
        logits = model(images).float()
    whole = logits.isfinite().all(dim=1, keepdim=True)
    return torch.where(whole, logits.softmax(dim=1), 0).to(torch.float16).cpu().numpy()


def choose(
    folder: Path, source: Source, about: Mapping[str, Any], *, threshold: float, per_class: int | None, seed: int
) -> dict[str, Any]:
    """Choose pseudo-labels from the pieces in `folder`, write them, and return the manifest, which is written last.

    `about` is what the manifest says besides; its `classes` are the teacher's. Raises ValueError where none is left.
    """
    # One open at a time: of more images than fit the memory there are more pieces than files may be open.
    paths = sorted((folder / _PIECES).glob("*.npy"))
    likeliest = [(part.argmax(axis=1), part.max(axis=1).astype(np.float32)) for part in map(np.load, paths)]
    labels, confidences = map(np.concatenate, zip(*likeliest, strict=True))
    assert len(labels) == len(source)
    images = select(labels, confidences, threshold=threshold, per_class=per_class, seed=seed)
    if not len(images):
        raise ValueError(
            f"confidence={threshold} leaves none of the {len(source):,} images, the most confident has "
            f"{confidences.max():.3f}: lower it"
        )
    (folder / MANIFEST).unlink(missing_ok=True)  # what it tells of is about to change
    unique, rows, times = np.unique(images, return_inverse=True, return_counts=True)
    chosen = np.stack([images, labels[images], rows.reshape(-1)], axis=1).astype(np.int64)
    write_atomically(folder / CHOSEN, partial(np.save, arr=chosen))
    write_atomically(folder / SOFT, lambda file: _write_rows(file, paths, unique))
    counts = np.bincount(labels[images], minlength=len(about["classes"]))
    names = (about["classes"][label] for label in labels[unique])
    rows_of_table = zip(map(source.name, unique.tolist()), names, confidences[unique], times, strict=True)
    write_atomically(folder / "labels.csv", lambda file: _write_table(file, rows_of_table))
    manifest = {
        **about,
        "confidence": threshold,
        "per_class": per_class,
        "seed": seed,
        "images": len(source),
        "unreadable": int((confidences == 0).sum()),
        "kept": len(unique),
        "chosen": len(images),
        "of_each_class": counts.tolist(),
        "sha256": _digest([folder / CHOSEN, folder / SOFT]),
    }
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def _write_rows(file: IO[bytes], paths: Sequence[Path], images: np.ndarray) -> None:
    """Write the rows of these images, which are in order, as one array, holding a piece in memory at a time."""
    start = 0
    for part in map(np.load, paths):
        if not start:
            shape = (len(images), part.shape[1])
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        first, last = np.searchsorted(images, (start, start + len(part)))
        file.write(part[images[first:last] - start].tobytes())
        start += len(part)


def _write_table(file: IO[bytes], rows: Iterable[tuple[str, str, float, int]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "confidence", "times"])
    writer.writerows((name, kind, f"{confidence:.4f}", times) for name, kind, confidence, times in rows)
    text.detach()


def _digest(files: Sequence[Path]) -> str:
    digest = sha256()
    for path in files:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def names_digest(source: Source, root: str) -> str:
    """Return the SHA-256 of 10,000 images' names below `root` at most, evenly spread: two sources are the same."""
    digest = sha256()
    for index in np.linspace(0, len(source) - 1, min(len(source), 10_000)).astype(int).tolist():
        digest.update(os.fsencode(source.name(index).removeprefix(root).lstrip("/")) + b"\n")
    return digest.hexdigest()
