"""Shards in a real S3 server, which is found by the usual environment variables, give what they give here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effnet_train.data.archives import shards
from effnet_train.data.loader import eval_batches
from effnet_train.data.preprocess import Preprocess

BRACES = "train-{0000..0001}.tar"
PROGRAM = """
import json, sys
from effnet_train.data.archives import shards
from effnet_train.data.loader import eval_batches
from effnet_train.data.preprocess import Preprocess

def found(**options):
    try:
        data = shards("s3://bucket/set", val="val-0000.tar", preprocess=Preprocess(8), cache=sys.argv[1], **options)
        batches = list(eval_batches(data.train, data, batch_size=3, workers=2))
        return [data.classes, sum((batch.images.tolist() for batch in batches), [])]
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

if __name__ == "__main__":
    print(json.dumps([found(**options) for options in json.loads(sys.argv[2])]))
"""


@pytest.fixture
def bucket(s3: Any, sharded: Path, write_shard: Callable[..., None]) -> dict[str, str]:
    """Return the environment by which an S3 is found that holds the shards as s3://bucket/set."""
    write_shard(sharded / "empty.tar", [("0001", {"jpg": b"", "cls": b"0"})])
    for file in sharded.iterdir():
        s3.put(f"bucket/set/{file.name}", file.read_bytes())
    environment: dict[str, str] = s3.environment
    return environment


def in_s3(environment: dict[str, str], tmp_path: Path, *options: dict[str, str]) -> list[Any]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "s3"), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_shards_in_s3(bucket: dict[str, str], sharded: Path, tmp_path: Path) -> None:
    options = {"train": "train-*.tar", "val": "val-*.tar", "cache": str(tmp_path / "cache")}
    data = shards(str(sharded), **options, preprocess=Preprocess(8))
    (batch,) = eval_batches(data.train, data, batch_size=5)
    *found, empty, absent = in_s3(
        bucket,
        tmp_path,
        {"train": BRACES},
        {"train": "train-*.tar"},
        {"train": BRACES, "shard_cache": str(tmp_path / "ssd")},
        {"train": "empty.tar"},
        {"train": "train-{0000..0002}.tar"},
    )
    assert found == [[["ant", "bee"], batch.images.tolist()]] * 3
    assert len(os.listdir(tmp_path / "ssd")) == 2
    # S3 gives the whole of a file to who asks for no byte of it.
    assert empty.startswith("DataError: cannot read the image s3://bucket/set/empty.tar:0001.jpg: the file holds no")
    assert absent.startswith("FileNotFoundError: data.root=s3://bucket/set: there is no s3://bucket/set/train-0002.tar")
    (without,) = in_s3({key: value for key, value in bucket.items() if "KEY" not in key}, tmp_path, {"train": BRACES})
    assert without.startswith("PermissionError: cannot read s3://bucket/set/train-0000.tar: access denied (Unable to")
    assert "give AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL" in without
