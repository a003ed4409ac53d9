"""`effnet-eval resolution=[...]`: each size scored as alone, the best one found and drawn; what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from effnet_train.cli.eval_sweep import best_size, sweep_lines
from effnet_train.engine.scores import Metrics

Cli = Callable[..., Any]
ONE = ("device=cpu", "workers=0")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def metrics(top1: float) -> Metrics:
    return Metrics(top1=top1, top5=0.9, loss=1.0, images=10, skipped=0, images_per_s=5.0)


def test_each_size_is_scored_as_alone(cli: Cli, run: Path, tmp_path: Path) -> None:
    alone = {}
    for size in (24, 32, 48):
        done = cli("eval", f"checkpoint={run}", f"resolution={size}", *ONE)
        alone[size] = json.loads(done.out.splitlines()[-1])
    done = cli("eval", f"checkpoint={run}", "resolution=[48,24,32]", "picture=sizes.png", *ONE)
    assert done.status == 0, done.err
    record = json.loads((run / "eval.json").read_text())
    assert json.loads(done.out.splitlines()[-1]) == record
    assert [row["resolution"] for row in record["sweep"]] == [24, 32, 48]
    for row in record["sweep"]:
        for key in ("top1", "top5", "loss", "ece", "images"):
            assert row[key] == alone[row["resolution"]][key]
    assert len({row["loss"] for row in record["sweep"]}) == 3
    best = max(record["sweep"], key=lambda row: row["top1"])
    assert (record["top1"], record["resolution"]) == (best["top1"], best["resolution"])
    (line,) = (line for line in done.out.splitlines() if "as trained" in line)
    assert line.split()[0] == "32"
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.size == (960, 600)


def test_scores_under_attack_say_so(cli: Cli, run: Path) -> None:
    done = cli("eval", f"checkpoint={run}", "resolution=[24,32]", "attack.epsilon=3", *ONE)
    assert done.status == 0, done.err
    assert "  attacked  epsilon 3, steps 4, step_size 1\n" in done.out
    assert json.loads((run / "eval.json").read_text())["attack"] == {"epsilon": 3, "steps": 4, "step_size": 1}


def test_the_best_is_the_smallest_of_the_highest() -> None:
    found = {32: metrics(0.5), 64: metrics(0.7), 48: metrics(0.7), 24: metrics(0.1)}
    assert best_size(found) == 48
    lines = sweep_lines(found, 32)
    assert [line.split()[0] for line in lines[1:]] == ["24", "32", "48", "64"]
    assert [line.endswith("best") for line in lines[1:]] == [False, False, True, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resolution=[]",), r"resolution=[] must be different sizes in pixels"),
        (("resolution=[32,32]",), r"resolution=[32, 32] must be different sizes in pixels, as [224,256,288]"),
        (("resolution=[0,32]",), r"resolution=[0, 32] must be different sizes"),
        (("resolution=[32,x]",), "must be a whole number or a list of whole numbers or null"),
        (("picture=a.png",), "picture=a.png is of one checkpoint's scores at several sizes: give resolution="),
        (("resolution=[32]", "picture=a.gif"), "picture=a.gif must end in .png, .svg or .pdf"),
        (("resolution=[32]", "picture=no/a.png"), "picture=no/a.png: its folder does not exist"),
        (("resolution=[32]", "details=x"), "details=x are of one resolution="),
    ],
)
def test_what_makes_no_sense_is_told(cli: Cli, run: Path, words: tuple[str, ...], message: str) -> None:
    done = cli("eval", f"checkpoint={run}", *words, *ONE)
    assert (done.status, message in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resolution=[32,48,64]",), "resolution=[32, 48, 64] must be a size in pixels for each of the 2 checkpoints"),
        (("resolution=[32]",), "resolution=[32] must be a size in pixels for each of the 2 checkpoints"),
        (("resolution=[0,32]",), "resolution=[0, 32] must be a size in pixels for each"),
        (("resolution=[32,32]",), "best.pt twice: an average is of different weights, or of one's at several sizes"),
        (("resolution=[32,48]", "picture=a.png"), "picture=a.png is of one checkpoint's scores at several sizes"),
    ],
)
def test_of_several_checkpoints_each_has_its_size(cli: Cli, run: Path, words: tuple[str, ...], message: str) -> None:
    done = cli("eval", f"checkpoint=[{run},{run}/best.pt]", *words, *ONE)
    assert (done.status, message in done.err) == (2, True), done.err
