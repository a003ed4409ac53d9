import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

# Before torch is imported here or in a command: two threads for tiny layers on two busy cores cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is imported: its kernels are interpreted on the CPU, except in tests of a GPU. Workers inherit it.
_ON_GPU = re.search(r"-m ?(slow and )?gpu", " ".join(sys.argv))
os.environ.setdefault("TRITON_INTERPRET", "0" if _ON_GPU else "1")

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


class Hub(NamedTuple):
    """A Hugging Face hub on this machine: where it is, the folder that it serves, and what it was asked for.

    In the folder lie `owner/name/` for a model and `datasets/owner/name/` for a data set.
    """

    address: str
    root: Path
    asked: list[str]


class _HubRequest(BaseHTTPRequestHandler):
    commit = "0123456789012345678901234567890123456789"

    def __init__(self, root: Path, asked: list[str], *arguments: Any) -> None:
        self.root, self.asked = root, asked
        super().__init__(*arguments)

    def _answer(self) -> bytes:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(f"{self.command} /{path}")
        if path.startswith("api/"):
            kind, owner, name, asked, *_ = path.removeprefix("api/").split("/")
            data = self._listing(self.root / kind / owner / name, asked)
        else:
            repository, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            data = self._file(self.root / repository / file, revision)
        if data is None:
            self.send_response(404)
            known = (self.root / path.partition("/resolve/")[0]).is_dir()
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if path.startswith("api/") else "application/octet-stream")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def _listing(self, folder: Path, asked: str) -> bytes | None:
        if not folder.is_dir():
            return None
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
        siblings = [{"rfilename": name} for name in names]
        return json.dumps(tree if asked == "tree" else {"id": "x/y", "sha": self.commit, "siblings": siblings}).encode()

    def _file(self, file: Path, revision: str) -> bytes | None:
        return file.read_bytes() if revision in ("main", "v1", self.commit) and file.is_file() else None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def log_message(self, *_: object) -> None:
        pass


# A process of its own: the store keeps sockets open, and so does the library that reads from it.
_S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


class S3(NamedTuple):
    """An S3 on this machine, and the environment by which programs find it."""

    environment: dict[str, str]

    def put(self, name: str, data: bytes = b"") -> None:
        """Make the object `bucket/key`, or the bucket `bucket`."""
        address, headers = self.environment["AWS_ENDPOINT_URL"], {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{address}/{name}", data=data, method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture
def s3() -> Iterator[S3]:
    """Return an S3 that holds an empty bucket `bucket`."""
    for name in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(name, reason="an S3 to test against is not here: pip install 'effnet-train[dev]'")
    command = [sys.executable, "-c", _S3]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        assert store.stdin is not None
        assert store.stdout is not None
        kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        address = f"http://127.0.0.1:{store.stdout.readline().strip()}"
        running = S3({**kept, "AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true", **keys})
        running.put("bucket")
        try:
            yield running
        finally:
            store.stdin.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Return a hub of this machine, which serves an empty folder."""
    asked: list[str] = []
    root = tmp_path / "hub"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_HubRequest, root, asked))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", root, asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
