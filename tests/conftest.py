import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported here or in a command: two threads for tiny layers on two busy cores cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Width, height, PIL's mode, file name.
IMAGES = (
    (20, 14, "RGB", "a.jpg"),
    (9, 30, "RGB", "b.png"),
    (16, 16, "L", "c.JPEG"),
    (5, 7, "RGBA", "d.png"),
    (40, 33, "CMYK", "e.jpeg"),
    (33, 8, "P", "f.png"),
)


@pytest.fixture
def image_root(tmp_path):
    """Return a folder of small random images: train/ with three classes of six, val/ with three of four."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name in ("ant", "bee", "cow"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for width, height, mode, file in IMAGES[:count]:
                pixels = generator.integers(256, size=(height, width, 4), dtype=np.uint8)
                image = Image.fromarray(pixels) if mode in ("RGBA", "CMYK") else Image.fromarray(pixels[..., :3])
                image.convert(mode).save(folder / file)
    return root


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of shared real images, which only some machines have."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EFFNET_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the shared images are not here: no folder {folder} (set EFFNET_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def imagenet_jpegs(shared_data):
    """Return the bytes of 40 real ImageNet JPEGs, by name."""
    archive = shared_data / "imagenet_sample.tar"
    if not archive.is_file():
        pytest.skip(f"the shared images are not here: no file {archive}")
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and member.name.endswith(".JPEG"):
                found[member.name] = files.extractfile(member).read()
            if len(found) == 40:
                break
    return found
