"""Small shards in WebDataset's layout."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for suffix, data in parts.items():
                add(tar, f"{key}.{suffix}", data)


@pytest.fixture
def image() -> Callable[[int], bytes]:
    """Return a function that gives an encoded image for a number."""
    return jpeg


@pytest.fixture
def write_shard() -> Callable[..., None]:
    """Return a function that writes a shard of samples: a key, and contents by suffix."""
    return shard


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a folder of shards: 3 + 2 training and 2 validation images of the classes ant and bee."""
    root = tmp_path / "shards"
    shard(
        root / "train-0000.tar",
        [
            ("a.b/0001", {"jpg": jpeg(1), "cls": b"0"}),
            ("0002", {"cls": b"1\n", "png": jpeg(2)}),
            ("0003", {"jpeg": jpeg(3), "json": b'{"label": 1, "text": "x"}'}),
        ],
    )
    shard(root / "train-0001.tar", [(f"{n:04d}", {"JPG": jpeg(n), "cls": b"0", "txt": b"-"}) for n in (4, 5)])
    shard(root / "val-0000.tar", [(f"{n:04d}", {"jpg": jpeg(n), "cls": str(n % 2).encode()}) for n in (6, 7)])
    (root / "classes.txt").write_text("ant\nbee\n")
    return root
