"""`dry_run=true` says what a run would be and leaves nothing behind."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effnet_train.cli import plan

Cli = Callable[..., Any]


def everything(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_of_the_papers_b0(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2's numbers, and the schedule's by hand: 1,281,167 / 4096 steps an epoch, 0.256 at the peak."""
    monkeypatch.setattr(plan, "images_per_s", lambda *_: (100.0, "as told"))
    done = cli("train", "model=b0", "data=imagenet", "dry_run=true", "device=cpu", "accumulate=64")
    assert done.status == 0, done.err
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines() if not line.startswith("learning rate"))
    assert rows["parameters"] == "5,288,548"
    assert rows["multiply-adds"].startswith("0.38") or rows["multiply-adds"].startswith("0.39")
    assert rows["data"] == "1,281,167 training images (of a complete copy; data/imagenet was not read)"
    assert rows["batch"] == "4,096 = 1 ranks x 64 micro-batches x 64 images"
    assert rows["steps"] == "312.8 an epoch, 109,475 in 350 epochs"
    rates = next(line for line in done.out.splitlines() if line.startswith("learning rate"))
    assert "0 at step 0, " in rates
    assert "0.24087 at step 1,563" in rates  # 0.256 * 0.97 ** 2, just after five epochs of warm-up
    assert rows["time"].startswith("about 51.9 days")  # 350 * 1,281,167 / 100 seconds
    assert everything(tmp_path) == {}


def test_a_dry_run_counts_what_is_there_and_times_a_step(cli: Cli, tiny: list[str], tmp_path: Path) -> None:
    done = cli("train", *tiny, "dry_run=true")
    assert done.status == 0, done.err
    assert "80 training images (counted in " in done.out
    assert "5.0 an epoch, 2 in 1 epochs" in done.out
    assert "(the step timed here on 16 images: " in done.out
    assert everything(tmp_path) == {}


def test_a_dry_run_changes_nothing_of_a_run(cli: Cli, tiny: list[str], run_of_digits: Path) -> None:
    before = everything(run_of_digits)
    done = cli("train", *tiny, f"run_root={run_of_digits.parent}", "dry_run=true")
    assert "(REFUSED: the folder " in done.out
    assert "optim._target_ was 'torch.optim.AdamW'" in done.out
    assert everything(run_of_digits) == before


@pytest.fixture
def run_of_digits(trained: Path) -> Path:
    return trained


def test_a_dry_run_downloads_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the folder is there, and empty."""
    monkeypatch.setattr(plan, "images_per_s", lambda *_: (100.0, "as told"))
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    done = cli("train", "model=nano", "data=cifar10", "dry_run=true", "device=cpu", "data.minival=5000")
    assert done.status == 0, done.err
    assert "45,000 training images (of a complete copy" in done.out
    assert everything(tmp_path).keys() == {"data", "data/cifar10"}


def test_a_dry_run_without_data_says_what_to_give(cli: Cli) -> None:
    done = cli("train", "data=folder", "data.root=nowhere", "dry_run=true", "device=cpu")
    assert done.status == 2
    assert "data.root=nowhere does not exist: set it to a folder with train/<class>/ and val/<class>/" in done.err


@pytest.mark.parametrize(
    ("hours", "text"), [(0.005, "18 s"), (0.5, "30 min"), (1.9, "114 min"), (30, "30.0 h"), (100, "4.2 days")]
)
def test_durations(hours: float, text: str) -> None:
    assert plan.duration(hours) == text


def test_a_dry_run_says_that_a_run_would_go_on_and_what_a_batch_lacks(cli: Cli, tiny: list[str]) -> None:
    assert cli("train", *tiny).status == 0
    assert "(holds a run: it would go on)" in cli("train", *tiny, "dry_run=true").out
    large = cli("train", *tiny, "name=large", "batch_size=100", "dry_run=true").out
    assert "WARNING: batch_size=100 is more than the 80 training images" in large


def test_a_dry_run_looks_at_what_a_run_would_start_from(cli: Cli, tiny: list[str]) -> None:
    assert cli("train", *tiny).status == 0
    done = cli("train", *tiny, "name=next", "init_from=run", "dry_run=true")
    assert re.search(r"weights +from run\n", done.out)
    for changes, message in (
        (["init_from=nowhere"], "nowhere does not exist"),
        (["init_from=run", "model.width=0.5"], "init_from=run holds weights of another model"),
    ):
        done = cli("train", *tiny, "name=next", *changes, "dry_run=true")
        assert done.status == 2
        assert message in done.err


def test_a_dry_run_copies_and_fetches_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet's images are counted in place, those of the hub not at all."""
    monkeypatch.setattr(plan, "images_per_s", lambda *_: (100.0, "as told"))
    for split, rows in (("train", 40), ("validation", 4)):
        table = pa.table({"image": pa.array([{"bytes": b"x"}] * rows), "label": [0, 1] * (rows // 2)})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    before = everything(tmp_path)
    common = (
        "recipe=demo",
        "data=parquet",
        "batch_size=8",
        "device=cpu",
        "dry_run=true",
        f"data.cache={tmp_path}/cache",
    )
    done = cli("train", *common, f"data.root={tmp_path}")
    assert (done.status, "40 training images (counted in " in done.out) == (0, True), done.err
    done = cli("train", *common, "data.root=hub:someone/set")
    assert "data.root=hub:someone/set: a plan fetches nothing, set data.expected=" in done.err
    done = cli("train", *common, "data.root=hub:someone/set", "data.expected={classes: 2, train: 40, val: 4}")
    assert (done.status, "40 training images (of a complete copy" in done.out) == (0, True), done.err
    assert everything(tmp_path) == before
