"""The choice among pieces of probabilities, and images that cannot be read."""

import csv
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_train.data.datasets import Data
from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess
from effnet_train.data.sources import find_files
from effnet_train.distributed import Session
from effnet_train.engine.label import choose, piece_path, score_pieces

CLASSES = ["a", "b", "c"]


class Named:
    classes = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image \udce9, {index}"  # what a name in Latin-1 becomes


@pytest.fixture
def few_open_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_open_files")
def test_there_may_be_more_pieces_than_files_may_be_open(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    generator = np.random.default_rng(0)
    shares = generator.dirichlet([0.5] * 3, 239).astype(np.float16)
    for number in range(80):
        np.save(piece_path(tmp_path, number), shares[3 * number : 3 * number + 3])
    manifest = choose(tmp_path, Named(239), {"classes": CLASSES}, threshold=0.6, per_class=90, seed=0)
    chosen, soft = np.load(tmp_path / "chosen.npy"), np.load(tmp_path / "soft.npy")
    kept = np.flatnonzero(shares.max(axis=1).astype(np.float32) >= 0.6)
    assert 0 < len(kept) < 239
    assert np.array_equal(soft[chosen[:, 2]], shares[chosen[:, 0]])
    assert manifest["of_each_class"] == [90, 90, 90]
    assert np.array_equal(chosen[:, 1], shares.argmax(axis=1)[chosen[:, 0]])
    text = (tmp_path / "labels.csv").read_text(encoding="utf-8", errors="surrogateescape")
    rows = list(csv.DictReader(text.splitlines()))
    images, times = np.unique(chosen[:, 0], return_counts=True)
    assert [(row["image"], int(row["times"])) for row in rows] == [
        (f"image \udce9, {image}", count) for image, count in zip(images, times, strict=True)
    ]
    for row, image in zip(rows, images, strict=True):
        assert row["class"] == CLASSES[shares[image].argmax()]
        assert row["confidence"] == f"{shares[image].max():.4f}"


def test_what_cannot_be_read_has_no_label(tmp_path: Path) -> None:
    """Wherever in a batch it is, and where a batch has nothing else: the others keep their rows."""
    (tmp_path / "scores").mkdir()
    (tmp_path / "images").mkdir()
    for number in range(11):
        file = tmp_path / "images" / f"{number:02d}.png"
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(file)
        if number in (0, 4, 5, 9):
            file.write_bytes(file.read_bytes()[:40])
    source = find_files([str(tmp_path / "images")])
    data = Data(source, source, None, Preprocess(resolution=8), "skip", "pillow")

    def score(batch: Batch) -> np.ndarray:
        assert len(batch.images) == len(batch.labels) == len(batch.keys)
        brightness = batch.images.float().mean((1, 2, 3)).numpy() / 255
        return np.stack([brightness, 1 - brightness], axis=1).astype(np.float16)

    how = {"size": 6, "batch_size": 2, "workers": 0, "session": Session()}
    assert score_pieces(score, source, data, tmp_path, **how) == 2
    rows = np.concatenate([np.load(piece_path(tmp_path, number)) for number in range(2)])
    wanted = [0 if number in (0, 4, 5, 9) else 20 * number / 255 for number in range(11)]
    np.testing.assert_allclose(rows[:, 0], wanted, atol=1e-3)
    assert (rows.sum(axis=1) > 0.99).tolist() == [number not in (0, 4, 5, 9) for number in range(11)]
    manifest = choose(tmp_path, source, {"classes": ["bright", "dark"]}, threshold=0, per_class=None, seed=0)
    assert (manifest["unreadable"], manifest["kept"], manifest["images"]) == (4, 7, 11)
    piece_path(tmp_path, 1).unlink()
    assert score_pieces(score, source, data, tmp_path, **how) == 1
    again = np.concatenate([np.load(piece_path(tmp_path, number)) for number in range(2)])
    assert np.array_equal(again, rows)
